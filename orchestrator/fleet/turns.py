"""Whose turn it is: runs that have waited their longest, as many of them as have a place at once.

A count of devices is not enough: a run may avoid nodes, find no type that is large enough, or leave pieces that are of
no use to the next one. So each gets a place on an empty board, those that lack most first. A run without a place keeps
nobody from his turn, and a set that has places can always be placed, whatever else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.placement import Board, Choice, Placed
from orchestrator.fleet.rating import Options
from orchestrator.fleet.worth import Worth

__all__ = ["Turns", "take_turns"]

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Turns:
    """Runs by number."""

    sure: dict[int, Placed]
    """Must run, within what their queue is sure of; with places, at their smallest, that leave room for each other."""
    borrowing: tuple[int, ...]
    """Must run too, as far as the owners of what they would borrow leave it to them."""
    later: tuple[int, ...]
    """Lack as well, but have no place beside those."""


def take_turns(
    fleet: Fleet, rated: Options, judged: Worth, lacking: Sequence[int], queue: Index, limit: Index
) -> Turns:
    """Give out places to those that lack, in their order: first within their queues' limits, then beyond."""
    board, left = Board.empty(fleet), np.append(limit, fleet.devices)
    able = [job for job in lacking if rated.of(job)]
    for job in able:
        placed = _smallest(board, fleet, rated, judged, job, int(left[queue[job]]))
        if placed is not None:
            board.settle(job, placed)
            left[queue[job]] -= placed.choice.devices
    sure = dict(board.settled)
    for job in able if len(limit) else ():
        if job not in sure and (placed := _smallest(board, fleet, rated, judged, job, fleet.devices)) is not None:
            board.settle(job, placed)
    borrowing = tuple(job for job in board.settled if job not in sure)
    return Turns(sure, borrowing, tuple(job for job in able if job not in board.settled))


def _smallest(board: Board, fleet: Fleet, rated: Options, judged: Worth, job: int, most: int) -> Placed | None:
    """Where a run fits at its smallest: where it is, or else on the type with the smallest size, then the most room."""
    first: dict[int, int] = {}
    for row in rated.of(job):
        first.setdefault(int(rated.kind[row]), row)
    rows = [row for row in first.values() if rated.devices[row] <= most]
    here, stays = fleet.current[job], int(judged.stays[job])
    if here is not None and stays in rows and board.has(int(rated.kind[stays]), here.devices_per_node):
        return Placed(_choice(rated, judged, stays), here.devices_per_node, moved=False)
    for row in sorted(rows, key=lambda row: (rated.devices[row], -board.free[rated.kind[row]].sum(), row)):
        where = board.fit(job, int(rated.kind[row]), int(rated.devices[row]))
        if where is not None:
            return Placed(_choice(rated, judged, row), where, moved=row == stays)
    return None


def _choice(rated: Options, judged: Worth, row: int) -> Choice:
    return Choice(int(rated.kind[row]), int(rated.devices[row]), float(judged.value[row]), row)
