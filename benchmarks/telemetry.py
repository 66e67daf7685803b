"""What telemetry costs: samples/s with it over samples/s without.

    python benchmarks/telemetry.py            # 20 pairs of 200 steps, a few minutes
    python benchmarks/telemetry.py --write    # the result into benchmarks/results/

Both sides train the ResNet of ``jobs.vision:digits`` on two gloo workers of this machine, at a fixed batch. With
telemetry the parts of each step are timed and recorded, and each worker's thread sends a snapshot a second to a real
hub actor on this machine, which is scraped every five seconds; without it (``telemetry.enabled=false``) none of that
is there but the idle hub. Runs take turns in one group of workers: A B, B A. A run's figure is the median time of its
steps, by the records' times, after the first 30. Wanted: a median of the pairs' ratios of at least 0.99.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.launching.cluster import RayCluster

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKERS, WARM_UP_STEPS, TARGET, SCRAPE_S, PORT = 2, 30, 0.99, 5.0, 19600
FAR = 1_000_000


def main() -> int:
    """Run the benchmark; the exit code says only whether all runs ran."""
    parser = argparse.ArgumentParser(description="Samples/s with telemetry over samples/s without.")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=24, help="channels of the ResNet's first stage")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-telemetry.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="telemetry-") as name:
        folder = Path(name)
        runs = [_run(folder, options, n, side) for n in range(options.pairs) for side in _order(n)]
        os.environ["ORCHESTRATOR_TARGETS"] = str(folder / "targets")
        with RayCluster.connect(None, log=folder / "ray.log"), _scraping():
            _train(runs, folder)
        pairs = [{side: _step_s(folder / f"{side}-{n}") for side in ("on", "off")} for n in range(options.pairs)]
    text = report(pairs, options)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-telemetry.md").write_text(text + "\n")
    return 0


def _order(pair: int) -> tuple[str, str]:
    return ("on", "off") if pair % 2 == 0 else ("off", "on")


def _run(folder: Path, options: argparse.Namespace, pair: int, side: str) -> dict[str, Any]:
    settings = {
        "name": f"{side}-{pair}",
        "checkpoint.uri": folder,
        "checkpoint.interval_s": FAR,
        "evaluation.every_epochs": FAR,
        "recipe.stop.steps": options.steps,
        "scale.workers": WORKERS,
        "policy.name": "fixed",
        "telemetry.enabled": str(side == "on").lower(),
        "telemetry.port": PORT,
    }
    overrides = [f"{field}={value}" for field, value in settings.items()]
    return {"job": "jobs.vision:digits", "args": [f"width={options.width}"], "overrides": overrides}


def _train(runs: list[dict[str, Any]], folder: Path) -> None:
    import ray

    description = folder / "runs.json"
    description.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    command += ["--module", "benchmarks.without_ray", f"--runs={description}"]
    command += [f"--hub={ray.get_runtime_context().gcs_address}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode} from {' '.join(command)}\n" + "\n".join(done.stderr.splitlines()[-20:]))


@contextlib.contextmanager
def _scraping() -> Iterator[None]:
    """Ask the hub for its page as a Prometheus would."""
    end = threading.Event()

    def scrape() -> None:
        while not end.wait(SCRAPE_S):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as answer:
                answer.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _step_s(folder: Path) -> float:
    """Median time between two records."""
    times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(b - a for a, b in itertools.pairwise(times[WARM_UP_STEPS - 1 :]))


def report(pairs: list[dict[str, float]], options: argparse.Namespace) -> str:
    """Return the result as Markdown."""
    rows = ["| pair | with, ms/step | without, ms/step | ratio of samples/s |", "| ---: | ---: | ---: | ---: |"]
    ratios = sorted(pair["off"] / pair["on"] for pair in pairs)
    for number, pair in enumerate(pairs, start=1):
        rows.append(f"| {number} | {1e3 * pair['on']:.2f} | {1e3 * pair['off']:.2f} | {pair['off'] / pair['on']:.3f} |")
    median = statistics.median(ratios)
    low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
    verdict = "met" if median >= TARGET else "missed"
    head = (
        f"# What telemetry costs\n\n{datetime.now(UTC).date()}. {len(os.sched_getaffinity(0))} cores.\n\n"
        f"`python benchmarks/telemetry.py --pairs {options.pairs} --steps {options.steps} --width {options.width}`\n"
    )
    last = (
        f"Median ratio {median:.4f} (quartiles {low:.3f} to {high:.3f}, all {ratios[0]:.3f} to {ratios[-1]:.3f}); "
        f"wanted {TARGET}: {verdict}."
    )
    return "\n".join([head, *rows, "", last])


if __name__ == "__main__":
    sys.exit(main())
