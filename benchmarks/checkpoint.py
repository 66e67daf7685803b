"""How long a checkpoint to S3 keeps training waiting: ours, uploaded beside the training, against a synchronous one.

    python benchmarks/checkpoint.py            # 5 pairs, a few minutes
    python benchmarks/checkpoint.py --write    # the result into benchmarks/results/

Both sides save the same state of the same DeepSpeed engine (ZeRO stage 1, fp32, AdamW, two gloo workers of this
machine) to the same SeaweedFS on loopback. The synchronous side is what one would write by hand: ``save_checkpoint`` to
the local disk, every rank uploads what it wrote with s3transfer, and then they go on. Ours is
``StoredCheckpoints.save``. Saves take turns: A B, B A, and so on. Wanted: the median time blocked under 5 % of the
synchronous save's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKERS, TARGET = 2, 0.05
STEPS = 6


def main() -> int:
    """Run the benchmark; the exit code says only whether it ran."""
    parser = argparse.ArgumentParser(description="Time blocked by a checkpoint to S3, over that of a synchronous save.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--width", type=int, default=3072, help="of the four layers of the model: 9.4 M parameters each"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-checkpoint.md")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if options.worker:
        _work(options, Path(options.worker))
        return 0
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        found = _measure(options, Path(folder))
    text = report(found, options)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-checkpoint.md").write_text(text + "\n")
    return 0


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import s3_server

    server = s3_server.Weed(folder / "weed", volume_mb=1024)
    server.start()
    values = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": s3_server.KEY}
    values |= {"AWS_SECRET_ACCESS_KEY": s3_server.SECRET, "ORCHESTRATOR_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}", __file__]
    command += [f"--pairs={options.pairs}", f"--width={options.width}", "--worker", str(folder)]
    try:
        with s3_server.environment(values):
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            subprocess.run(command, check=True, env=env, stdout=sys.stderr)
    finally:
        server.kill()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


# -- in the workers ----------------------------------------------------------------------------


def _work(options: argparse.Namespace, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    import s3_server

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    side = _Sides(options.width, f"s3://{s3_server.BUCKET}", folder)
    found: dict[str, list[Any]] = {"sync": [], "blocked": [], "whole": [], "alone": [], "beside": []}
    for pair in range(options.pairs + 1):
        for name in ("sync", "ours") if pair % 2 else ("ours", "sync"):
            alone = side.steps(STEPS)
            taken = side.sync() if name == "sync" else side.ours()
            if pair == 0:
                continue  # buffers, connections and files are made
            if name == "sync":
                found["sync"].append(taken[0])
            else:
                found["blocked"].append(taken[0])
                found["whole"].append(taken[1])
                found["alone"].append(alone)
                found["beside"].append(taken[2])
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps({**found, "bytes": side.size_bytes}))
    dist.barrier()
    dist.destroy_process_group()


class _Witness:
    def checkpoint_whole(self, size_bytes: int, duration_s: float) -> None:
        self.size_bytes, self.duration_s = size_bytes, duration_s

    def checkpoint_trouble(self, text: str) -> None:
        print(text, file=sys.stderr)

    def event(self, kind: str, text: str) -> None:
        print(kind, text, file=sys.stderr)


class _Sides:
    """One engine, and the two ways to save it."""

    def __init__(self, width: int, uri: str, folder: Path) -> None:
        import torch.distributed as dist
        from torch import nn

        from gloo_jobs import Toy, make_engine, plan_for, toy_config
        from orchestrator.config import AdamW, StorageConfig
        from orchestrator.launching.limits import room_for_a_copy
        from orchestrator.storage.claim import Claim, StoreFence
        from orchestrator.storage.store import open_store
        from orchestrator.storage.stored_run import StoredRun
        from orchestrator.training.state import TrainState
        from orchestrator.training.stored import StoredCheckpoints

        def model() -> nn.Module:
            inner = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
            return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *inner, nn.Linear(width, 4))

        self.config, self.task = toy_config(recipe={"optimizer": AdamW(learning_rate=1e-4)}), Toy(model)
        self.engine = make_engine(self.config, self.task)
        self.plan = plan_for(self.config, self.task)
        self.state = TrainState.start(self.plan, self.config)
        self.store = open_store(f"{uri}/by-hand")
        self.folder, self.saves, self.size_bytes = folder / "by-hand", 0, 0
        run = StoredRun(f"{uri}/ours", StorageConfig())
        word = [None]
        if dist.get_rank() == 0:
            claim = Claim.take(run.store, waiting=print)
            word = [StoreFence.begin(run.store, driver=claim.number)]
        dist.broadcast_object_list(word, src=0)
        self.witness = _Witness()
        (folder / "ours").mkdir(exist_ok=True)
        self.checkpoints = StoredCheckpoints(
            run,
            folder / "ours",
            StoreFence(run.store, str(word[0])),
            {"workers": WORKERS, "zero_stage": 1, "precision": "fp32"},
            keep=1,
            budget_s=600.0,
            flush=lambda: None,
            witness=self.witness,
            room=room_for_a_copy,
        )

    def steps(self, count: int) -> float:
        """Take steps; returns the median's seconds."""
        from dataclasses import replace

        from gloo_jobs import step_at

        times = []
        for _ in range(count):
            started = time.perf_counter()
            step_at(self.engine, self.config, self.task, self.state.samples, self.plan.layout, 1e-4)
            times.append(time.perf_counter() - started)
            samples = self.state.samples + self.plan.layout.global_batch
            self.state = replace(self.state, step=self.state.step + 1, samples=samples)
        return statistics.median(times)

    def sync(self) -> tuple[float]:
        """Seconds of a save by hand, after which every byte is in the store."""
        import torch.distributed as dist

        from orchestrator.storage.tree import upload_tree

        self.saves += 1
        folder = self.folder / f"{self.saves:04d}"
        dist.barrier()
        started = time.perf_counter()
        self.engine.save(folder)
        dist.barrier()
        mine = sorted(path for path in folder.rglob("*") if path.is_file())[dist.get_rank() :: WORKERS]
        upload_tree(self.store, folder, folder.name, paths=mine)
        dist.barrier()
        taken_s = time.perf_counter() - started
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
        return (taken_s,)

    def ours(self) -> tuple[float, float, float]:
        """Seconds blocked, seconds until whole in the store, and a step's seconds meanwhile."""
        import torch.distributed as dist

        dist.barrier()
        started = time.perf_counter()
        self.checkpoints.save(self.engine, self.state)
        dist.barrier()
        blocked_s = time.perf_counter() - started
        beside = self.steps(STEPS)
        self.checkpoints.finish()
        self.size_bytes = getattr(self.witness, "size_bytes", 0)
        dist.barrier()
        return blocked_s, getattr(self.witness, "duration_s", 0.0), beside


# -- the report --------------------------------------------------------------------------------


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The page, as Markdown."""
    middle = {name: statistics.median(values) for name, values in found.items() if isinstance(values, list)}
    ratio = middle["blocked"] / middle["sync"]
    rows = [
        ("a synchronous save: DeepSpeed to the disk, then uploaded", f"{middle['sync']:.2f} s", ""),
        ("ours: training waits", f"{middle['blocked']:.3f} s", ""),
        ("ours: whole in the store after", f"{middle['whole']:.2f} s", ""),
        ("**waited, as a share of the synchronous save**", f"**{ratio:.1%}**", f"{TARGET:.0%}"),
        ("a step, with nothing beside it", f"{middle['alone']:.3f} s", ""),
        ("a step while ours is uploaded", f"{middle['beside']:.3f} s", ""),
    ]
    each = {name: ", ".join(f"{s:.3g}" for s in found[name]) for name in ("sync", "blocked")}
    return f"""# What a checkpoint to S3 costs

{datetime.now(UTC).date()}. {os.cpu_count()} cores, shared by two workers, the uploads and the store itself (SeaweedFS
4.48 on loopback, on the same disk).

`python benchmarks/checkpoint.py --pairs {options.pairs}`: {found["bytes"] / 2**20:,.0f} MiB of state, ZeRO stage 1,
fp32, AdamW; medians of {options.pairs} saves of each kind, in turns.

| | measured | wanted |
| --- | ---: | ---: |
{chr(10).join(f"| {' | '.join(row)} |" for row in rows)}

Under {TARGET:.0%}: {"met" if ratio < TARGET else "missed"}. Each save: synchronous {each["sync"]} s; blocked
{each["blocked"]} s."""


if __name__ == "__main__":
    sys.exit(main())
