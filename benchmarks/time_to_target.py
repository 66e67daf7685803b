"""How much sooner a run reaches its target when the policy chooses the batch: `goodput` against every fixed batch.

    python benchmarks/time_to_target.py                       # digits and language, five seeds: about fifty minutes
    python benchmarks/time_to_target.py --tasks digits --seeds 2
    python benchmarks/time_to_target.py --write               # the result into benchmarks/results/

Every variant trains the same job with the same recipe over the whole of its length, and the same learning-rate rule
(`auto`) carries the rate to its batch:

- `goodput`: starts at the reference batch and changes it as it goes;
- a fixed batch: the reference batch (a), and factors of two of it (b).

All variants of a seed run one after the other in one group of two gloo workers on this machine, in an order that is
rotated from seed to seed; seeds follow one another, so what else the machine does meets every variant alike. With
`--folder` runs are kept, and those that are there and finished are not run again.

Time to target is training time (evaluations excluded) to the first evaluation from which on the mean of the latest
five holds the target: a curve that touches it by chance has not arrived, and one bad evaluation is not a setback. A run
that never does counts as infinitely long. Wanted: `goodput` at least 1.5 times as fast as (a), within 15 % of the
fastest of (b), final quality within the spread of (a)'s seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from group import records, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKERS = 2
SPEED_UP, NEAR_BEST = 1.5, 1.15
SMOOTHED = 5
"""Evaluations whose mean is held against the target: 360 images alone are off by half a percent."""
PACKAGES = ("torch", "deepspeed", "numpy")


@dataclass(frozen=True)
class Task:
    """A job with its target and the fixed batches it is held against; the first is the reference.

    The target is about what the reference batch reached at four fifths of its first seed's run.
    """

    name: str
    job: str
    args: tuple[str, ...]
    metric: str
    target: float
    larger_is_better: bool
    batches: tuple[int, ...]
    every_epochs: float
    settings: tuple[str, ...] = ()

    def reached(self, value: float) -> bool:
        """Whether ``value`` is as good as the target."""
        return value >= self.target if self.larger_is_better else value <= self.target


TASKS = {
    "digits": Task(
        name="digits",
        job="jobs.vision:digits",
        args=("batch=8", "epochs=24"),
        metric="accuracy",
        target=0.995,
        larger_is_better=True,
        batches=(8, 16, 32, 64, 128, 256),
        every_epochs=0.5,
        # The job's own rate belongs to batch 64; the root of 8 below it is what it is at 8.
        settings=("recipe.optimizer.learning_rate=2.1e-3",),
    ),
    "language": Task(
        name="language",
        job="jobs.language:gpt",
        args=("batch=8", "context=32", "epochs=0.3"),
        metric="bits_per_byte",
        target=2.47,
        larger_is_better=False,
        batches=(8, 16, 32, 64),
        every_epochs=0.0075,
    ),
}


@dataclass(frozen=True)
class Result:
    """One run: time and reference samples to the target, the whole time, and the quality at its end."""

    variant: str
    seed: int
    to_target_s: float
    total_s: float
    steps: int
    quality: float
    final_batch: int
    changes: int


def main() -> int:
    """Run the benchmark; the exit code says only whether all runs ran."""
    options = _options()
    tasks = [TASKS[name] for name in options.tasks]
    results: dict[str, list[Result]] = {task.name: [] for task in tasks}
    kept = None if options.folder is None else Path(options.folder).absolute()
    with tempfile.TemporaryDirectory(prefix="time-to-target-") as temporary:
        for seed in range(options.seeds):
            for task in tasks:
                found = _seed(task, seed, kept or Path(temporary))
                results[task.name] += found
                print(_line(task, found), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({name: [vars(r) for r in found] for name, found in results.items()}))
    else:
        print("\n\n".join(table(task, results[task.name]) for task in tasks))
    if options.write:
        _write(results)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time to target of the goodput policy against fixed batches.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", help="keep the runs here, and go on with what is there")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-time-to-target.md")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds starts at 1")
    return options


# -- the runs ----------------------------------------------------------------------------------


def _seed(task: Task, seed: int, folder: Path) -> list[Result]:
    variants = ["goodput", *(str(batch) for batch in task.batches)]
    turn = seed % len(variants)
    order = variants[turn:] + variants[:turn]
    runs = [_run(task, variant, seed, folder) for variant in order]
    folder.mkdir(parents=True, exist_ok=True)
    if missing := [run for run in runs if not _is_finished(folder / run["name"])]:
        train(missing, folder / f"{task.name}-{seed}.json")
    return [_result(task, variant, seed, folder / run["name"]) for variant, run in zip(order, runs, strict=True)]


def _is_finished(folder: Path) -> bool:
    """Whether a run has reached its length; one that has not is removed."""
    path = folder / "metrics.jsonl"
    last = records(path)[-1:]
    if last and last[0]["progress"] >= last[0]["length"]:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _run(task: Task, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    name = f"{task.name}-{variant}-{seed}"
    settings = {
        "name": name,
        "seed": seed,
        "checkpoint.uri": folder,
        "checkpoint.interval_s": 1_000_000,
        "evaluation.every_epochs": task.every_epochs,
        "scale.workers": WORKERS,
        "policy.name": "goodput" if variant == "goodput" else "fixed",
    }
    if variant != "goodput":
        settings["layout.global_batch"] = int(variant)
    overrides = [*task.settings, *(f"{field}={value}" for field, value in settings.items())]
    return {"name": name, "job": task.job, "args": list(task.args), "overrides": overrides}


def _result(task: Task, variant: str, seed: int, folder: Path) -> Result:
    metrics, evaluations = records(folder / "metrics.jsonl"), records(folder / "evaluations.jsonl")
    started = metrics[0]["time"] - metrics[0]["step_time_s"]
    reached = [task.reached(value) for value in _smoothed([one["metrics"][task.metric] for one in evaluations])]
    for_good = len(reached) - next((i for i, held in enumerate(reversed(reached)) if not held), len(reached))
    to_target = math.inf
    if for_good < len(evaluations):
        first = evaluations[for_good]
        spent = sum(evaluation["duration_s"] for evaluation in evaluations[: for_good + 1])
        to_target = first["time"] - started - spent
    evaluating = sum(evaluation["duration_s"] for evaluation in evaluations[:-1])
    decisions = folder / "decisions.jsonl"
    return Result(
        variant=variant,
        seed=seed,
        to_target_s=to_target,
        total_s=metrics[-1]["time"] - started - evaluating,
        steps=metrics[-1]["step"],
        quality=evaluations[-1]["metrics"][task.metric],
        final_batch=metrics[-1]["global_batch"],
        changes=sum(d["event"] == "decided" for d in records(decisions)) if decisions.exists() else 0,
    )


def _smoothed(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)]


# -- what is said of them ----------------------------------------------------------------------


def _line(task: Task, found: list[Result]) -> str:
    times = ", ".join(f"{r.variant} {r.to_target_s:.1f}/{r.total_s:.1f} s {r.quality:.4g}" for r in found)
    return f"{task.name} seed {found[0].seed}: {times}"


def table(task: Task, results: list[Result]) -> str:
    """Return medians over the seeds as a Markdown table, and the verdict below it."""
    of = {v: [r for r in results if r.variant == v] for v in ("goodput", *(str(b) for b in task.batches))}
    reference = of[str(task.batches[0])]
    rows = [
        f"| | to {task.metric} {task.target:g}, s | spread | whole run, s | steps | final quality | final batch |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, found in of.items():
        name = "`goodput`" if variant == "goodput" else f"fixed {variant}"
        times = [r.to_target_s for r in found]
        quality = [r.quality for r in found]
        rows.append(
            f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} "
            f"| {statistics.median(r.total_s for r in found):.1f} | {statistics.median(r.steps for r in found):,.0f} "
            f"| {statistics.mean(quality):.4f} ± {_deviation(quality):.4f} "
            f"| {statistics.median(r.final_batch for r in found):.0f} |"
        )
    return "\n".join([*rows, "", _verdict(task, of, reference)])


def _verdict(task: Task, of: dict[str, list[Result]], reference: list[Result]) -> str:
    ours = {r.seed: r for r in of["goodput"]}
    faster = statistics.median(r.to_target_s / ours[r.seed].to_target_s for r in reference)
    medians = {v: statistics.median(r.to_target_s for r in found) for v, found in of.items() if v != "goodput"}
    best = min(medians, key=lambda variant: medians[variant])
    ratios = [ours[r.seed].to_target_s / r.to_target_s for r in of[best]]
    against = statistics.median(ratios)
    quality = statistics.mean(r.quality for r in ours.values()) - statistics.mean(r.quality for r in reference)
    noise = 2 * math.hypot(_deviation([r.quality for r in reference]), _deviation([r.quality for r in ours.values()]))
    noise /= math.sqrt(len(ours))
    worse = -quality if task.larger_is_better else quality
    return (
        f"`goodput` is {faster:.2f} times as fast as the reference batch (wanted {SPEED_UP}: "
        f"{'met' if faster >= SPEED_UP else 'missed'}) and takes {against:.2f} of the time of the fastest fixed batch, "
        f"{best} (wanted {NEAR_BEST}: {'met' if against <= NEAR_BEST else 'missed'}); medians of {len(ours)} paired "
        f"seeds. Final {task.metric} {quality:+.4f} against the reference batch, two standard errors {noise:.4f}: "
        f"{'within noise' if worse <= noise else 'worse'}."
    )


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _write(results: dict[str, list[Result]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC).date()}-time-to-target.md"
    path.write_text(page(results))
    print(f"written to {path}", file=sys.stderr)


def page(results: dict[str, list[Result]]) -> str:
    """Return the result as a Markdown page."""
    parts = []
    for name, found in results.items():
        task = TASKS[name]
        seeds = len({r.seed for r in found})
        arguments = " ".join(f"--arg {a}" for a in task.args)
        parts.append(f"## {name}\n\n`{task.job} {arguments}`, {seeds} seeds.\n\n{table(task, found)}")
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    head = (
        f"# Time to target\n\n{datetime.now(UTC).date()}. {platform.machine()}, {cores} cores, {platform.system()}, "
        f"Python {platform.python_version()}, {packages}. Two gloo workers, fp32, ZeRO stage 1.\n\n"
        "`python benchmarks/time_to_target.py`; what is measured, and how, is in the script's first lines. Times are "
        "medians over the seeds, quality is mean and standard deviation."
    )
    return "\n\n".join([head, *parts]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
