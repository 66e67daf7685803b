"""How long a fleet policy takes to decide, in processor time of the one core that it uses.

    python benchmarks/fleet_decisions.py

Made-up runs: step times of one to eight times the speed, with a network cost of each; noise scales, ranges of workers
and remaining work drawn over two decades. A first decision places most of them; an hour later it is asked again, with
those running where it put them, the rest waiting, half of these beyond their longest wait, and a node lost. Wanted:
under 0.2 s for 200 runs on 1,024 devices of one type, under 2 s for 1,000 on 8,192 of four.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import replace

import numpy as np

from orchestrator.fleet import POLICIES, JobView, make_policy
from orchestrator.planning.step_time import StepTimeModel

HOUR_S = 3600.0
SIZES = ((200, {"a": (128, 8)}, 0.2), (1000, dict.fromkeys("abcd", (256, 8)), 2.0))
"""Runs; nodes of each type and devices on each; what is wanted, in s."""
FIRST = 0.7
"""The share of the runs that are there for the first decision."""


def run(name: str, random: np.random.Generator, kinds: list[str], *, at_s: float) -> JobView:
    """A run that was submitted at ``at_s``."""
    models: dict[str, StepTimeModel | None] = {}
    for kind in kinds:
        network_s, speed = 10 ** random.uniform(-3, -1), 2 ** random.uniform(0, 3)
        shares = (network_s / 2, network_s, network_s / 8, 2 * network_s, 4 * network_s)
        seconds = (0.02 / speed, 0.002 / speed, *shares, 0.001)
        models[kind] = StepTimeModel((*(float(np.log(value)) for value in seconds), 0.0))
    low = int(random.choice([1, 1, 1, 2, 4, 8]))
    return JobView(
        name,
        submitted_s=at_s,
        age_s=0.0,
        attained_device_s=0.0,
        restarts=0,
        restart_cost_s=float(random.uniform(20, 60)),
        progress=0.0,
        remaining_progress=float(10 ** random.uniform(5, 7)),
        step_time=models,
        noise_scale=float(10 ** random.uniform(2, 4)),
        reference_batch=64,
        batch_range=(64, 4096),
        micro_batch_range=(4, 256),
        workers_range=(low, low * int(random.choice([1, 4, 16]))),
        priority=int(random.choice([0, 0, 0, 1])),
    )


def seconds(name: str, count: int, nodes: dict[str, tuple[int, int]], seed: int) -> float:
    """Of processor time that the second decision took."""
    random, policy = np.random.default_rng(seed), make_policy(name)
    cluster = {f"{kind}-{n:04d}": (kind, each) for kind, (many, each) in nodes.items() for n in range(many)}
    first = [run(f"run-{n}", random, sorted(nodes), at_s=0.0) for n in range(int(FIRST * count))]
    placed = policy.allocate(first, cluster, 0.0)
    jobs = []
    for view in first:
        current = placed[view.name]
        had_s = 0.0 if current is None else HOUR_S * current.devices
        jobs.append(replace(view, age_s=HOUR_S, attained_device_s=had_s, current=current))
    for n in range(len(first), count):
        age_s = float(random.uniform(0.0, HOUR_S))
        jobs.append(replace(run(f"run-{n}", random, sorted(nodes), at_s=HOUR_S - age_s), age_s=age_s))
    del cluster[min(cluster)]
    began = time.process_time()
    policy.allocate(jobs, cluster, HOUR_S)
    return time.process_time() - began


def main() -> int:
    """Print the table; the exit code is 1 where a decision took longer than is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, numpy {np.__version__}\n")
    print("| policy | runs | devices | types | median s | longest s | wanted |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    late = False
    for name in POLICIES:
        for count, nodes, wanted_s in SIZES:
            took = [seconds(name, count, nodes, seed) for seed in range(given.seeds)]
            devices = sum(many * each for many, each in nodes.values())
            row = f"{count:,} | {devices:,} | {len(nodes)} | {statistics.median(took):.3f} | {max(took):.3f}"
            print(f"| {name} | {row} | {wanted_s:g} |", flush=True)
            late = late or max(took) > wanted_s
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
