"""First come, first served: each run gets all of its devices at once and keeps them to its end; nobody overtakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.fleet.answer import answer
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.placement import Board, Choice, Placed
from orchestrator.fleet.quotas import check_quotas, limits
from orchestrator.fleet.rating import Options, options
from orchestrator.fleet.view import Allocations, JobView
from orchestrator.fleet.worth import staying

__all__ = ["FifoPolicy"]

LEAST_EFFICIENCY = 0.5
"""A size that a careful user asks for is at least half as fast per device as the smallest one."""


@dataclass(frozen=True)
class FifoPolicy:
    """A gang of a fixed size for each run, by priority and then in the order of submission.

    A run asks for the largest size that uses its devices at least half as well as its smallest one, and for the
    smallest where it was never timed. The first that does not fit holds up all behind it. With quotas it holds up its
    own queue; a queue borrows while no other one waits for what it is sure of, and gives nothing back before its runs
    end. So if runs end, each that has a place starts by the time all before it could have ended one after another; with
    quotas, all others.
    """

    quotas: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_quotas(self.quotas)

    def allocate(self, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]], now_s: float) -> Allocations:  # noqa: ARG002
        """Runs that run go on; then those that wait, in their order."""
        fleet = Fleet.of(jobs, nodes)
        rated = options(fleet)
        board = Board.empty(fleet)
        queue, limit = limits(fleet, self.quotas)
        left = np.append(limit, fleet.devices)  # the last one is everybody's, where there are no quotas
        waiting = []
        for job, row in enumerate(staying(fleet, rated)):
            here = fleet.current[job]
            if row >= 0 and here is not None:
                board.settle(job, Placed(_choice(rated, int(row)), here.devices_per_node, moved=False))
                left[queue[job]] -= rated.devices[row]
            else:
                waiting.append(job)
        waiting.sort(key=lambda job: (-fleet.jobs[job].priority, job))
        behind, held, owed = [], set(), False
        for job in (job for job in waiting if rated.of(job)):
            within = [row for row in _asked(rated, job) if rated.devices[row] <= left[queue[job]]]
            first = queue[job] not in held
            if first and (row := _start(board, rated, job, within)) is not None:
                left[queue[job]] -= rated.devices[row]
                continue
            owed = owed or (first and bool(within))
            held.add(queue[job])
            behind.append(job)
        for job in behind if len(limit) and not owed else []:
            if _start(board, rated, job, _asked(rated, job)) is None:
                break
        why = {job: "runs that came before it, or have more priority, are first" for job in waiting if rated.of(job)}
        return answer(fleet, rated, board.settled, {}, why)


def _asked(rated: Options, job: int) -> list[int]:
    """The size it asks for on each type, the fastest type first."""
    rows = rated.of(job)
    efficiency = rated.goodput / rated.devices
    found: dict[int, int] = {}
    for row in rows:
        smallest = next(one for one in rows if rated.kind[one] == rated.kind[row])
        if efficiency[row] >= LEAST_EFFICIENCY * efficiency[smallest]:
            found[int(rated.kind[row])] = row
    return sorted(found.values(), key=lambda row: -rated.goodput[row])


def _start(board: Board, rated: Options, job: int, rows: Sequence[int]) -> int | None:
    for row in rows:
        choice = _choice(rated, row)
        if (where := board.fit(job, choice.kind, choice.devices)) is not None:
            board.settle(job, Placed(choice, where, moved=False))
            return row
    return None


def _choice(rated: Options, row: int) -> Choice:
    return Choice(int(rated.kind[row]), int(rated.devices[row]), 0.0, row)
