"""How fast and how small each way of writing a trained model is, and what distilling is worth: the digits ResNet.

    python benchmarks/compression.py --folder FOLDER [--seeds 5] [--part files|students]

Trains the digits once, compresses it in every way, and prints the table. Then, for each seed, trains a student of a
quarter of the parameters alone and distilled, for as many epochs, and prints both, their difference and its standard
error. All students' runs share one cluster. Latency is of one sample: run it on a quiet machine.
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

from orchestrator.cli import app
from orchestrator.launching.cluster import RayCluster

EPOCHS = 12
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
        with RayCluster.connect(None, log=folder / "ray.log"):
            students(folder, common, str(teacher["folder"]), given.seeds)


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


def students(folder: Path, common: list[str], teacher: str, seeds: int) -> None:
    """The same student alone and distilled, for the same number of epochs, over some seeds."""
    pairs = []
    for seed in range(seeds):
        fixed = ["--set", f"seed={seed}", "--set", "policy.name=fixed", "--address", "auto"]
        alone = [*common, *fixed, "--arg", STUDENT, "--arg", f"epochs={EPOCHS}", "--set", f"name=alone-{seed}"]
        taught = [*fixed, "--set", f"checkpoint.uri={folder / 'runs'}", "--set", f"name=taught-{seed}"]
        taught += ["--arg", f"run={teacher}", "--arg", f"student={STUDENT}", "--arg", f"epochs={EPOCHS}"]
        results = [
            command("run", "jobs.vision:digits", *alone),
            command("run", "orchestrator.compression.variants:distilled", *taught),
        ]
        pairs.append([result["metrics"]["accuracy"] for result in results])
        print(f"seed {seed}: alone {pairs[-1][0]:.4f}, distilled {pairs[-1][1]:.4f}", flush=True)
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    gains = [taught - alone for alone, taught in pairs]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    print(f"mean of {seeds}: alone {means[0]:.4f}, distilled {means[1]:.4f}")
    print(f"distilled is better by {statistics.fmean(gains):.4f} +- {error:.4f} (standard error)")


def command(*arguments: str) -> dict:
    """Run one command of the command line in this process and return the object that it ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app([*arguments, "--json"], standalone_mode=False)
    sys.stdout.flush()
    return json.loads(out.getvalue().splitlines()[-1])


if __name__ == "__main__":
    main()
