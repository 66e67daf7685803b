"""From how many devices to which ones: runs stay where they are, and nobody is spread over more nodes than needed.

Runs that keep their size keep their place. The others are placed from the largest down, each on the fullest node that
has room, or on whole free nodes. Where free devices are scattered, runs that would keep their place are moved together,
the cheapest first, if that costs less than the size is worth; otherwise the run gets the next best size that fits. No
run is put on a node that it avoids; of nodes that are equally full, those that some avoid go first to the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.cluster import Fleet

__all__ = ["Board", "Choice", "Placed", "Wish", "place"]

Where = Mapping[str, int]
ATTEMPTS = 4
"""Sets of nodes that are tried to be cleared for one run."""


@dataclass(frozen=True)
class Choice:
    """One thing a run could have, and what that is worth."""

    kind: int
    devices: int
    value: float
    row: int = -1


@dataclass(frozen=True)
class Wish:
    """What a run is to have, what would do instead, and where it is."""

    job: int
    choices: tuple[Choice, ...]
    """Best first; those after the first are taken where it does not fit."""
    idle: float
    """What waiting is worth."""
    here: Where | None = None
    """Where it stands, if that is a place it can keep."""
    stays: int = -1
    """Which of its choices keeps it there."""
    moving: float = 0.0
    """What it loses by moving to another place of the same size."""


@dataclass(frozen=True)
class Placed:
    """Where a run goes, and which of its choices that is."""

    choice: Choice
    where: Where
    moved: bool
    """Whether it stood elsewhere, with the same size, and makes room."""


@dataclass
class Board:
    """Free devices, and which runs may still be moved."""

    names: list[list[str]]
    index: list[dict[str, int]]
    free: list[NDArray[np.intp]]
    size: list[int]
    shunned: dict[int, list[NDArray[np.bool_]]] = field(default_factory=dict)
    """Nodes of each type that a run will not use; only of runs that avoid some."""
    settled: dict[int, Placed] = field(default_factory=dict)
    """Runs by number, with their place."""
    movable: dict[int, Wish] = field(default_factory=dict)

    @classmethod
    def empty(cls, fleet: Fleet) -> Board:
        """With every device free."""
        names: list[list[str]] = [
            [name for name, node in fleet.nodes.items() if node.device_type == kind and node.devices]
            for kind in fleet.types
        ]
        free = [np.array([fleet.nodes[name].devices for name in of_kind], np.intp) for of_kind in names]
        index = [{name: number for number, name in enumerate(of_kind)} for of_kind in names]
        shunned = {
            job: [np.array([name in view.avoid for name in of_kind], bool) for of_kind in names]
            for job, view in enumerate(fleet.jobs)
            if view.avoid
        }
        return cls(names, index, free, list(fleet.node_size), shunned)

    def fit(self, job: int, kind: int, devices: int) -> dict[str, int] | None:
        """The fewest nodes: whole ones, and the fullest that takes what is left; None where there is no room.

        Of nodes that are equally full those go first that other runs avoid.
        """
        whole, rest = divmod(devices, self.size[kind])
        order = self.usable(job, kind)
        free = self.free[kind][order]
        empty = np.flatnonzero(free >= self.size[kind])
        if len(empty) < whole:
            return None
        found = {self.names[kind][order[index]]: self.size[kind] for index in empty[:whole]}
        if rest:
            room = np.where(free >= rest, free, np.iinfo(np.intp).max)
            room[empty[:whole]] = np.iinfo(np.intp).max
            fullest = int(np.argmin(room)) if len(room) else 0
            if not len(room) or room[fullest] == np.iinfo(np.intp).max:
                return None
            found[self.names[kind][order[fullest]]] = rest
        return found

    def usable(self, job: int, kind: int) -> NDArray[np.intp]:
        """The nodes that a run may use, those first that most others avoid."""
        if not self.shunned:
            return np.arange(len(self.names[kind]))
        count = np.sum([nodes[kind] for nodes in self.shunned.values()], axis=0)
        order = np.argsort(-count, kind="stable")
        return order[~self.shunned[job][kind][order]] if job in self.shunned else order

    def take(self, kind: int, where: Where, sign: int = 1) -> None:
        """Mark devices as used; as free again with a sign of -1."""
        for name, count in where.items():
            self.free[kind][self.index[kind][name]] -= sign * count

    def has(self, kind: int, where: Where) -> bool:
        """Whether these very devices are free."""
        return all(self.free[kind][self.index[kind][name]] >= count for name, count in where.items())

    def settle(self, job: int, placed: Placed) -> None:
        """Give a run its place."""
        self.take(placed.choice.kind, placed.where)
        self.settled[job] = placed

    def lift(self, job: int) -> Placed:
        """Take a run's place away again."""
        placed = self.settled.pop(job)
        self.take(placed.choice.kind, placed.where, sign=-1)
        return placed


def place(fleet: Fleet, wishes: Sequence[Wish], first: Mapping[int, Placed] | None = None) -> dict[int, Placed]:
    """Return where each run goes, by its number; who is missing found no room, or is better off waiting.

    ``first``: places that are settled before everything else, even where another run is.
    """
    board = Board.empty(fleet)
    for job, placed in (first or {}).items():
        board.settle(job, placed)
    waiting = []
    for wish in wishes:
        if wish.job in board.settled:
            continue
        if wish.here is not None and wish.stays == 0 and board.has(wish.choices[0].kind, wish.here):
            board.settle(wish.job, Placed(wish.choices[0], wish.here, moved=False))
            board.movable[wish.job] = wish
        else:
            waiting.append(wish)
    waiting.sort(key=lambda wish: (-wish.choices[0].devices, wish.idle - wish.choices[0].value, wish.job))
    for wish in waiting:
        _place_one(board, wish)
    return board.settled


def _place_one(board: Board, wish: Wish) -> None:
    for index, choice in enumerate(wish.choices):
        if choice.value <= wish.idle:
            return
        where: Where | None
        if index == wish.stays and wish.here is not None and board.has(choice.kind, wish.here):
            where = wish.here
        elif index == wish.stays > 0:
            continue  # a move at the same size is worth less than this choice says
        else:
            where = board.fit(wish.job, choice.kind, choice.devices)
            if where is None:
                other = wish.choices[index + 1].value if index + 1 < len(wish.choices) else wish.idle
                where = _cleared(board, wish.job, choice, choice.value - max(other, wish.idle))
        if where is not None:
            moved = index == wish.stays and dict(where) != dict(wish.here or {})
            board.settle(wish.job, Placed(choice, where, moved))
            return


def _cleared(board: Board, job: int, choice: Choice, worth: float) -> Where | None:
    """Room for a run made by moving runs together, where that costs less than ``worth``: then they are."""
    free = board.free[choice.kind]
    if free.sum() < choice.devices:
        return None
    whole, rest = divmod(choice.devices, board.size[choice.kind])
    tenants = _tenants(board, choice.kind)
    costs = sorted(
        (sum(wish.moving for _, wish in leaving), index, leaving)
        for index in board.usable(job, choice.kind)
        if (leaving := _leaving(tenants[index], int(free[index]), board.size[choice.kind] if whole else rest))
        is not None
    )
    count = max(whole, 1)
    for first in range(min(ATTEMPTS, len(costs) - count + 1)):
        chosen = costs[first : first + count]
        movers = {mover: wish for _, _, leaving in chosen for mover, wish in leaving}
        if sum(wish.moving for wish in movers.values()) >= worth:
            return None
        where = _move(board, job, choice, movers)
        if where is not None:
            return where
    return None


def _tenants(board: Board, kind: int) -> list[list[tuple[int, Wish]]]:
    """Runs on one node that may be moved, by node, the cheapest first."""
    found: list[list[tuple[int, Wish]]] = [[] for _ in board.names[kind]]
    for job, wish in board.movable.items():
        placed = board.settled[job]
        if placed.choice.kind == kind and len(placed.where) == 1:
            found[board.index[kind][next(iter(placed.where))]].append((job, wish))
    for tenants in found:
        tenants.sort(key=lambda one: (one[1].moving, one[0]))
    return found


def _leaving(tenants: list[tuple[int, Wish]], free: int, needed: int) -> list[tuple[int, Wish]] | None:
    leaving = []
    for job, wish in tenants:
        if free >= needed:
            break
        leaving.append((job, wish))
        free += wish.choices[0].devices
    return leaving if free >= needed else None


def _move(board: Board, job: int, choice: Choice, movers: Mapping[int, Wish]) -> Where | None:
    """Place ``job`` and then the movers elsewhere; everything as before where one of them finds no room."""
    before = {mover: board.lift(mover) for mover in movers}
    where = board.fit(job, choice.kind, choice.devices)
    moved: list[int] = []
    if where is not None:
        board.take(choice.kind, where)
        for mover in sorted(movers, key=lambda mover: (-before[mover].choice.devices, mover)):
            there = board.fit(mover, before[mover].choice.kind, before[mover].choice.devices)
            if there is None:
                break
            board.settle(mover, Placed(before[mover].choice, there, moved=dict(there) != dict(before[mover].where)))
            moved.append(mover)
        board.take(choice.kind, where, sign=-1)  # the caller takes it
    if where is not None and len(moved) == len(movers):
        for mover in moved:
            del board.movable[mover]
        return where
    for mover in moved:
        board.lift(mover)
    for mover, placed in before.items():
        board.settle(mover, placed)
    return None
