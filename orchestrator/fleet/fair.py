"""Equal shares: the same number of devices for every run, as nearly as packed sizes allow, whatever they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.answer import answer
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.placement import Choice, Placed, Wish, place
from orchestrator.fleet.quotas import check_quotas, limits
from orchestrator.fleet.rating import Options, options
from orchestrator.fleet.turns import Patience, take_turns
from orchestrator.fleet.view import Allocations, JobView
from orchestrator.fleet.worth import staying

__all__ = ["FairPolicy"]


@dataclass(frozen=True)
class FairPolicy:
    """Every run its smallest size, then all of them the next one, until the devices are given out.

    Where there are more runs than devices, those with more priority are first, then those that had least; a run that
    runs keeps its turn for ``term_s``. Within a round, runs that have the size already are first, then those submitted
    first, so that shares change only as far as they must. With quotas, each queue shares what it is sure of, and then
    the rest.

    Nobody starves, whatever the priorities and in whatever pieces the devices are free: a run that has waited its
    longest, or since then had too little, must run, before all others, for a term (``fleet.turns``). Each of ``n`` runs
    that has a place at all runs within ``longest_wait_s + n term_s`` of its submission; with quotas, each that its
    queue has room for.
    """

    quotas: Mapping[str, int] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        check_quotas(self.quotas)

    def allocate(self, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]], now_s: float) -> Allocations:  # noqa: ARG002
        """Fill up in rounds."""
        fleet = Fleet.of(jobs, nodes)
        rated = options(fleet)
        stays = staying(fleet, rated)
        queue, limit = limits(fleet, self.quotas)
        turns = take_turns(fleet, rated, stays, self.patience.lacking(fleet, rated), queue, limit)
        shares = _Shares(fleet, rated, stays, queue, np.append(limit, fleet.devices))
        shares.give(turns.sure)
        first = {job: number for number, job in enumerate(turns.borrowing)}
        order = sorted(range(len(fleet.jobs)), key=lambda job: (first.get(job, len(first)), self._turn(fleet, job)))
        shares.fill(order)
        if len(limit):
            shares.left_of_queue[:] = fleet.devices
            shares.fill(order)
        wishes = [_wish(fleet, rated, int(stays[job]), job, row) for job, row in sorted(shares.picked.items())]
        placed = place(fleet, wishes)
        if not turns.sure.keys() <= placed.keys():
            placed = place(fleet, wishes, turns.sure)
        waiting = {job: _why_waiting(job in shares.picked) for job in order if rated.of(job)}
        return answer(fleet, rated, placed, turns.notes(fleet), waiting | turns.why_waiting())

    def _turn(self, fleet: Fleet, job: int) -> tuple[float, float, int]:
        view, here = fleet.jobs[job], fleet.current[job]
        head_start = 0.0 if here is None else self.patience.term_s * here.devices
        return -view.priority, view.attained_device_s - head_start, job


def _why_waiting(picked: bool) -> str:
    return (
        "what is free is in pieces too small for it"
        if picked
        else "others with more priority, or less so far, are first"
    )


@dataclass
class _Shares:
    fleet: Fleet
    rated: Options
    stays: NDArray[np.intp]
    queue: NDArray[np.intp]
    left_of_queue: NDArray[np.intp]
    picked: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left_of_kind = list(self.fleet.capacity)
        self.shunned = self.fleet.shunned
        self.left_avoiding = [one.devices for one in self.shunned]

    def give(self, places: Mapping[int, Placed]) -> None:
        """What has places beside each other, before all rounds."""
        for job, placed in places.items():
            self._take(job, placed.choice.row)

    def fill(self, order: Sequence[int]) -> None:
        """The smallest size in turn, then rounds of the next size."""
        for job in order:
            if job not in self.picked:
                self._take(job, self._smallest(job))
        growing = list(self.picked)
        while growing:
            steps = [(self._next(job), job) for job in growing]
            level = min((int(self.rated.devices[row]) for row, _ in steps if row is not None), default=0)
            due = [(row, job) for row, job in steps if row is not None and self.rated.devices[row] <= level]
            due.sort(key=lambda step: (not self._has(step[1], level), step[1]))
            stuck = {job for row, job in due if not self._take(job, row)}
            growing = [job for row, job in steps if row is not None and job not in stuck]

    def _has(self, job: int, devices: int) -> bool:
        return bool(self.stays[job] >= 0 and self.rated.devices[self.stays[job]] >= devices)

    def _smallest(self, job: int) -> int | None:
        """On the type it is on, or the one with most devices left."""
        first: dict[int, int] = {}
        for row in self.rated.of(job):
            first.setdefault(int(self.rated.kind[row]), row)
        here = int(self.rated.kind[self.stays[job]]) if self.stays[job] >= 0 else -1
        fits = [row for kind, row in first.items() if self.rated.devices[row] <= self._room(job, kind)]
        return max(
            fits,
            key=lambda row: (self.rated.kind[row] == here, self.left_of_kind[self.rated.kind[row]], -row),
            default=None,
        )

    def _next(self, job: int) -> int | None:
        row = self.picked[job] + 1
        same = row < self.rated.starts[job + 1] and self.rated.kind[row] == self.rated.kind[row - 1]
        return row if same else None

    def _take(self, job: int, row: int | None) -> bool:
        if row is None:
            return False
        before = self.picked.get(job)
        more = int(self.rated.devices[row]) - (0 if before is None else int(self.rated.devices[before]))
        kind, queue = int(self.rated.kind[row]), int(self.queue[job])
        if more > self._room(job, kind) or more > self.left_of_queue[queue]:
            return False
        self.left_of_kind[kind] -= more
        self.left_of_queue[queue] -= more
        for number in self._avoiding(job, kind):
            self.left_avoiding[number] -= more
        self.picked[job] = row
        return True

    def _room(self, job: int, kind: int) -> int:
        """Devices of a type that are left for it, on the nodes that it does not avoid."""
        return min([self.left_of_kind[kind], *(self.left_avoiding[number] for number in self._avoiding(job, kind))])

    def _avoiding(self, job: int, kind: int) -> list[int]:
        return [number for number, one in enumerate(self.shunned) if one.kind == kind and job in one.owners]


def _wish(fleet: Fleet, rated: Options, stays: int, job: int, row: int) -> Wish:
    """Its share; smaller sizes where that finds no place."""
    rows = [other for other in rated.of(job) if other <= row and rated.kind[other] == rated.kind[row]][::-1]
    here = fleet.current[job]
    return Wish(
        job=job,
        choices=tuple(Choice(int(rated.kind[r]), int(rated.devices[r]), float(rated.devices[r]), r) for r in rows),
        idle=0.0,
        here=None if here is None or stays < 0 else here.devices_per_node,
        stays=rows.index(stays) if stays in rows else -1,
        moving=0.5,
    )
