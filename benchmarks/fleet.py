"""Three runs that share a real cluster, against the same runs first come, first served.

    python -m benchmarks.fleet            # both sides, about ten minutes
    python -m benchmarks.fleet --write    # the result into benchmarks/results/

A Ray cluster of three nodes is started on this machine: a head without CPUs and two nodes of ``--cpus`` each. Runs
arrive ``--every`` seconds apart, each through the command line as a user would start it. **first come, first served**:
each run takes all devices, and the next waits for its end (policy ``fifo``, ``scale.workers`` the whole cluster).
**goodput**: each takes what the fleet gives it (policy ``goodput``, from 1 worker to the whole cluster).

Each worker waits 1 ms for each sample, as it would for its accelerator (``benchmarks.fleet_jobs``), so that steps get
shorter with more workers as they do on devices, whatever CPUs this machine has. Compared is the time from the first
arrival to the last end, and that the loss of every step is the same on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIDES = ("fifo", "goodput")
TITLES = {"fifo": "first come, first served", "goodput": "goodput"}
TOKEN = "benchmark-of-a-fleet-0123456789"


def main() -> int:
    """Run the benchmark; the exit code says only whether all runs ended well."""
    parser = argparse.ArgumentParser(description="Three runs that share a cluster, against first come, first served.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--every", type=float, default=20.0, metavar="S")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--cpus", type=int, default=2, help="of each of the two nodes")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-fleet.md")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        for side in SIDES:
            found[side] = _measured(side, Path(folder) / side, options)
    text = report(found, options)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-fleet.md").write_text(text + "\n")
    return 0


def _measured(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one side on a cluster of their own; their records, and when each began and ended."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster  # which reads them when it is imported

    folder.mkdir(parents=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=options.cpus)
        started = time.time()
        processes = []
        for number in range(options.runs):
            time.sleep(max(0.0, started + number * options.every - time.time()))
            processes.append(_start(side, number, folder, cluster.address, options))
        summaries = [_ended(process, folder / f"run-{n}.log") for n, process in enumerate(processes)]
    finally:
        cluster.shutdown()
    return {
        "seconds": time.time() - started,
        "ends_s": [
            _records(folder / "runs" / f"run-{n}", "attempts")[-1]["time"] - started for n in range(options.runs)
        ],
        "losses": [
            [step["loss"] for step in _records(folder / "runs" / f"run-{n}", "metrics")] for n in range(options.runs)
        ],
        "workers": [
            [
                len(one["nodes"])
                for one in _records(folder / "runs" / f"run-{n}", "attempts")
                if one["event"] == "started"
            ]
            for n in range(options.runs)
        ],
        "accuracy": [summary["metrics"]["accuracy"] for summary in summaries],
    }


def _start(side: str, number: int, folder: Path, address: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    most = 2 * options.cpus
    workers = str(most) if side == "fifo" else f"1,{most}"
    settings = {
        "name": f"run-{number}",
        "policy.name": "fixed",
        "fleet.queue": "team",
        "fleet.policy": side,
        "scale.workers": workers,
    }
    words = [word for field, value in settings.items() for word in ("--set", f"{field}={value}")]
    command = [sys.executable, "-m", "orchestrator", "run", "benchmarks.fleet_jobs:waiting", "--address", address]
    with (folder / f"run-{number}.log").open("w") as log:
        return subprocess.Popen(
            [*command, "--arg", f"epochs={options.epochs}", *words, "--json"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def _ended(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(log.read_text())
    summary: dict[str, Any] = json.loads(out)
    return summary


def _records(run: Path, table: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{table}.jsonl").read_text().splitlines()]


def report(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    apart = max(
        abs(one - other)
        for left, right in zip(found["fifo"]["losses"], found["goodput"]["losses"], strict=True)
        for one, other in zip(left, right, strict=True)
    )
    faster = 1.0 - found["goodput"]["seconds"] / found["fifo"]["seconds"]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    setting = (
        f"{datetime.now(UTC).date()}, {machine}; a head and two nodes of {options.cpus} workers on one machine; "
        f"{options.runs} runs of {options.epochs} epochs, {options.every:g} s apart; each worker waits 1 ms for each "
        f"sample. `{Path(__file__).name}` says how."
    )
    lines = [
        "# A shared cluster, against first come, first served",
        "",
        setting,
        "",
        "| | all done | mean time to a run's end | workers of each run, attempt by attempt | accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        one = found[side]
        took = [end - number * options.every for number, end in enumerate(one["ends_s"])]
        workers = "; ".join(", ".join(map(str, each)) for each in one["workers"])
        accuracy = ", ".join(f"{value:.4f}" for value in one["accuracy"])
        lines.append(
            f"| {TITLES[side]} | {one['seconds']:.0f} s | {sum(took) / len(took):.0f} s | {workers} | {accuracy} |"
        )
    lines += [
        "",
        f"With goodput all are done {faster:.0%} sooner. Losses of a run's same step differ by {apart:.1e} at most.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
