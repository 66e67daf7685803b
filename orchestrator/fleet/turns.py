"""Whose turn it is: runs that have waited their longest, as many of them as have a place at once.

A count of devices is not enough: a run may avoid nodes, find no type that is large enough, or leave pieces that are of
no use to the next one. So each gets a place on an empty board, those that have had least first. A run without a place
keeps nobody from his turn, and a set that has places can always be placed, whatever else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.placement import Board, Choice, Placed
from orchestrator.fleet.rating import Options

__all__ = ["Patience", "Turns", "take_turns"]

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Patience:
    """How long a run may go short, and how long it keeps its turn then.

    A run must run if it has waited ``longest_wait_s``, or since then had less than ``least_share`` of its smallest
    size; in a crowd less than half of what it would have if all took turns, or all would lack all the time. It keeps
    running until it is ``term_s`` ahead of that. Of those that must run the one that has had least is first. So one
    that never ran is behind those only that are in their term, and later ones are behind it: if there are ``n`` runs in
    all, each that has a place at all runs within ``longest_wait_s + n term_s`` of its submission.
    """

    longest_wait_s: float = 1800.0
    term_s: float = 600.0
    least_share: float = 0.25

    def lacking(self, fleet: Fleet, rated: Options) -> list[int]:
        """Jobs that should run now, those first that have had least: in s at their smallest size."""
        able = [job for job in range(len(fleet.jobs)) if rated.of(job)]
        smallest = sum(fleet.jobs[job].workers_range[0] for job in able)
        share = min(self.least_share, 0.5 * fleet.devices / max(smallest, 1))
        lacking = []
        for index in able:
            job = fleet.jobs[index]
            late_s = job.age_s - self.longest_wait_s
            has_had_s = job.attained_device_s / job.workers_range[0]
            if fleet.current[index] is not None:
                has_had_s -= self.term_s
            if late_s >= 0.0 and (has_had_s < share * late_s or job.attained_device_s <= 0.0):
                lacking.append((has_had_s, index))
        return [index for _, index in sorted(lacking)]


@dataclass(frozen=True)
class Turns:
    """Runs by number."""

    sure: dict[int, Placed]
    """Must run, within what their queue is sure of; with places, at their smallest, that leave room for each other."""
    borrowing: tuple[int, ...]
    """Must run too, as far as the owners of what they would borrow leave it to them."""
    later: tuple[int, ...]
    """Lack as well, but have no place beside those."""

    @property
    def due(self) -> tuple[int, ...]:
        """Those that must run."""
        return (*self.sure, *self.borrowing)

    def notes(self, fleet: Fleet) -> dict[int, tuple[str, ...]]:
        """Why those run that did not."""
        return {job: ("it had waited its longest",) for job in self.due if fleet.current[job] is None}

    def why_waiting(self) -> dict[int, str]:
        """Why the others that lack do not."""
        return dict.fromkeys(self.later, "has waited its longest, as have others that have had less")


def take_turns(fleet: Fleet, rated: Options, stays: Index, lacking: Sequence[int], queue: Index, limit: Index) -> Turns:
    """Give out places to those that lack, in their order: first within their queues' limits, then beyond."""
    board, left = Board.empty(fleet), np.append(limit, fleet.devices)
    for job in lacking:
        placed = _smallest(board, fleet, rated, stays, job, int(left[queue[job]]))
        if placed is not None:
            board.settle(job, placed)
            left[queue[job]] -= placed.choice.devices
    sure = dict(board.settled)
    for job in lacking if len(limit) else ():
        if job not in sure and (placed := _smallest(board, fleet, rated, stays, job, fleet.devices)) is not None:
            board.settle(job, placed)
    borrowing = tuple(job for job in board.settled if job not in sure)
    return Turns(sure, borrowing, tuple(job for job in lacking if job not in board.settled))


def _smallest(board: Board, fleet: Fleet, rated: Options, stays: Index, job: int, most: int) -> Placed | None:
    """Where a run fits at its smallest: where it is, or on its type; then the smallest size, and the most room."""
    first: dict[int, int] = {}
    for row in rated.of(job):
        first.setdefault(int(rated.kind[row]), row)
    rows = [row for row in first.values() if rated.devices[row] <= most]
    here, stay = fleet.current[job], int(stays[job])
    if here is not None and stay in rows and board.has(int(rated.kind[stay]), here.devices_per_node):
        return Placed(_choice(rated, stay), here.devices_per_node, moved=False)
    kind = -1 if stay < 0 else int(rated.kind[stay])
    for row in sorted(
        rows,
        key=lambda row: (rated.kind[row] != kind, rated.devices[row], -board.free[rated.kind[row]].sum(), row),
    ):
        where = board.fit(job, int(rated.kind[row]), int(rated.devices[row]))
        if where is not None:
            return Placed(_choice(rated, row), where, moved=row == stay)
    return None


def _choice(rated: Options, row: int) -> Choice:
    return Choice(int(rated.kind[row]), int(rated.devices[row]), 0.0, row)
