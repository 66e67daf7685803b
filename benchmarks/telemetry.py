"""What telemetry costs: samples/s with it over samples/s without.

    python benchmarks/telemetry.py            # 40 pairs of 100 steps, five minutes
    python benchmarks/telemetry.py --write    # the result into benchmarks/results/

Both sides train the ResNet of ``jobs.vision:digits`` on two gloo workers of this machine, at a fixed batch. With
telemetry the parts of each step are timed and recorded, and each worker's thread sends a snapshot a second to a real
hub actor on this machine, which is scraped every five seconds; without it (``telemetry.enabled=false``) none of that
is there but the idle hub. Runs take turns in one group of workers: A B, B A; they are short, so that both of a pair
meet the same machine. A run's figures are the mean and the median time of its steps, by the records' times, after the
first 20: what happens once a second shows in the mean only. A third figure is the processor time of both workers'
processes, telemetry's threads included: neighbours on the machine disturb it least. Wanted: a median of the pairs'
ratios of at least 0.99.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from group import records, train

from orchestrator.launching.cluster import RayCluster

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKERS, WARM_UP_STEPS, TARGET, SCRAPE_S, PORT = 2, 20, 0.99, 5.0, 19600
FAR = 1_000_000


def main() -> int:
    """Run the benchmark; the exit code says only whether all runs ran."""
    parser = argparse.ArgumentParser(description="Samples/s with telemetry over samples/s without.")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=16, help="channels of the ResNet's first stage")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-telemetry.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="telemetry-") as name:
        folder = Path(name)
        runs = [_run(folder, options, n, side) for n in range(options.pairs) for side in _order(n)]
        os.environ["ORCHESTRATOR_TARGETS"] = str(folder / "targets")
        with RayCluster.connect(None, log=folder / "ray.log"), _scraping():
            import ray  # it reads its environment then

            train(runs, folder / "runs.json", f"--hub={ray.get_runtime_context().gcs_address}")
        folders = [{side: folder / f"{side}-{n}" for side in ("on", "off")} for n in range(options.pairs)]
        pairs = [{side: _steps_s(run) for side, run in pair.items()} for pair in folders]
        busy = [{side: [_busy_s(run) / options.steps] for side, run in pair.items()} for pair in folders]
    text = report(pairs, busy, options)
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


def _steps_s(folder: Path) -> list[float]:
    """Times between two records."""
    times = [step["time"] for step in records(folder / "metrics.jsonl")]
    return [b - a for a, b in itertools.pairwise(times[WARM_UP_STEPS - 1 :])]


def _busy_s(folder: Path) -> float:
    """Processor time of all workers' processes."""
    return sum(float(path.read_text()) for path in folder.glob("processor-*.txt"))


def report(pairs: list[dict[str, list[float]]], busy: list[dict[str, list[float]]], options: argparse.Namespace) -> str:
    """Return the result as Markdown, from times of single steps, and processor times per step."""
    head = (
        f"# What telemetry costs\n\n{datetime.now(UTC).date()}. {len(os.sched_getaffinity(0))} cores.\n\n"
        f"`python benchmarks/telemetry.py --pairs {options.pairs} --steps {options.steps} --width {options.width}`\n"
    )
    said = [
        head,
        "| of a run | with, ms/step | without, ms/step | without over with, median of pairs | quartiles |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, figure, measured in (
        ("mean step", statistics.fmean, pairs),
        ("median step", statistics.median, pairs),
        ("processor time of both workers", statistics.fmean, busy),
    ):
        on, off = ([figure(pair[side]) for pair in measured] for side in ("on", "off"))
        ratios = sorted(without / with_it for with_it, without in zip(on, off, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        ms = f"{1e3 * statistics.median(on):.2f} | {1e3 * statistics.median(off):.2f}"
        said.append(f"| {name} | {ms} | {statistics.median(ratios):.4f} | {low:.3f} to {high:.3f} |")
    ratio = statistics.median(statistics.fmean(pair["off"]) / statistics.fmean(pair["on"]) for pair in pairs)
    verdict = "met" if ratio >= TARGET else "missed"
    return "\n".join([*said, "", f"Wanted, by the mean step: {TARGET}: {verdict}."])


if __name__ == "__main__":
    sys.exit(main())
