"""Whether every job reaches its stated quality in every ZeRO stage, with its batch fixed and with it chosen.

    python benchmarks/workloads.py                      # six jobs, four stages, both policies: forty minutes
    python benchmarks/workloads.py --jobs digits text --stages 1 3
    python benchmarks/workloads.py --write              # the result into benchmarks/results/

Each job is trained by its own recipe until it has come to its stated quality, at most to the recipe's end, on two gloo
workers and without a cluster around them. Stages compute the same, so that of `fixed` they differ by rounding alone;
`goodput` decides by how long its steps take, and so differs from run to run. With `--folder` runs are kept, and those
that are there and finished are not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from group import records, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKERS = 2
STAGES = (0, 1, 2, 3)
POLICIES = ("fixed", "goodput")


@dataclass(frozen=True)
class Workload:
    """A job, and what its docstring says that it comes to."""

    job: str
    metric: str
    stated: float
    larger_is_better: bool = True

    def reached(self, value: float) -> bool:
        """Whether ``value`` is at least as good as stated."""
        return value >= self.stated if self.larger_is_better else value <= self.stated


WORKLOADS = {
    "digits": Workload("jobs.vision:digits", "accuracy", 0.985),
    "images": Workload("jobs.images:classify", "accuracy", 0.98),
    "language": Workload("jobs.language:gpt", "bits_per_byte", 2.28, larger_is_better=False),
    "text": Workload("jobs.text_classifier:classify", "accuracy", 0.75),
    "clicks": Workload("jobs.recommender:clicks", "auc", 0.83),
    "retrieval": Workload("jobs.recommender:retrieval", "recall_at_10", 0.47),
}


@dataclass(frozen=True)
class Run:
    """One run: which, and what it came to."""

    workload: str
    policy: str
    stage: int
    quality: float = math.nan
    steps: int = 0
    share: float = 0.0
    """Of the recipe's length."""
    batch: int = 0
    """The last one."""
    train_time_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.policy}-{self.stage}"

    def words(self, folder: Path) -> dict[str, Any]:
        """As ``without_ray`` wants it."""
        workload = WORKLOADS[self.workload]
        settings = {
            "name": self.name,
            "checkpoint.uri": folder,
            "checkpoint.interval_s": 1_000_000,
            "scale.workers": WORKERS,
            "policy.name": self.policy,
            "layout.zero_stage": self.stage,
            "recipe.stop.metric": workload.metric,
            "recipe.stop.at_least" if workload.larger_is_better else "recipe.stop.at_most": workload.stated,
        }
        overrides = [f"{field}={value}" for field, value in settings.items()]
        args = [f"data={folder / 'data' / self.workload}"]
        return {"job": workload.job, "args": args, "overrides": overrides}

    def ended(self, folder: Path) -> Run | None:
        """With what it came to, or None where it has not come to its end."""
        steps, evaluations = records(folder / "metrics.jsonl"), records(folder / "evaluations.jsonl")
        if not steps or not evaluations:
            return None
        workload = WORKLOADS[self.workload]
        quality, share = evaluations[-1]["metrics"][workload.metric], steps[-1]["progress"] / steps[-1]["length"]
        if share < 1.0 and not workload.reached(quality):
            return None
        return Run(
            self.workload,
            self.policy,
            self.stage,
            quality=quality,
            steps=steps[-1]["step"],
            share=min(1.0, share),
            batch=steps[-1]["global_batch"],
            train_time_s=sum(step["step_time_s"] for step in steps),
        )


def main() -> int:
    """Run the benchmark; the exit code says only whether all runs ran."""
    options = _options()
    kept = None if options.folder is None else Path(options.folder).absolute()
    results: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="workloads-") as temporary:
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.jobs:
            runs = [Run(name, policy, stage) for policy in POLICIES for stage in options.stages]
            for run in missing(runs, folder):
                shutil.rmtree(folder / run.name, ignore_errors=True)
            if left := missing(runs, folder):
                train([run.words(folder) for run in left], folder / f"{left[0].workload}.json")
            ended = [end for run in runs if (end := run.ended(folder / run.name)) is not None]
            results += ended
            print(name, ", ".join(f"{end.quality:.4f}" for end in ended), file=sys.stderr, flush=True)
    text = report(results)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-workloads.md").write_text(text + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality of every job in every stage, under both policies.")
    parser.add_argument("--jobs", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", help="keep the runs here, and go on with what is there")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-workloads.md")
    return parser.parse_args()


def missing(runs: list[Run], folder: Path) -> list[Run]:
    """Those that have not come to their end."""
    return [run for run in runs if run.ended(folder / run.name) is None]


def report(results: list[Run]) -> str:
    """The page, as Markdown."""
    stages = sorted({run.stage for run in results})
    rows = [
        f"| job | stated | policy | {' | '.join(f'stage {stage}' for stage in stages)} | steps | of length | batch |",
        f"| --- | --- | --- | {'---: | ' * len(stages)}---: | ---: | ---: |",
    ]
    for name, workload in WORKLOADS.items():
        for policy in POLICIES:
            runs = {run.stage: run for run in results if (run.workload, run.policy) == (name, policy)}
            if not runs:
                continue
            wanted = f"{workload.metric} {'≥' if workload.larger_is_better else '≤'} {workload.stated:g}"
            cells = [_cell(workload, runs.get(stage)) for stage in stages]
            spans = [_span([getattr(run, what) for run in runs.values()]) for what in ("steps", "batch")]
            shares = sorted(round(100 * run.share) for run in runs.values())
            spans.insert(1, f"{shares[0]} to {shares[-1]} %")
            rows.append(f"| {name} | {wanted} | `{policy}` | {' | '.join([*cells, *spans])} |")
    kept = sum(WORKLOADS[run.workload].reached(run.quality) for run in results)
    where = f"{platform.machine()} with {os.cpu_count()} CPUs"
    return "\n".join(
        [
            f"# Every job, stage and policy, {datetime.now(UTC).date()}",
            "",
            f"`python benchmarks/workloads.py`, {WORKERS} workers, fp32, {where}. What is held out, when the",
            "stated quality was reached, or else at the run's end, in bold.",
            "",
            *rows,
            "",
            f"{kept} of {len(results)} runs came to the stated quality.",
        ]
    )


def _cell(workload: Workload, run: Run | None) -> str:
    if run is None:
        return ""
    return f"{run.quality:.4f}" if workload.reached(run.quality) else f"**{run.quality:.4f}**"


def _span(values: list[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


if __name__ == "__main__":
    sys.exit(main())
