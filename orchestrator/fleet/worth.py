"""What each size is worth to a run, in numbers that can be added up over runs.

1. **Speed.** A run's speed on an option is its goodput there over its goodput on one device (the mean of the types, by
   their devices). Its remaining work in device-seconds is what remains of its progress over that one device's goodput.
   Where the remaining work is not known, a run is expected to need as much again as it has had (Lindy's law: what
   Pareto distributed lengths imply), and ``NEWCOMER_S`` more, in coarse classes.
2. **Weight.** For runs of known lengths whose speed is ``devices ** p`` without a limit the mean completion time is
   least when the sum of ``w_i x speed_i`` is greatest at every moment, with ``w_i = (i^q - (i - 1)^q)^(1/q)``,
   ``q = 1 / (1 - p)``, i the place from the longest remaining run (1) to the shortest (heSRPT: Berg, Vesilo &
   Harchol-Balter 2020, arXiv:2011.09676): a weight says how many runs wait for one. It is shortest remaining time
   first where speed is linear, and shares where it is not. Here speeds are each run's own and end somewhere, so that a
   few runs do not wait for each other at all: i is the devices that this run and all longer ones could use, over the
   devices there are, and at least 1. p is ``SCALING``. Assumed, not proved.
3. **Value.** Weight x log2(1 + speed), over the same at the speed of an equal share: about what share of its time a
   moment saves the run. Waiting is worth 0. The logarithm holds runs back from sizes that use devices badly.
4. **A move must earn its cost.** A running run that changes stands still for its restart: its speed counts ``T / (T +
   cost)``, T the time for which the change will matter: what it still needs, at most ``HORIZON_S``. Stopping it costs
   as much of what it has.
5. **Priorities** double the weight for each point. **Deadlines** give a bonus to the options that still meet them.
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

SCALING = 0.8
"""Assumption: twice the devices typically bring 2 ** 0.8 = 1.7."""
NEWCOMER_S = 300.0
CLASS = 4.0
"""Expected work is rounded to powers of this: with each second counted, runs would overtake each other all the time."""
HORIZON_S = 1800.0
"""Assumption: for how long an allocation typically stays as it is."""
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
    usual = _usual_speed(fleet, rated, speed, highest)
    weight = _weights(fleet, rated, work, speed, highest) / _utility(usual)
    stays = staying(fleet, rated)
    cost = np.array([max(job.restart_cost_s, 0.0) for job in jobs])
    running = np.array([here is not None for here in fleet.current], bool)
    matters_s = np.minimum(left_s, HORIZON_S)
    moves = running[rated.owner] & (stays[rated.owner] != np.arange(len(speed)))
    kept = np.where(moves, matters_s / (matters_s + cost[rated.owner] + 1e-9), 1.0)
    value = weight[rated.owner] * _utility(speed * kept)
    idle, moving = np.zeros(len(jobs)), np.zeros(len(jobs))
    here = stays >= 0
    row = stays[here]
    lost = cost[here] / (matters_s[row] + cost[here] + 1e-9)
    moving[here] = value[row] - weight[here] * _utility(speed[row] * (1.0 - lost))
    idle[here] = -moving[here]
    bonus, idle_bonus = _deadlines(fleet, rated, left_s + np.where(moves, cost[rated.owner], 0.0), now_s)
    everything = DEADLINE_BONUS * float((weight * _utility(usual)).sum())
    return Worth(value + everything * bonus, idle + everything * idle_bonus, stays, moving, speed, left_s)


def _utility(speed: Array) -> Array:
    return np.log2(1.0 + speed)


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
            found[index] = CLASS ** np.round(np.log(done + NEWCOMER_S) / np.log(CLASS))
        elif timed:
            found[index] = job.remaining_progress / base[index]
        elif job.progress > 0.0 and job.attained_device_s > 0.0:
            found[index] = job.remaining_progress * job.attained_device_s / job.progress
        else:
            found[index] = NEWCOMER_S
    return np.maximum(found, 1.0)


def _usual_speed(fleet: Fleet, rated: Options, speed: Array, highest: Array) -> Array:
    """Of each job on an equal share of the cluster: the fastest of the sizes that are no larger than that."""
    share = fleet.devices / max(len(fleet.jobs), 1)
    first = (
        rated.devices[np.minimum(rated.starts[:-1], max(len(speed) - 1, 0))] if len(speed) else np.ones(len(highest))
    )
    within = rated.devices <= np.maximum(share, first)[rated.owner]
    found = np.zeros(len(highest))
    np.maximum.at(found, rated.owner[within], speed[within])
    return np.where(found > 0.0, found, highest)


def _weights(fleet: Fleet, rated: Options, work: Array, speed: Array, highest: Array) -> Array:
    """Item 2, times the priority; of equals the one submitted first is the heavier."""
    most = np.zeros(len(fleet.jobs))
    at_highest = speed >= (1.0 - 1e-9) * highest[rated.owner]
    np.maximum.at(most, rated.owner[at_highest], rated.devices[at_highest].astype(float))
    order = np.lexsort((-np.arange(len(work)), -work / highest))
    place = np.empty(len(work))
    place[order] = np.maximum(np.cumsum(most[order]) / max(fleet.devices, 1), 1.0)
    power = 1.0 / (1.0 - SCALING)
    weight = (place**power - (place - 1.0) ** power) ** (1.0 / power)
    priority = np.clip([job.priority for job in fleet.jobs], -STEEPEST, STEEPEST)
    return np.asarray(weight * 2.0**priority)


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
