"""Data from S3 against data in memory, and our batches against torch's DataLoader.

    python benchmarks/data.py            # a real S3 server (SeaweedFS) on this machine, a few minutes
    python benchmarks/data.py --write    # the result into benchmarks/results/

1. The digits ResNet trains on two gloo workers, once from Parquet streamed from S3 and once from the same rows in
   memory. Runs take turns in one group of workers: A B, B A. A run's figure is samples/s from the end of step 50 on.
   Wanted: a median ratio of at least 0.9. Server and training share the cores, which costs the S3 side alone.
2. One process takes batches of 32 of ``--rows`` rows: ``Batches`` streaming from S3 with four threads, and torch's
   ``DataLoader`` with two worker processes over the same rows, which it is given in memory. Wanted: a ratio above 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from group import records, train
from torch.utils.data import DataLoader, Dataset

from jobs.vision import SIDE, digits, write_digits
from orchestrator.config import DataConfig
from orchestrator.job import Parquet
from orchestrator.planning.layout import Layout
from orchestrator.storage.store import open_store
from orchestrator.training.data import Batches, open_dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from s3_server import BUCKET, KEY, SECRET, Weed, environment, no_weed  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WORKERS, WARM_UP_STEPS, BATCH = 2, 50, 32
S3 = f"s3://{BUCKET}/digits"
BIG = f"s3://{BUCKET}/rows/rows.parquet"
STREAMING = DataConfig(mode="streaming")


def main() -> int:
    """Run both; the exit code says only whether they ran."""
    options = _options()
    if (missing := no_weed()) is not None:
        sys.exit(missing)
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        server = Weed(folder / "s3")
        server.start()
        credentials = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.endpoint,
        }
        try:
            with environment(credentials):
                training = _training(folder, options)
                loading = _loading(folder, options)
        finally:
            server.kill()
    text = report(training, loading, options)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-data.md").write_text(text + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Data from S3 against memory, batches against torch's DataLoader.")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-data.md")
    options = parser.parse_args()
    if options.pairs < 1 or options.steps <= WARM_UP_STEPS or options.rows < BATCH:
        parser.error(f"--pairs starts at 1, --steps above {WARM_UP_STEPS}, --rows at {BATCH}")
    return options


# -- training ----------------------------------------------------------------------------------


def _training(folder: Path, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Samples/s from S3 and in memory, pair by pair."""
    local = folder / "digits"
    write_digits(str(local))
    for file in local.glob("*.parquet"):
        open_store(S3).write(file.name, file.read_bytes())
    sides = {"s3": (S3, "streaming"), "memory": (str(local), "memory")}
    runs = [
        _run(folder, f"{side}-{pair}", *sides[side], options.steps)
        for pair in range(options.pairs)
        for side in (("s3", "memory") if pair % 2 == 0 else ("memory", "s3"))
    ]
    train(runs, folder / "runs.json")
    return [(_rate(folder / f"s3-{pair}"), _rate(folder / f"memory-{pair}")) for pair in range(options.pairs)]


def _run(folder: Path, name: str, data: str, mode: str, steps: int) -> dict[str, Any]:
    settings = {
        "name": name,
        "policy.name": "fixed",
        "scale.workers": WORKERS,
        "data.mode": mode,
        "recipe.stop.steps": steps,
        "recipe.stop.epochs": "none",
        "evaluation.every_epochs": 1_000,
        "checkpoint.uri": folder,
        "checkpoint.interval_s": 1_000_000,
    }
    overrides = [f"{field}={value}" for field, value in settings.items()]
    return {"name": name, "job": "jobs.vision:digits", "args": [f"data={data}"], "overrides": overrides}


def _rate(folder: Path) -> float:
    """Samples/s of wall time, waiting for data included."""
    lines = records(folder / "metrics.jsonl")
    timed = lines[WARM_UP_STEPS - 1 :]
    return float(sum(line["global_batch"] for line in timed[1:]) / (timed[-1]["time"] - timed[0]["time"]))


# -- loading alone -----------------------------------------------------------------------------


class Rows(Dataset[dict[str, np.ndarray]]):
    """Rows in memory, one at a time: what a DataLoader asks for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


def _loading(folder: Path, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Samples/s of ``Batches`` from S3 and of a DataLoader, pair by pair."""
    random = np.random.default_rng(0)
    images = random.integers(0, 17, (options.rows, SIDE * SIDE), dtype=np.uint8)
    labels = random.integers(0, 10, options.rows)
    table = pa.table(
        {"image": pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), SIDE * SIDE), "label": pa.array(labels)}
    )
    pq.write_table(table, folder / "rows.parquet", row_group_size=4096)
    open_store(BIG.rpartition("/")[0]).write("rows.parquet", (folder / "rows.parquet").read_bytes())
    pairs = []
    for pair in range(options.pairs):
        sides = [lambda: _ours(options.rows), lambda: _torchs(Rows(images, labels))]
        rates = [side() for side in (sides if pair % 2 == 0 else sides[::-1])]
        pairs.append((rates[0], rates[1]) if pair % 2 == 0 else (rates[1], rates[0]))
    return pairs


def _ours(rows: int) -> float:
    config = digits(batch=BATCH).config.model_copy(update={"data": STREAMING})
    batches = Batches(open_dataset(Parquet(BIG), config), seed=0, rank=0, data=STREAMING)
    layout, steps = Layout(1, BATCH, 1), rows // BATCH
    batches.at(0, layout)
    started = time.perf_counter()
    for step in range(1, steps):
        _as_tensors(batches.at(step * BATCH, layout)[0])
    return (steps - 1) * BATCH / (time.perf_counter() - started)


def _torchs(rows: Rows) -> float:
    loader = iter(DataLoader(rows, batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True))
    next(loader)  # its processes are up
    started, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch["label"])
    return count / (time.perf_counter() - started)


def _as_tensors(columns: Any) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(column) for name, column in columns.items()}


# -- the result --------------------------------------------------------------------------------


def report(training: list[tuple[float, float]], loading: list[tuple[float, float]], options: argparse.Namespace) -> str:
    """The page."""
    data = STREAMING
    return "\n".join(
        [
            "# Data from S3\n",
            f"{datetime.now(UTC).date()}. {os.cpu_count()} cores, shared by training and server.\n",
            (
                f"`python benchmarks/data.py --pairs {options.pairs} --steps {options.steps} --rows {options.rows}`, "
                f"`data.window={data.window}`, `data.threads={data.threads}`, `data.ahead={data.ahead}`.\n"
            ),
            "Training the digits ResNet on two workers, samples/s:\n",
            _table(("from S3", "in memory"), training, wanted=0.9),
            f"\nBatches of {BATCH} in one process, without a model, samples/s:\n",
            _table(("Batches, from S3", "DataLoader, 2 workers, in memory"), loading, wanted=1.0),
        ]
    )


def _table(names: tuple[str, str], pairs: list[tuple[float, float]], *, wanted: float) -> str:
    ratios = [one / other for one, other in pairs]
    rows = [f"| pair | {names[0]} | {names[1]} | ratio |", "| ---: | ---: | ---: | ---: |"]
    rows += [
        f"| {number} | {one:,.0f} | {other:,.0f} | {one / other:.3f} |"
        for number, (one, other) in enumerate(pairs, start=1)
    ]
    median = statistics.median(ratios)
    met = "met" if median >= wanted else "NOT met"
    rows.append(f"\nMedian ratio {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); wanted {wanted}: {met}.")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
