"""How fast and how small each way of writing a trained model is, and what distilling is worth: the digits ResNet.

    python benchmarks/compression.py --folder FOLDER [--seeds 5] [--part files|students]

Trains the digits once, compresses it in every way, and prints the table. Then, for each seed, trains a student of a
quarter of the parameters alone and distilled, for as many epochs, and prints both, their difference and its standard
error. Latency is of one sample: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from group import records, train

from orchestrator.cli import app

EPOCHS = 5
"""Of a student: after the twelve of the recipe it is as good as its teacher by itself."""
STUDENT = "width=16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["files", "students"], help="only one of the two")
    given = parser.parse_args()
    folder = Path(given.folder).absolute()
    common = ["--arg", f"data={folder / 'digits'}", "--set", f"checkpoint.uri={folder / 'runs'}"]
    teacher = command("run", "jobs.vision:digits", *common)
    print(f"{platform.machine()}, Python {platform.python_version()}; teacher {teacher['metrics']}", flush=True)
    if given.part != "students":
        files(str(teacher["folder"]))
    if given.part != "files":
        students(folder, str(teacher["folder"]), given.seeds)


def files(teacher: str) -> None:
    """Every way to write the run and its pruned and int8-aware variants."""
    found = command("compress", teacher, "--prune", "0.8", "--int8-aware")
    for entry in found["entries"]:
        if entry["problem"]:
            print(entry["model"], entry["path"], entry["problem"])
            continue
        took, accuracy = entry["latency"], entry["metrics"]["accuracy"]
        sizes = f"{entry['size_bytes']:>9,} B  packed {entry['packed_bytes']:>9,} B"
        times = f"median {1e3 * took['median_s']:.4f} ms  p99 {1e3 * took['p99_s']:.4f} ms"
        rate = f"{took['samples_per_s']:,.0f} samples/s"
        print(f"{entry['model']:<20} {entry['path']:<24} {sizes}  accuracy {accuracy:.4f}  {times}  {rate}")


def students(folder: Path, teacher: str, seeds: int) -> None:
    """The same student alone and distilled, for the same number of epochs, over some seeds."""
    runs = [run for seed in range(seeds) for run in _pair(folder, teacher, seed)]
    train(runs, folder / "students.json")
    pairs = []
    for seed in range(seeds):
        ends = [records(folder / f"{name}-{seed}" / "evaluations.jsonl")[-1] for name in ("alone", "taught")]
        pairs.append([end["metrics"]["accuracy"] for end in ends])
        print(f"seed {seed}: alone {pairs[-1][0]:.4f}, distilled {pairs[-1][1]:.4f}", flush=True)
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    gains = [taught - alone for alone, taught in pairs]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    print(f"mean of {seeds}: alone {means[0]:.4f}, distilled {means[1]:.4f}")
    print(f"distilled is better by {statistics.fmean(gains):.4f} +- {error:.4f} (standard error)")


def _pair(folder: Path, teacher: str, seed: int) -> list[dict[str, Any]]:
    def overrides(name: str) -> list[str]:
        own = {"name": f"{name}-{seed}", "seed": seed, "policy.name": "fixed", "checkpoint.uri": folder}
        return [f"{field}={value}" for field, value in own.items()]

    length = f"epochs={EPOCHS}"
    alone = [f"data={folder / 'digits'}", STUDENT, length]
    taught = [f"run={teacher}", f"student={STUDENT}", length]
    return [
        {"job": "jobs.vision:digits", "args": alone, "overrides": overrides("alone")},
        {"job": "orchestrator.compression.variants:distilled", "args": taught, "overrides": overrides("taught")},
    ]


def command(*arguments: str) -> dict:
    """Run one command of the command line in this process and return the object that it ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app([*arguments, "--json"], standalone_mode=False)
    sys.stdout.flush()
    return json.loads(out.getvalue().splitlines()[-1])


if __name__ == "__main__":
    main()
