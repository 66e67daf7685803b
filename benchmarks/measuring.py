"""What measuring and deciding cost: samples/s under `goodput`, held at one batch, over samples/s under `fixed`.

    python benchmarks/measuring.py            # 6 pairs of 300 steps, a few minutes
    python benchmarks/measuring.py --write    # the result into benchmarks/results/

Both sides train the ResNet of ``jobs.vision:digits`` on two gloo workers of this machine, at the same batch: no change
is worth a `min_gain` of 99 %, and `goodput` does not explore, so it measures the gradient noise, times the steps,
follows the loss, fits its model, rates the other batches and stays, and the steps it takes are those of `fixed`. Runs
take turns in one group of workers: A B, B A, A B. A run's figure is wall clock from the end of step 50 to the end of
the last one. Wanted: a median ratio of at least 0.98.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from group import records, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKERS, WARM_UP_STEPS, TARGET = 2, 50, 0.98
FAR = 1_000_000


def main() -> int:
    """Run the benchmark; the exit code says only whether all runs ran."""
    parser = argparse.ArgumentParser(
        description="Samples/s under goodput, held at one batch, over samples/s under fixed."
    )
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-measuring.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="measuring-") as folder:
        runs = [_run(Path(folder), options, n, side) for n in range(options.pairs) for side in _order(n)]
        train(runs, Path(folder) / "runs.json")
        pairs = [
            {side: _seconds(Path(folder) / f"{side}-{n}") for side in ("goodput", "fixed")}
            for n in range(options.pairs)
        ]
    text = report(pairs, options)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-measuring.md").write_text(text + "\n")
    return 0


def _order(pair: int) -> tuple[str, str]:
    return ("goodput", "fixed") if pair % 2 == 0 else ("fixed", "goodput")


def _run(folder: Path, options: argparse.Namespace, pair: int, side: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "name": f"{side}-{pair}",
        "checkpoint.uri": folder,
        "checkpoint.interval_s": FAR,
        "evaluation.every_epochs": FAR,
        "recipe.stop.steps": options.steps,
        "scale.workers": WORKERS,
        "policy.name": side,
    }
    if side == "goodput":
        settings |= {"policy.min_gain": 0.99, "policy.explore": "false"}
    overrides = [f"{field}={value}" for field, value in settings.items()]
    return {"job": "jobs.vision:digits", "args": [f"batch={options.batch}"], "overrides": overrides}


def _seconds(folder: Path) -> float:
    """Wall clock of the timed part."""
    times = [step["time"] for step in records(folder / "metrics.jsonl")]
    return float(times[-1] - times[WARM_UP_STEPS - 1])


def report(pairs: list[dict[str, float]], options: argparse.Namespace) -> str:
    """Return the result as Markdown."""
    steps = options.steps - WARM_UP_STEPS
    rows = ["| pair | goodput, ms/step | fixed, ms/step | ratio of samples/s |", "| ---: | ---: | ---: | ---: |"]
    ratios = [pair["fixed"] / pair["goodput"] for pair in pairs]
    for number, (pair, ratio) in enumerate(zip(pairs, ratios, strict=True), start=1):
        ours, fixed = (1e3 * pair[side] / steps for side in ("goodput", "fixed"))
        rows.append(f"| {number} | {ours:.2f} | {fixed:.2f} | {ratio:.3f} |")
    median = statistics.median(ratios)
    verdict = "met" if median >= TARGET else "missed"
    head = (
        f"# What measuring and deciding cost\n\n{datetime.now(UTC).date()}. {len(os.sched_getaffinity(0))} cores.\n\n"
        f"`python benchmarks/measuring.py --pairs {options.pairs} --steps {options.steps} --batch {options.batch}`\n"
    )
    last = f"Median ratio {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); wanted {TARGET}: {verdict}."
    return "\n".join([head, *rows, "", last])


if __name__ == "__main__":
    sys.exit(main())
