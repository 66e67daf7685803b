"""The policy that gives devices to whoever gets the most out of them (``fleet.worth`` says what that is).

The sum of what runs have is maximised exactly (``fleet.knapsack``), under these rules:

1. **Nobody starves.** A run that has waited its longest, or since then had too little, must run, before everything
   else, for a term (``fleet.turns``). Each of ``n`` runs that has a place at all runs within ``longest_wait_s + n
   term_s`` of its submission; with quotas, each that its queue has room for.
2. **Quotas.** First each queue is given what is best for it within its quota (queues without one share what quotas
   leave); then what is left goes to whoever is worth most, on top of that. Borrowed devices go back when their owner
   asks.
3. **No losing move.** If what could be placed is worth less than leaving every run where it is, they are left there,
   and only free devices are given out. There are two exceptions: what makes room for a run whose turn it is (rule 1),
   and, with quotas, all moves while the runs of any queue have more than it is sure of: what an owner takes back may
   well be worth less to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.answer import answer
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.knapsack import Problem, solve
from orchestrator.fleet.placement import Choice, Placed, Wish, place
from orchestrator.fleet.quotas import check_quotas, limits
from orchestrator.fleet.rating import Options, options
from orchestrator.fleet.turns import Patience, Turns, take_turns
from orchestrator.fleet.view import Allocations, JobView
from orchestrator.fleet.worth import Worth, worth

__all__ = ["GoodputPolicy"]

Index = NDArray[np.intp]


@dataclass(frozen=True)
class GoodputPolicy:
    """Maximise what the devices are worth to the runs."""

    quotas: Mapping[str, int] = field(default_factory=dict)
    """Devices that each queue is sure of."""
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        check_quotas(self.quotas)

    def allocate(self, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]], now_s: float) -> Allocations:
        """The allocation worth most."""
        fleet = Fleet.of(jobs, nodes)
        rated = options(fleet)
        queue, limit = limits(fleet, self.quotas)
        judged = worth(fleet, rated, now_s)
        turns = take_turns(fleet, rated, judged.stays, self.patience.lacking(fleet, rated), queue, limit)
        judged = _insisting(judged, rated, turns.due)
        picked = _picked(fleet, rated, judged, queue, limit)
        placed = _place(fleet, rated, judged, picked)
        placed = _no_worse(fleet, rated, judged, placed, _unmoved(rated, judged, picked, queue, limit))
        if not turns.sure.keys() <= placed.keys():
            placed = _place(fleet, rated, judged, picked, turns.sure)
        return answer(fleet, rated, placed, turns.notes(fleet), _why_waiting(picked, turns))


def _why_waiting(picked: Index, turns: Turns) -> dict[int, str]:
    """For those that were to have devices and found no place, and those whose turn comes later."""
    no_place = "there is no room for it without moves that cost more than they gain"
    return dict.fromkeys(map(int, np.flatnonzero(picked >= 0)), no_place) | turns.why_waiting()


def _picked(fleet: Fleet, rated: Options, judged: Worth, queue: Index, limit: Index) -> Index:
    """The row of each job, -1 for none."""
    nothing = np.zeros(0, np.intp)
    whole = Problem(
        owner=rated.owner,
        devices=rated.devices,
        kind=rated.kind,
        value=judged.value,
        idle=judged.idle,
        capacity=np.array(fleet.capacity, np.intp),
        queue=queue,
        limit=limit,
        shunned=fleet.shunned,
    )
    first = solve(whole)
    if len(limit) == 0:
        return first
    has = first >= 0
    sure = np.where(has, rated.devices[first], 0) if len(rated.devices) else np.zeros(len(first), np.intp)
    kind = np.where(has, rated.kind[first], -1) if len(rated.devices) else sure
    grows = ~has[rated.owner] | ((rated.kind == kind[rated.owner]) & (rated.devices >= sure[rated.owner]))
    value = np.where(grows, judged.value, -np.inf)
    insisted = np.where(has, -_beyond(judged), judged.idle)
    return solve(replace(whole, value=value, idle=insisted, queue=np.full(len(first), -1), limit=nothing))


def _beyond(judged: Worth) -> float:
    """More than all options together are worth."""
    return 1.0 + float(np.abs(judged.value[np.isfinite(judged.value)]).sum() + np.abs(judged.idle).sum())


def _insisting(judged: Worth, rated: Options, due: Sequence[int]) -> Worth:
    """With waiting made worse than anything for those that must run."""
    idle = judged.idle.copy()
    most = np.zeros(len(idle))
    np.maximum.at(most, rated.owner, judged.value)
    idle[list(due)] = -(1.0 + float(most.sum() + np.abs(judged.idle).sum()))
    return replace(judged, idle=idle)


def _no_worse(
    fleet: Fleet, rated: Options, judged: Worth, placed: dict[int, Placed], unmoved: Index | None
) -> dict[int, Placed]:
    """What was placed; or what runs now and what fits beside it, where that is worth more."""
    if unmoved is None:
        return placed
    left = _place(fleet, rated, judged, unmoved)
    return placed if _total(judged, placed) >= _total(judged, left) else left


def _unmoved(rated: Options, judged: Worth, picked: Index, queue: Index, limit: Index) -> Index | None:
    """The rows with every run where it is, and beside it what was picked for the others within their queues' limits.

    None where that is what was picked, or where a queue has more than it is sure of: then its owners may ask for it.
    """
    standing = judged.stays >= 0
    if (judged.stays == picked)[standing].all():
        return None
    rows = np.where(standing, judged.stays, picked)
    left = limit.copy()
    for job in np.argsort(~standing, kind="stable") if len(limit) else ():  # those that run first
        devices = int(rated.devices[rows[job]]) if rows[job] >= 0 else 0
        if devices <= left[queue[job]]:
            left[queue[job]] -= devices
        elif standing[job]:
            return None
        else:
            rows[job] = -1
    return rows


def _place(
    fleet: Fleet, rated: Options, judged: Worth, picked: Index, first: Mapping[int, Placed] | None = None
) -> dict[int, Placed]:
    """Find places for what was picked; ``first``: places that are given out before, whoever is there."""
    wishes = []
    for job in np.flatnonzero(picked >= 0):
        here = fleet.current[job]
        stays = int(judged.stays[job])
        rows = _instead(rated, judged, int(job), int(picked[job]), may_lose_its_place=bool(first))
        wishes.append(
            Wish(
                job=int(job),
                choices=tuple(
                    Choice(int(rated.kind[row]), int(rated.devices[row]), float(judged.value[row]), row) for row in rows
                ),
                idle=float(judged.idle[job]),
                here=here.devices_per_node if here is not None and stays >= 0 else None,
                stays=rows.index(stays) if stays in rows else -1,
                moving=float(judged.moving[job]),
            )
        )
    return place(fleet, wishes, first or {})


def _instead(rated: Options, judged: Worth, job: int, picked: int, *, may_lose_its_place: bool) -> list[int]:
    """What was picked, then what takes no more of its type, or leaves it where it is, the best first."""
    stays = int(judged.stays[job])
    if picked == stays and not may_lose_its_place:
        return [picked]
    others = [
        row
        for row in rated.of(job)
        if row == stays or (rated.kind[row] == rated.kind[picked] and rated.devices[row] <= rated.devices[picked])
    ]
    return [picked, *sorted((row for row in others if row != picked), key=lambda row: -judged.value[row])]


def _total(judged: Worth, placed: Mapping[int, Placed]) -> float:
    total = 0.0
    for job, idle in enumerate(judged.idle):
        here = placed.get(job)
        total += float(idle) if here is None else here.choice.value - here.moved * float(judged.moving[job])
    return total
