"""How fast, small and good each way of writing a trained model is, and what distilling is worth.

    python benchmarks/compression.py --folder FOLDER [--job digits|gpt] [--seeds 5] [--part files|students] [--write]

Trains the job once (the digits ResNet, or the small GPT), compresses it in every way, and prints the table. Then, for
each seed, trains a student of a quarter of the parameters alone and distilled, for as many epochs, and prints both,
their difference and its standard error. Latency is of one sample: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from group import records, train

from orchestrator.cli import app

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Subject:
    """What is made small: a job, its student, for how long that and variants learn, the metrics to show."""

    job: str
    student: tuple[str, ...]
    epochs: float
    metrics: tuple[str, ...]
    variants: float = 0.0
    """Epochs of the pruned and the int8-aware variant; 0: the recipe's."""


SUBJECTS = {
    # After the twelve epochs of the recipe the student is as good as its teacher by itself.
    "digits": Subject("jobs.vision:digits", ("width=16",), 5, ("accuracy",)),
    "gpt": Subject("jobs.language:gpt", ("width=32", "layers=3"), 0.4, ("accuracy", "bits_per_byte"), variants=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where data, runs and files go")
    parser.add_argument("--job", choices=SUBJECTS, default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["files", "students"], help="only one of the two")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-compression-JOB.md")
    given = parser.parse_args()
    folder, subject = Path(given.folder).absolute(), SUBJECTS[given.job]
    common = ["--arg", f"data={folder / given.job}", "--set", f"checkpoint.uri={folder / 'runs'}"]
    common += ["--set", "policy.name=fixed"]
    teacher = command("run", subject.job, *common)
    told = [f"# Making `{subject.job}` small", "", f"{datetime.now(UTC).date()}. {about()}", ""]
    told += [f"`python benchmarks/compression.py {' '.join(sys.argv[1:])}`", ""]
    told += [f"Trained with `fixed`: {_shown(teacher['metrics'], subject)}."]
    print("\n".join(told), flush=True)
    for part, lines in (("files", files), ("students", students)):
        if given.part in (None, part):
            for line in lines(folder, given.job, str(teacher["folder"]), given.seeds):
                print(line, flush=True)
                told.append(line)
    if given.write:
        (RESULTS / f"{datetime.now(UTC).date()}-compression-{given.job}.md").write_text("\n".join(told) + "\n")


def about() -> str:
    """The machine."""
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {cores} cores, Python {platform.python_version()}."


def files(_: Path, name: str, teacher: str, __: int) -> Iterator[str]:
    """Every way to write the run and its pruned and int8-aware variants."""
    subject = SUBJECTS[name]
    found = command("compress", teacher, "--prune", "0.8", "--int8-aware", "--epochs", f"{subject.variants:g}")
    yield ""
    yield f"| model | file | bytes | packed | {' | '.join(subject.metrics)} | median | p99 | samples/s |"
    yield "| --- | --- | " + " | ".join(["---:"] * (5 + len(subject.metrics))) + " |"
    for entry in found["entries"]:
        if entry["problem"]:
            yield f"| {entry['model']} | {entry['path']} | {entry['problem']} |"
            continue
        took = entry["latency"]
        cells = [entry["model"], f"`{entry['path']}`", f"{entry['size_bytes']:,}", f"{entry['packed_bytes']:,}"]
        cells += [f"{entry['metrics'][metric]:.4f}" for metric in subject.metrics]
        cells += [f"{1e3 * took[which]:.4f} ms" for which in ("median_s", "p99_s")]
        yield f"| {' | '.join(cells)} | {took['samples_per_s']:,.0f} |"


def students(folder: Path, name: str, teacher: str, seeds: int) -> Iterator[str]:
    """The same student alone and distilled, for the same number of epochs, over some seeds."""
    subject = SUBJECTS[name]
    runs = [run for seed in range(seeds) for run in _pair(folder, name, teacher, seed)]
    for earlier in [*folder.glob("alone-*"), *folder.glob("taught-*")]:  # of a benchmark that was broken off
        shutil.rmtree(earlier)
    train(runs, folder / "students.json")
    yield ""
    yield f"A student ({', '.join(subject.student)}) for {subject.epochs:g} epochs, alone and distilled:"
    yield ""
    yield f"| seed | {' | '.join(f'{metric}, alone | distilled' for metric in subject.metrics)} |"
    yield "| --- | " + " | ".join(["---:"] * (2 * len(subject.metrics))) + " |"
    ends = [
        {way: records(folder / f"{way}-{seed}" / "evaluations.jsonl")[-1]["metrics"] for way in ("alone", "taught")}
        for seed in range(seeds)
    ]
    for seed, end in enumerate(ends):
        cells = [f"{end[way][metric]:.4f}" for metric in subject.metrics for way in ("alone", "taught")]
        yield f"| {seed} | {' | '.join(cells)} |"
    yield ""
    for metric in subject.metrics:
        gains = [end["taught"][metric] - end["alone"][metric] for end in ends]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        yield f"{metric}: distilled minus alone {statistics.fmean(gains):+.4f} ± {error:.4f} (standard error)."


def _pair(folder: Path, name: str, teacher: str, seed: int) -> list[dict[str, Any]]:
    def overrides(way: str) -> list[str]:
        own = {"name": f"{way}-{seed}", "seed": seed, "policy.name": "fixed", "checkpoint.uri": folder}
        return [f"{field}={value}" for field, value in own.items()]

    subject = SUBJECTS[name]
    length = f"epochs={subject.epochs:g}"
    alone = [f"data={folder / name}", *subject.student, length]
    taught = [f"run={teacher}", f"student={','.join(subject.student)}", length]
    return [
        {"job": subject.job, "args": alone, "overrides": overrides("alone")},
        {"job": "orchestrator.compression.variants:distilled", "args": taught, "overrides": overrides("taught")},
    ]


def _shown(metrics: dict[str, float], subject: Subject) -> str:
    return ", ".join(f"{metric} {metrics[metric]:.4f}" for metric in subject.metrics)


def command(*arguments: str) -> dict:
    """Run one command of the command line in this process and return the object that it ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app([*arguments, "--json"], standalone_mode=False)
    sys.stdout.flush()
    return json.loads(out.getvalue().splitlines()[-1])


if __name__ == "__main__":
    main()
