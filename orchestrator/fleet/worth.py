"""What each size is worth to a run, in numbers that can be added up over runs.

1. **Speed.** A run's speed on an option is its goodput there over its goodput on one device (the mean of the types, by
   their devices). Its remaining work in device-seconds is what remains of its progress over that one device's goodput.
   Where the remaining work is not known, a run is expected to need ``AGAIN`` times what it has had (a share of that is
   what Pareto distributed lengths imply), and ``NEWCOMER_S`` more, in coarse classes.
2. **Weight.** What a second's work on a run on one device saves all runs together, in seconds: the run itself ends
   ``1 / highest speed`` earlier, and each run that is to end later by ``1 / devices of the cluster``, where all devices
   come free that much earlier. It is the derivative of the sum of completion times by the remaining work of a run, if
   runs were to go on shortest first (for linear speed: of shortest remaining time first). Assumed, not proved.
3. **The last ones.** To the sum of completion times the highest one is added, ``LATEST`` times, as the norm of the
   power 5 does: a run's own end counts more by ``LATEST x (its end / the latest end) ** 4``, ends counted from
   submission. Of fewer than ``CROWD`` runs the last one is one among others, and counts in proportion.
4. **Value.** Weight x speed. Waiting is worth 0.
5. **A move must earn its cost.** A running run that changes stands still for its restart: its speed counts ``T / (T +
   cost)``, T the time for which the change will matter: what it still needs, at most ``HORIZON_S``; and less by
   ``RELUCTANCE``, since the next arrival or end may want it back. Stopping it costs a restart at what it has.
6. **Priorities** double the weight for each point. **Deadlines** give a bonus to the options that still meet them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.rating import Options

__all__ = ["Worth", "staying", "worth"]

Array = NDArray[np.float64]
Index = NDArray[np.intp]

LATEST = 1.5
"""Chosen: 1 more costs 2 % of the mean and takes 6 % off the 99th percentile, in simulations."""
LATEST_POWER = 4.0
CROWD = 10
NEWCOMER_S = 300.0
AGAIN = 0.5
CLASS = 4.0
"""Expected work is rounded to powers of this: with each second counted, runs would overtake each other all the time."""
HORIZON_S = 1800.0
"""Assumption: for how long an allocation typically stays as it is."""
RELUCTANCE = 0.1
"""Assumption: what a move must promise beyond its cost."""
DEADLINE_BONUS = 4.0
"""In units of all weights together: a deadline that can be met goes before everything but who has waited longest."""
NOTICE_S = 120.0
"""A run that waits is not late yet if it meets its deadline from this time on."""
STEEPEST = 40
"""Priorities beyond +-40 are taken as that: 2 ** 40 is more than any number of runs."""


@dataclass(frozen=True)
class Worth:
    """Values [rows] of a fleet's options, and [jobs] of waiting and moving."""

    value: Array
    idle: Array
    """Of taking no option: 0, or what stopping would lose."""
    stays: Index
    """The row that leaves a run where it is; -1 for one that waits or cannot stay."""
    moving: Array
    """What a run loses by going elsewhere at the same size."""
    speed: Array
    """[rows], in devices."""
    left_s: Array
    """[rows], to the end; expected, where the remaining work is not known."""


def worth(fleet: Fleet, rated: Options, now_s: float) -> Worth:
    """Judge every option of a fleet."""
    jobs = fleet.jobs
    base = _one_device(fleet, rated)
    speed = rated.goodput / base[rated.owner]
    work = _remaining_device_s(fleet, rated, base)
    highest = np.zeros(len(jobs))
    np.maximum.at(highest, rated.owner, speed)
    highest[highest == 0.0] = 1.0  # no option at all
    left_s = work[rated.owner] / speed
    weight = _weights(fleet, work / highest, highest)
    stays = staying(fleet, rated)
    cost = np.array([max(job.restart_cost_s, 0.0) for job in jobs])
    running = np.array([here is not None for here in fleet.current], bool)
    matters_s = np.minimum(left_s, HORIZON_S)
    moves = running[rated.owner] & (stays[rated.owner] != np.arange(len(speed)))
    kept = np.where(moves, (1.0 - RELUCTANCE) * matters_s / (matters_s + cost[rated.owner] + 1e-9), 1.0)
    value = weight[rated.owner] * speed * kept
    idle, moving = np.zeros(len(jobs)), np.zeros(len(jobs))
    here = stays >= 0
    row = stays[here]
    moving[here] = value[row] * cost[here] / (matters_s[row] + cost[here] + 1e-9)
    idle[here] = -moving[here]
    bonus, idle_bonus = _deadlines(fleet, rated, left_s + np.where(moves, cost[rated.owner], 0.0), now_s)
    everything = DEADLINE_BONUS * float((weight * highest).sum())
    return Worth(value + everything * bonus, idle + everything * idle_bonus, stays, moving, speed, left_s)


def _one_device(fleet: Fleet, rated: Options) -> Array:
    """Goodput of one device of each job: that of its smallest size per device, mean over the types' devices."""
    total, count = np.full(len(fleet.jobs), 1e-300), np.full(len(fleet.jobs), 1e-300)
    key = rated.owner * max(len(fleet.types), 1) + rated.kind
    first = np.unique(key, return_index=True)[1]
    share = np.array(fleet.capacity, float)[rated.kind[first]]
    np.add.at(total, rated.owner[first], share * rated.goodput[first] / rated.devices[first])
    np.add.at(count, rated.owner[first], share)
    return np.asarray(total / count)


def _remaining_device_s(fleet: Fleet, rated: Options, base: Array) -> Array:
    """Work that each job still needs, in seconds on one device; at least a second."""
    found = np.empty(len(fleet.jobs))
    for index, job in enumerate(fleet.jobs):
        timed = bool(rated.timed[index]) and rated.starts[index] < rated.starts[index + 1]
        done = job.progress / base[index] if timed else job.attained_device_s
        if job.remaining_progress is None:
            found[index] = CLASS ** np.round(np.log(AGAIN * done + NEWCOMER_S) / np.log(CLASS))
        elif timed:
            found[index] = job.remaining_progress / base[index]
        elif job.progress > 0.0 and job.attained_device_s > 0.0:
            found[index] = job.remaining_progress * job.attained_device_s / job.progress
        else:
            found[index] = NEWCOMER_S
    return np.maximum(found, 1.0)


def _weights(fleet: Fleet, left_s: Array, highest: Array) -> Array:
    """Items 2 and 3, times the priority; ``left_s`` at the highest speed. Of equals the first is the heavier."""
    jobs = fleet.jobs
    order = np.lexsort((-np.arange(len(jobs)), -left_s))
    later = np.empty(len(jobs))
    later[order] = np.arange(len(jobs))
    end_s = left_s + np.array([max(job.age_s, 0.0) for job in jobs])
    latest = LATEST * min(1.0, len(jobs) / CROWD) * (end_s / end_s.max(initial=1.0)) ** LATEST_POWER
    priority = np.clip([job.priority for job in jobs], -STEEPEST, STEEPEST)
    return np.asarray(((1.0 + latest) / highest + later / max(fleet.devices, 1)) * 2.0**priority)


def staying(fleet: Fleet, rated: Options) -> Index:
    """The option that leaves each job where it is; -1 for one that waits, or is on more nodes than it needs."""
    found = np.full(len(fleet.jobs), -1)
    for index, here in enumerate(fleet.current):
        if here is None:
            continue
        kind = fleet.types.index(here.device_type)
        if len(here.devices_per_node) > fleet.nodes_needed(kind, here.devices):
            continue
        for row in rated.of(index):
            if rated.kind[row] == kind and rated.devices[row] == here.devices:
                found[index] = row
    return found


def _deadlines(fleet: Fleet, rated: Options, left_s: Array, now_s: float) -> tuple[Array, Array]:
    """1 where an option, or waiting a while, still meets the job's deadline; 0 elsewhere and where nothing does."""
    bonus, idle = np.zeros(len(left_s)), np.zeros(len(fleet.jobs))
    for index, job in enumerate(fleet.jobs):
        rows = rated.of(index)
        if job.deadline_s is None or not rows:
            continue
        slack_s = job.deadline_s - now_s
        mine = slice(rows.start, rows.stop)
        bonus[mine] = left_s[mine] <= slack_s
        idle[index] = float(left_s[mine].min() + NOTICE_S <= slack_s)
    return bonus, idle
