"""Many runs on one cluster under each fleet policy: a discrete-event simulation over recorded step times.

    python benchmarks/fleet_simulation.py FOLDER                # eight workloads of 160 runs, 64 devices of three types
    python benchmarks/fleet_simulation.py FOLDER --cluster aws             # of one type
    python benchmarks/fleet_simulation.py FOLDER --seeds 1 --timeline F.svg  # a picture of one workload

FOLDER holds steptime.csv (app, cluster, placement, local_bsz, step_time, sync_time: one digit of ``placement`` per
node, its devices) and efficiency.csv (app, batch_size, progress, iteration, metric, grad_sqr, grad_var). The recordings
decide how fast a run goes; a policy sees only models fitted to a few of them, and the noise scale of the moment.

A run arrives, is started, resized, stopped and resumed as the policy says, each time at the cost of a restart, loses
its node now and then, and ends when its progress is complete. The policy is asked every minute, and when a run arrives
or ends or a node is lost or comes back. The batch follows the layout that the policy answers with, under every policy.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.fleet import Allocation, FairPolicy, FifoPolicy, GoodputPolicy, JobView, Policy
from orchestrator.fleet.answer import answer
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.knapsack import Problem, solve
from orchestrator.fleet.placement import Choice, Wish, place
from orchestrator.fleet.rating import options
from orchestrator.fleet.view import Allocations
from orchestrator.fleet.worth import staying
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel, StepTiming, fit_step_time
from orchestrator.scheduling.noise_scale import statistical_efficiency

TICK_S = 60.0
CLUSTERS = {
    "aws": {f"aws-{i:02}": ("aws", 4) for i in range(16)},
    "azure": {f"azure-{i:02}": ("azure", 8) for i in range(8)},
    "dgx": {f"dgx-{i:02}": ("dgx-ext", 8) for i in range(8)},
    "rtx": {f"rtx-{i:02}": ("rtx", 8) for i in range(8)},
    "mixed": {
        **{f"aws-{i:02}": ("aws", 4) for i in range(6)},
        **{f"rtx-{i:02}": ("rtx", 8) for i in range(3)},
        **{f"dgx-{i:02}": ("dgx-ext", 8) for i in range(2)},
    },
}
"""64 devices each; "mixed" as in the evaluation of Sia (SOSP 2023)."""


# -- what was recorded ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One application: its step times by cluster, and its gradient noise by share of the training."""

    name: str
    times: Mapping[str, Mapping[str, Any]]
    """By cluster and placement: micro batches, step times and accumulation times, arrays of one length."""
    batches: tuple[int, int]
    shares: Any
    """Share of the training at which ``noise`` was recorded, rising."""
    noise: Any
    """Noise scale in samples."""

    def step_time_s(self, cluster: str, nodes: int, layout: Layout) -> float:
        """How long a step takes: the recording of that placement, interpolated between micro batches."""
        micro, step, accumulation = self.times[cluster][_placement(nodes, layout.workers)]
        one = float(np.interp(layout.micro_batch, micro, step))
        return one + (layout.accumulation - 1) * float(np.interp(layout.micro_batch, micro, accumulation))

    def goodput(self, cluster: str, nodes: int, layout: Layout, noise_scale: float) -> float:
        """Reference samples per second."""
        worth = statistical_efficiency(noise_scale, self.batches[0], layout.global_batch)
        return layout.global_batch / self.step_time_s(cluster, nodes, layout) * float(worth)

    def micro_range(self, clusters: Sequence[str], most_workers: int) -> tuple[int, int]:
        """Micro batches that were recorded for every size on every cluster."""
        found = [
            times[0]
            for cluster in clusters
            for placement, times in self.times[cluster].items()
            if sum(map(int, placement)) <= most_workers and len(set(placement)) == 1
        ]
        return max(int(micro[0]) for micro in found), min(int(micro[-1]) for micro in found)


def _placement(nodes: int, workers: int) -> str:
    each, rest = divmod(workers, nodes)
    return str(each) * nodes if not rest else "".join(sorted(str(each + (i < rest)) for i in range(nodes)))


def load(folder: Path) -> dict[str, Recorded]:
    """Read a folder of recordings."""
    raw: dict[Any, list[Any]] = defaultdict(list)
    for row in _rows(folder / "steptime.csv"):
        step, sync = float(row["step_time"]), float(row["sync_time"])
        if step > sync and step > 0:
            raw[row["app"], row["cluster"], row["placement"].strip(), int(row["local_bsz"])].append((step, step - sync))
    times: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (app, cluster, placement, micro), values in sorted(raw.items()):
        times[app][cluster][placement].append((micro, *np.mean(values, axis=0)))
    runs: Any = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / "efficiency.csv"):
        values = [float(row[name]) for name in ("progress", "grad_sqr", "grad_var")]
        runs[row["app"]][int(row["batch_size"])].append(values)
    found = {}
    for app, clusters in times.items():
        smallest = min(runs[app])
        progress, square, variance = np.array(runs[app][smallest]).T
        noise = smallest * np.maximum(variance, 1e-6) / np.maximum(square, 1e-12)
        arrays = {c: {p: tuple(np.array(v).T) for p, v in places.items()} for c, places in clusters.items()}
        found[app] = Recorded(app, arrays, (smallest, max(runs[app])), progress / progress[-1], noise)
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        sys.exit(f"{path} is missing: FOLDER must hold steptime.csv and efficiency.csv")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Models:
    """Step-time models as a run would have them, fitted to what it has timed; each is fitted once."""

    def __init__(self, apps: Mapping[str, Recorded]) -> None:
        self.apps = apps
        self._fitted: dict[Any, StepTimeModel] = {}

    def profiled(self, app: str, cluster: str, visited: frozenset[tuple[int, int]]) -> StepTimeModel:
        """From nine timings before the run (one device, two, a full node, two full nodes), and the sizes it ran at."""
        node = 4 if cluster == "aws" else 8
        before = {(1, 1): 3, (1, 2): 2, (1, node): 2, (2, 2 * node): 2}
        counts = before | dict.fromkeys(visited, 3)
        return self._fit(
            app, cluster, tuple((nodes, workers, count) for (nodes, workers), count in sorted(counts.items()))
        )

    def learned(self, app: str, cluster: str, visited: frozenset[tuple[int, int]]) -> StepTimeModel:
        """From the sizes it ran at, three micro batches each."""
        return self._fit(app, cluster, tuple((nodes, workers, 3) for nodes, workers in sorted(visited)))

    def _fit(self, app: str, cluster: str, sizes: tuple[tuple[int, int, int], ...]) -> StepTimeModel:
        key = (app, cluster, sizes)
        if key not in self._fitted:
            self._fitted[key] = fit_step_time(
                timing
                for nodes, workers, count in sizes
                for timing in self._timings(app, cluster, nodes, workers, count)
            )
        return self._fitted[key]

    def _timings(self, app: str, cluster: str, nodes: int, workers: int, count: int) -> list[StepTiming]:
        micro, step, accumulation = self.apps[app].times[cluster][_placement(nodes, workers)]
        picked = np.unique(np.round(np.linspace(0, len(micro) - 1, count)).astype(int))
        return [StepTiming(nodes, workers, float(micro[i]), float(step[i]), float(accumulation[i])) for i in picked]


# -- workloads -----------------------------------------------------------------------------------

LENGTHS = {"ncf": (0.4, 1200.0, 0.8), "cifar10": (0.4, 7200.0, 0.8), "bert": (0.2, 28800.0, 0.8)}
"""Share of the runs; median and spread of the time alone on one device, in s and in the natural logarithm."""
RESTART_COST_S = {"bert": 60.0, "cifar10": 30.0, "ncf": 20.0}
MOST_WORKERS = 16
"""The largest size that was recorded."""


@dataclass(frozen=True)
class Arrival:
    """A run as it is submitted."""

    name: str
    app: str
    at_s: float
    progress: float
    """Reference samples of the whole run."""


def workload(
    apps: Mapping[str, Recorded], cluster: str, seed: int, *, jobs: int, hours: float, lengths: float = 1.0
) -> list[Arrival]:
    """Half of the runs arrive evenly, half in bursts; the time each would take alone on one device is log-normal.

    Lengths are made up (``LENGTHS``); recorded trainings are stretched to them, and once more by ``lengths``. Alone on
    one device 44 % of the runs take less than an hour, 47 % less than ten, 9 % longer; of those of Pollux (OSDI 2021,
    GPU time) 72, 20 and 8 %. The recorded trainings, on "aws", take four minutes (ncf), one hour and four hours.
    """
    chance = np.random.default_rng([seed, 160])
    types = sorted({kind for kind, _ in CLUSTERS[cluster].values()})
    names = sorted(apps)
    shares = np.array([LENGTHS[name][0] for name in names])
    bursts = chance.uniform(0.0, hours * 3600.0, size=5)
    found = []
    for index in range(jobs):
        app = names[int(chance.choice(len(names), p=shares / shares.sum()))]
        _, median_s, spread = LENGTHS[app]
        alone_s = lengths * float(np.clip(chance.lognormal(np.log(median_s), spread), 120.0, 48 * 3600.0))
        even = chance.uniform(0.0, hours * 3600.0)
        burst = bursts[chance.integers(len(bursts))] + chance.exponential(300.0)
        at_s = float(even if chance.uniform() < 0.5 else burst)
        found.append(Arrival(f"{app}-{index:03}", app, at_s, alone_s * _alone(apps[app], types)))
    return sorted(found, key=lambda arrival: (arrival.at_s, arrival.name))


def _alone(app: Recorded, types: Sequence[str]) -> float:
    """Goodput of one device, the mean of the types, at the middle of the training and the best batch."""
    noise = float(np.interp(0.5, app.shares, app.noise))
    low, high = app.micro_range(types, MOST_WORKERS)
    rates = []
    for kind in types:
        layouts = [
            Layout(1, m, a) for m in np.unique(np.geomspace(low, high, 12).astype(int)) for a in (1, 2, 4, 8, 16)
        ]
        allowed = [one for one in layouts if app.batches[0] <= one.global_batch <= app.batches[1]]
        rates.append(max(app.goodput(kind, 1, one, noise) for one in allowed))
    return float(np.mean(rates))


# -- the simulation ------------------------------------------------------------------------------


@dataclass
class Run:
    """A run on its way."""

    arrival: Arrival
    app: Recorded
    micro_range: tuple[int, int]
    progress: float = 0.0
    attained_device_s: float = 0.0
    restarts: int = 0
    here: Allocation | None = None
    ready_s: float = 0.0
    """When its restart is over."""
    rate: float = 0.0
    ended_s: float | None = None
    started_s: float | None = None
    visited: dict[str, frozenset[tuple[int, int]]] = field(default_factory=dict)
    history: list[tuple[float, int]] = field(default_factory=list)
    """When it was given how many devices."""

    @property
    def noise_scale(self) -> float:
        share = self.progress / self.arrival.progress
        return float(np.interp(share, self.app.shares, self.app.noise))

    def goodput(self) -> float:
        """Reference samples per second, now."""
        if self.here is None:
            return 0.0
        return self.app.goodput(
            self.here.device_type, len(self.here.devices_per_node), self.here.layout, self.noise_scale
        )

    def advance(self, start_s: float, end_s: float) -> None:
        """Go on from one moment to the next, at the rate of the first."""
        if self.here is not None:
            self.attained_device_s += self.here.devices * (end_s - start_s)
            self.progress += self.rate * max(0.0, end_s - max(start_s, self.ready_s))

    def ends_s(self, now_s: float) -> float:
        """When it would end at its present rate."""
        if self.rate <= 0.0:
            return float("inf")
        return max(now_s, self.ready_s) + max(0.0, self.arrival.progress - self.progress) / self.rate


@dataclass(frozen=True)
class Settings:
    """What the simulation assumes."""

    cluster: str = "aws"
    jobs: int = 160
    hours: float = 8.0
    lengths: float = 1.0
    """Of all runs, times."""
    restart_costs: float = 1.0
    """Times."""
    learned: bool = False
    """Models only of sizes that a run was at, without the nine timings before it."""
    blind: bool = False
    """Nobody says how much work remains."""
    losses_per_day: float = 12.0
    outage_s: float = 900.0
    checkpoint_s: float = 120.0
    """Progress that a lost node costs."""


@dataclass
class Outcome:
    """What became of a workload."""

    policy: str
    seed: int
    completion_s: list[float]
    waits_s: list[float]
    restarts: int
    makespan_s: float
    used_device_s: float
    decisions: int
    decision_s: float
    histories: list[tuple[str, float, float, list[tuple[float, int]]]]


def simulate(
    apps: Mapping[str, Recorded], models: Models, name: str, policy: Policy, seed: int, s: Settings
) -> Outcome:
    """One workload under one policy, to the end of its last run."""
    return Simulation(apps, models, policy, seed, s).run(name)


class Simulation:
    """The cluster, its runs and the clock."""

    def __init__(self, apps: Mapping[str, Recorded], models: Models, policy: Policy, seed: int, s: Settings) -> None:
        self.apps, self.models, self.policy, self.seed, self.s = apps, models, policy, seed, s
        self.nodes = dict(CLUSTERS[s.cluster])
        self.types = sorted({kind for kind, _ in self.nodes.values()})
        self.now_s = 0.0
        self.active: list[Run] = []
        self.finished: list[Run] = []
        self.events: list[tuple[float, int, str, Any]] = []
        self.numbers = itertools.count()
        self.decisions, self.decision_s = 0, 0.0
        for arrival in workload(apps, s.cluster, seed, jobs=s.jobs, hours=s.hours, lengths=s.lengths):
            self._at(arrival.at_s, "arrival", arrival)
        self._schedule_losses()

    def _at(self, at_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (at_s, next(self.numbers), kind, what))

    def _schedule_losses(self) -> None:
        chance = np.random.default_rng([self.seed, 7])
        at_s = 0.0
        while self.s.losses_per_day and at_s < 2 * 86400.0:
            at_s += float(chance.exponential(86400.0 / self.s.losses_per_day))
            name = sorted(self.nodes)[int(chance.integers(len(self.nodes)))]
            self._at(at_s, "loss", (name, self.nodes[name]))
            self._at(at_s + self.s.outage_s, "back", (name, self.nodes[name]))

    def run(self, name: str) -> Outcome:
        """To the end."""
        left = self.s.jobs
        while left:
            self._decide()
            until_s = min(self.now_s + TICK_S, min((run.ends_s(self.now_s) for run in self.active), default=np.inf))
            if not self.active:
                until_s = self.events[0][0]
            until_s = min(until_s, self.events[0][0]) if self.events else until_s
            for run in self.active:
                run.advance(self.now_s, until_s)
            self.now_s = until_s
            left -= self._collect()
            while self.events and self.events[0][0] <= self.now_s:
                self._happen(*heapq.heappop(self.events)[2:])
        return self._outcome(name)

    def _collect(self) -> int:
        ended = [run for run in self.active if run.progress >= run.arrival.progress * (1.0 - 1e-9)]
        for run in ended:
            run.ended_s = self.now_s
            run.history.append((self.now_s, 0))
            self.active.remove(run)
            self.finished.append(run)
        return len(ended)

    def _happen(self, kind: str, what: Any) -> None:
        match kind:
            case "arrival":
                app = self.apps[what.app]
                self.active.append(Run(what, app, app.micro_range(self.types, MOST_WORKERS)))
            case "loss":
                self.nodes.pop(what[0], None)
                for run in self.active:
                    if run.here is not None and what[0] in run.here.devices_per_node:
                        run.progress = max(0.0, run.progress - run.rate * self.s.checkpoint_s)
                        self._put(run, None)
            case "back":
                self.nodes[what[0]] = what[1]

    def _decide(self) -> None:
        views = [self._view(run) for run in self.active]
        began = time.perf_counter()
        answers = self.policy.allocate(views, self.nodes, self.now_s)
        self.decision_s += time.perf_counter() - began
        self.decisions += 1
        for run in self.active:
            self._put(run, answers[run.arrival.name])
        self._check()

    def _put(self, run: Run, there: Allocation | None) -> None:
        here = run.here
        same = here is not None and there is not None and dict(here.devices_per_node) == dict(there.devices_per_node)
        if not same and (here is not None or there is not None):
            run.history.append((self.now_s, 0 if there is None else there.devices))
        if there is not None and not same:
            run.restarts += run.started_s is not None
            run.started_s = self.now_s if run.started_s is None else run.started_s
            run.ready_s = self.now_s + self._restart_cost_s(run)
        run.here = there
        run.rate = run.goodput()
        if same and there is not None and self.now_s - run.ready_s >= TICK_S / 2:
            size = (len(there.devices_per_node), there.devices)
            run.visited[there.device_type] = run.visited.get(there.device_type, frozenset()) | {size}

    def _restart_cost_s(self, run: Run) -> float:
        return RESTART_COST_S[run.app.name] * self.s.restart_costs

    def _check(self) -> None:
        used: dict[str, int] = defaultdict(int)
        for run in self.active:
            for name, count in (run.here.devices_per_node if run.here else {}).items():
                used[name] += count
        assert all(count <= self.nodes[name][1] for name, count in used.items()), "over capacity"

    def _view(self, run: Run) -> JobView:
        name = run.app.name
        if self.s.learned:
            known = {kind: self.models.learned(name, kind, seen) for kind, seen in run.visited.items()} or None
        else:
            known = {kind: self.models.profiled(name, kind, run.visited.get(kind, frozenset())) for kind in self.types}
        return JobView(
            name=run.arrival.name,
            submitted_s=run.arrival.at_s,
            age_s=self.now_s - run.arrival.at_s,
            attained_device_s=run.attained_device_s,
            restarts=run.restarts,
            restart_cost_s=self._restart_cost_s(run),
            progress=run.progress,
            remaining_progress=None if self.s.blind else max(run.arrival.progress - run.progress, 0.0),
            step_time=known,
            noise_scale=run.noise_scale if run.progress or not self.s.learned else None,
            reference_batch=run.app.batches[0],
            batch_range=run.app.batches,
            micro_batch_range=run.micro_range,
            workers_range=(1, MOST_WORKERS),
            current=run.here,
        )

    def _outcome(self, name: str) -> Outcome:
        runs = sorted(self.finished, key=lambda run: (run.arrival.at_s, run.arrival.name))
        return Outcome(
            policy=name,
            seed=self.seed,
            completion_s=[(run.ended_s or 0.0) - run.arrival.at_s for run in runs],
            waits_s=[(run.started_s or 0.0) - run.arrival.at_s for run in runs],
            restarts=sum(run.restarts for run in runs),
            makespan_s=self.now_s,
            used_device_s=sum(run.attained_device_s for run in runs),
            decisions=self.decisions,
            decision_s=self.decision_s,
            histories=[(run.app.name, run.arrival.at_s, run.ended_s or 0.0, run.history) for run in runs],
        )


# -- the policy to beat --------------------------------------------------------------------------


@dataclass(frozen=True)
class SiaPolicy:
    """Sia as published (Jayaram Subramanya et al., SOSP 2023, section 3.4), over the same options and places.

    Minimise the sum of ``(r G) ** p`` with p = -1/2 over the runs that run, and 1.1 for each that does not; G is
    goodput over that of the run's slowest option, r = (age - restarts x cost) / (age + cost) for every option but the
    current one.
    """

    power: float = -0.5
    waiting: float = 1.1

    def allocate(self, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]], now_s: float) -> Allocations:  # noqa: ARG002
        """Solve, place."""
        fleet = Fleet.of(jobs, nodes)
        rated = options(fleet)
        stays = staying(fleet, rated)
        slowest = np.full(len(fleet.jobs), np.inf)
        np.minimum.at(slowest, rated.owner, rated.goodput)
        factor = np.array(
            [
                max((j.age_s - j.restarts * j.restart_cost_s) / (j.age_s + j.restart_cost_s + 1e-9), 0.01)
                for j in fleet.jobs
            ]
        )
        running = np.array([here is not None for here in fleet.current], bool)
        moved = running[rated.owner] & (stays[rated.owner] != np.arange(len(rated.owner)))
        ratio = rated.goodput / slowest[rated.owner] * np.where(moved, factor[rated.owner], 1.0)
        value = self.waiting - ratio**self.power
        zero = np.zeros(len(fleet.jobs))
        picked = solve(
            Problem(
                rated.owner, rated.devices, rated.kind, value, zero, np.array(fleet.capacity),
                np.full(len(fleet.jobs), -1), np.zeros(0, np.intp),
            )
        )  # fmt: skip
        wishes = []
        for job in np.flatnonzero(picked >= 0):
            row, stay = int(picked[job]), int(stays[job])
            rows = [row, *(r for r in rated.of(int(job)) if rated.kind[r] == rated.kind[row] and r < row)]
            here = fleet.current[job]
            choices = tuple(Choice(int(rated.kind[r]), int(rated.devices[r]), float(value[r]), r) for r in rows)
            where = None if here is None or stay < 0 else here.devices_per_node
            wishes.append(Wish(int(job), choices, 0.0, where, rows.index(stay) if stay in rows else -1, 0.05))
        return answer(fleet, rated, place(fleet, wishes), {}, {})


POLICIES: dict[str, Callable[[], Policy]] = {
    "fifo": FifoPolicy,
    "fair": FairPolicy,
    "sia": SiaPolicy,
    "goodput": GoodputPolicy,
}


# -- what is told --------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one line for each policy, means over the workloads."""
    lines = [
        "| policy | mean completion, s | p50 | p99 | first wait, s | restarts a run | device-hours | last end, h |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(one.policy for one in outcomes):
        mine = [one for one in outcomes if one.policy == name]
        numbers = np.mean([_numbers(one) for one in mine], axis=0)
        mean, p50, p99, wait, restarts, used, last = numbers
        first = f"| `{name}` | {mean:,.0f} | {p50:,.0f} | {p99:,.0f} | {wait:,.0f} "
        lines.append(f"{first}| {restarts:.1f} | {used:,.0f} | {last:.1f} |")
    return "\n".join(lines)


def _numbers(one: Outcome) -> list[float]:
    done = np.array(one.completion_s)
    return [
        float(done.mean()),
        *(float(np.quantile(done, q)) for q in (0.5, 0.99)),
        float(np.mean(one.waits_s)),
        one.restarts / len(done),
        one.used_device_s / 3600.0,
        one.makespan_s / 3600.0,
    ]


def by_workload(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one line for each workload, mean completion and its 99th percentile under each policy."""
    names = list(dict.fromkeys(one.policy for one in outcomes))
    heads = [f"{name} {what}" for what in ("mean", "p99") for name in names]
    lines = [f"| workload | {' | '.join(heads)} |", f"| ---: |{' ---: |' * len(heads)}"]
    for seed in sorted({one.seed for one in outcomes}):
        found = {one.policy: _numbers(one) for one in outcomes if one.seed == seed}
        cells = [f"{found[name][index]:,.0f}" for index in (0, 2) for name in names]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


SHADES = {1: "#c6dbef", 2: "#9ecae1", 4: "#4292c6", 8: "#2171b5", 16: "#08306b"}
ROW, WIDTH, TOP, GAP = 1.8, 900, 40, 34


def timeline(outcomes: Sequence[Outcome]) -> str:
    """SVG: for each policy a panel with a line for each run, from its arrival to its end, darker with more devices."""
    end_s = max(end for one in outcomes for _, _, end, _ in one.histories)
    panel = ROW * max(len(one.histories) for one in outcomes)
    height = TOP + len(outcomes) * (panel + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 60} {height:.0f}">',
        "<style>text {font: 12px sans-serif; fill: #333}</style>",
        f'<rect width="{WIDTH + 60}" height="{height:.0f}" fill="#fff"/>',
        *_legend(),
    ]
    for index, one in enumerate(outcomes):
        top = TOP + index * (panel + GAP) + 16
        mean = np.mean(one.completion_s) / 60.0
        parts.append(f'<text x="30" y="{top - 4:.1f}">{one.policy}: mean completion {mean:.0f} min</text>')
        parts += _panel(one, top, end_s)
        parts += _hours(top + panel, end_s)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    parts = [f'<rect x="30" y="12" width="18" height="10" fill="{WAITING}"/><text x="52" y="21">waits</text>']
    for index, (devices, shade) in enumerate(SHADES.items()):
        x = 120 + 70 * index
        parts.append(f'<rect x="{x}" y="12" width="18" height="10" fill="{shade}"/>')
        parts.append(f'<text x="{x + 22}" y="21">{devices}</text>')
    parts.append(f'<text x="{120 + 70 * len(SHADES)}" y="21">devices; one line for each run, by arrival</text>')
    return parts


WAITING = "#f3c9a5"


def _panel(one: Outcome, top: float, end_s: float) -> list[str]:
    """One path for each shade: a dash for each stretch of time."""
    dashes: dict[str, list[str]] = defaultdict(list)
    for row, (_, arrived_s, ended_s, history) in enumerate(one.histories):
        moments = [(arrived_s, 0), *history]
        for (start, devices), (stop, _) in zip(moments, [*moments[1:], (ended_s, 0)], strict=True):
            shade = WAITING if devices == 0 else SHADES[max(size for size in SHADES if size <= devices)]
            x, width = 30 + WIDTH * start / end_s, WIDTH * (stop - start) / end_s
            if width > 0.05:
                dashes[shade].append(f"M{x:.1f} {top + ROW * (row + 0.5):.1f}h{width:.1f}")
    return [
        f'<path stroke="{shade}" stroke-width="{ROW * 0.9}" d="{"".join(d)}"/>' for shade, d in sorted(dashes.items())
    ]


def _hours(y: float, end_s: float) -> list[str]:
    hours = range(0, int(end_s / 3600.0) + 1, 2)
    return [
        f'<text x="{30 + WIDTH * 3600.0 * hour / end_s:.1f}" y="{y + 12:.1f}" text-anchor="middle">{hour} h</text>'
        for hour in hours
    ]


def main() -> int:
    """Simulate and print; the exit code says only whether it ran."""
    parser = argparse.ArgumentParser(description="Fleet policies over recorded step times.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cluster", choices=CLUSTERS, default="mixed")
    parser.add_argument("--seeds", type=int, default=8, help="workloads")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=160)
    parser.add_argument("--hours", type=float, default=8.0, help="over which they arrive")
    parser.add_argument("--lengths", type=float, default=1.0, help="times those of the workloads")
    parser.add_argument("--restart-costs", type=float, default=1.0, help="times those of the applications")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma separated")
    parser.add_argument("--learned", action="store_true", help="no model before a size has been run")
    parser.add_argument("--blind", action="store_true", help="remaining work is not known")
    parser.add_argument("--timeline", type=Path, help="write a picture of the first workload")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    settings = Settings(
        cluster=asked.cluster,
        jobs=asked.jobs,
        hours=asked.hours,
        lengths=asked.lengths,
        restart_costs=asked.restart_costs,
        learned=asked.learned,
        blind=asked.blind,
    )
    apps = load(asked.folder)
    models, outcomes = Models(apps), []
    for seed in range(asked.first, asked.first + asked.seeds):
        for name in asked.policies.split(","):
            began = time.perf_counter()
            outcomes.append(simulate(apps, models, name, POLICIES[name](), seed, settings))
            print(f"workload {seed}, {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if asked.timeline:
        asked.timeline.write_text(timeline([one for one in outcomes if one.seed == asked.first]), encoding="utf-8")
    if asked.json:
        print(json.dumps([{"policy": one.policy, "seed": one.seed, "numbers": _numbers(one)} for one in outcomes]))
    else:
        print(f"{settings}\n\n{table(outcomes)}\n\n{by_workload(outcomes)}")
        mean_ms = 1e3 * sum(one.decision_s for one in outcomes) / sum(one.decisions for one in outcomes)
        print(f"\nA decision took {mean_ms:.1f} ms in the mean.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
