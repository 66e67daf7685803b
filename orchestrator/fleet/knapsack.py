"""The multiple-choice knapsack: one option for each owner, at most, so that the values add up to the most that fits.

One device type: dynamic programming over the number of devices, exact (Dudzinski & Walukiewicz 1987, section 2), in one
numpy pass per option; where queues have limits that together fit, for each queue. Several types, or nodes that some
owners avoid: an integer program, by HiGHS (``scipy.optimize.milp``), made small first:

1. A price for each limit, found by raising what is asked for too much and lowering what is not, gives an upper bound
   on what can be reached (Lagrange), whatever the prices.
2. What the owners would take at those prices, cut down to what fits and filled up, is a solution.
3. An option that costs its owner more than the gap between the two, at those prices, is in no better solution (reduced
   cost fixing). What is left is usually a few hundred variables, and most owners have no choice left.

Problems up to ``EXACT_ROWS`` options are solved exactly. Of larger ones that are not within ``GAP`` of the bound by
then the ``EXACT_ROWS`` options that cost least are left open. HiGHS is given no limit of time, so that the same input
has the same answer on a slow machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from orchestrator.fleet.cluster import Shunned

__all__ = ["Problem", "solve"]

Array = NDArray[np.float64]
Index = NDArray[np.intp]

EXACT_ROWS = 2000
GAP = 2e-3
"""Of the bound. The values themselves are predictions, good to percents."""
ROUNDS = 120
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Problem:
    """Options [n], those of an owner together, and what limits them."""

    owner: Index
    """Rising; owners without an option may be left out."""
    devices: Index
    kind: Index
    value: Array
    idle: Array
    """Value of taking no option, for each owner [owners]."""
    capacity: Index
    """Devices of each kind."""
    queue: Index
    """Which limit each owner comes under besides; -1: none."""
    limit: Index
    """Devices that each queue may use, of all kinds."""
    shunned: tuple[Shunned, ...] = ()
    """What owners that avoid the same nodes may use together."""

    @property
    def usage(self) -> list[tuple[Index, int]]:
        """For each limit the rows that it counts, and its size: the kinds, the queues, then what some avoid."""
        of_queue = self.queue[self.owner]
        counted = [(self.kind == kind, int(size)) for kind, size in enumerate(self.capacity)]
        counted += [(of_queue == queue, int(size)) for queue, size in enumerate(self.limit)]
        counted += [(self.avoiding(one, np.arange(len(self.owner))), one.devices) for one in self.shunned]
        return [(np.flatnonzero(rows), size) for rows, size in counted]

    def avoiding(self, shunned: Shunned, rows: Index) -> NDArray[np.bool_]:
        """Which of the rows a limit of those who avoid the same nodes counts."""
        mine = np.isin(self.owner[rows], sorted(shunned.owners))
        return np.asarray(mine & (self.kind[rows] == shunned.kind))


def solve(problem: Problem) -> Index:
    """Return the row that each owner takes, -1 for none: [owners]."""
    problem_rows = np.flatnonzero(problem.value > problem.idle[problem.owner] - TOLERANCE)
    if len(problem_rows) == 0:
        return np.full(len(problem.idle), -1)
    useful = _only(problem, problem_rows)
    if len(problem.capacity) > 1 or problem.shunned:
        picked = _integer_program(useful)
    elif len(problem.limit) == 0:
        picked = _by_devices(useful)
    elif problem.queue.min() >= 0 and problem.limit.sum() <= problem.capacity[0]:
        picked = _by_queue(useful)
    else:
        picked = _integer_program(useful)
    return np.where(picked >= 0, problem_rows[picked], -1)


def _only(problem: Problem, rows: Index) -> Problem:
    return replace(
        problem,
        owner=problem.owner[rows],
        devices=problem.devices[rows],
        kind=problem.kind[rows],
        value=problem.value[rows],
    )


# -- one kind of device ------------------------------------------------------------------------


def _by_queue(problem: Problem) -> Index:
    """Limits that share out the devices: each queue is a problem of its own."""
    picked = np.full(len(problem.idle), -1)
    for queue, limit in enumerate(problem.limit):
        rows = np.flatnonzero(problem.queue[problem.owner] == queue)
        found = _by_devices(replace(_only(problem, rows), capacity=np.array([limit])))
        picked = np.where(found >= 0, rows[found] if len(rows) else -1, picked)
    return picked


def _by_devices(problem: Problem) -> Index:
    """Dynamic programming: ``best[d]`` is the most that the owners so far reach with at most ``d`` devices."""
    capacity = int(problem.capacity[0])
    best = np.zeros(capacity + 1)
    owners = len(problem.idle)
    starts = np.searchsorted(problem.owner, np.arange(owners + 1))
    taken = np.full((owners, capacity + 1), -1, np.int32)
    for owner in range(owners):
        before, best = best, best + problem.idle[owner]
        for row in _undominated(problem, int(starts[owner]), int(starts[owner + 1])):
            size = int(problem.devices[row])
            if size > capacity:
                continue
            reached = before[: capacity + 1 - size] + problem.value[row]
            better = reached > best[size:] + TOLERANCE
            np.copyto(best[size:], reached, where=better)
            taken[owner, size:][better] = row
    picked = np.full(owners, -1)
    left = capacity
    for owner in range(owners - 1, -1, -1):
        row = int(taken[owner, left])
        if row >= 0:
            picked[owner] = row
            left -= int(problem.devices[row])
    return picked


def _undominated(problem: Problem, start: int, end: int) -> list[int]:
    """Rows by rising size, each worth more than every smaller one."""
    rows = sorted(range(start, end), key=lambda row: (problem.devices[row], -problem.value[row]))
    kept: list[int] = []
    for row in rows:
        if not kept or problem.value[row] > problem.value[kept[-1]]:
            kept.append(row)
    return kept


# -- several kinds, or further limits ------------------------------------------------------------


def _integer_program(problem: Problem) -> Index:
    prices, bound = _prices(problem)
    costs = _costs(problem, prices)
    fallback = _fitting(problem, costs)
    gap = bound - _worth(problem, fallback)
    exact = len(problem.value) <= EXACT_ROWS
    allowed = TOLERANCE * max(abs(bound), 1.0) if exact else GAP * abs(bound)
    if gap <= allowed:
        return fallback
    lost = _lost(problem, costs)
    least = np.argsort(lost[0], kind="stable")[:EXACT_ROWS]
    # With the solution before among them there is always one.
    open_rows = np.union1d(least[lost[0][least] <= gap + TOLERANCE], fallback[fallback >= 0])
    may_idle = (lost[1] <= gap + TOLERANCE) | (fallback < 0)
    reached = _worth(problem, fallback) - float(problem.idle.sum())
    picked = _milp(problem, open_rows, may_idle, allowed / max(reached, TOLERANCE))
    if picked is None or _worth(problem, picked) < _worth(problem, fallback):
        return fallback
    return picked


def _costs(problem: Problem, prices: Array) -> Array:
    """What each option pays at these prices."""
    costs = np.zeros(len(problem.value))
    for (rows, _), price in zip(problem.usage, prices, strict=True):
        costs[rows] += price * problem.devices[rows]
    return costs


def _prices(problem: Problem) -> tuple[Array, float]:
    """Prices of the limits, and the bound they prove: steps by how far demand is off, shorter each time they fail."""
    sizes = np.array([size for _, size in problem.usage], float)
    typical = float(np.median(np.abs(problem.value) / problem.devices))
    prices = np.full(len(sizes), typical)
    best, bound = prices, np.inf
    reach = 1.0
    for _ in range(ROUNDS):
        picked, value = _taken(problem, _costs(problem, prices))
        value += float(prices @ sizes)
        if value < bound - TOLERANCE:
            best, bound = prices, value
        else:
            reach *= 0.93
        excess = (_asked(problem, picked) - sizes) / np.maximum(sizes, 1.0)
        step = reach * np.clip(excess, -0.9, 3.0)
        prices = np.maximum(prices * np.exp(0.5 * step), 1e-9 * typical)
    return best, bound


def _asked(problem: Problem, picked: Index) -> Array:
    """Devices in the rows picked that each limit counts."""
    devices, queue = problem.devices[picked], problem.queue[problem.owner[picked]]
    of_queue = np.bincount(queue[queue >= 0], devices[queue >= 0], len(problem.limit))
    avoiding = [devices[problem.avoiding(one, picked)].sum() for one in problem.shunned]
    return np.concatenate([np.bincount(problem.kind[picked], devices, len(problem.capacity)), of_queue, avoiding])


def _taken(problem: Problem, costs: Array) -> tuple[Index, float]:
    """The rows that owners take at these costs, and what all owners have then, costs paid."""
    net = problem.value - costs
    starts = np.flatnonzero(np.diff(problem.owner, prepend=-1))
    highest = np.maximum.reduceat(net, starts)
    here = problem.owner[starts]
    takes = highest > problem.idle[here]
    group = np.cumsum(np.diff(problem.owner, prepend=problem.owner[0]) > 0)
    at_best = np.flatnonzero(net == highest[group])
    first = at_best[np.searchsorted(group[at_best], np.arange(len(starts)))]
    total = float(problem.idle.sum() + (highest - problem.idle[here])[takes].sum())
    return first[takes], total


def _lost(problem: Problem, costs: Array) -> tuple[Array, Array]:
    """What each option, and idling, lacks to its owner's best at these costs."""
    net = problem.value - costs
    highest = problem.idle.copy()
    np.maximum.at(highest, problem.owner, net)
    return highest[problem.owner] - net, highest - problem.idle


def _worth(problem: Problem, picked: Index) -> float:
    taken = picked >= 0
    return float(problem.value[picked[taken]].sum() + problem.idle[~taken].sum())


def _fitting(problem: Problem, costs: Array) -> Index:
    """A solution that fits: owners in the order of what they gain on their costs, each with the best that is left."""
    left = _Left(problem)
    picked = np.full(len(problem.idle), -1)
    net = problem.value - costs
    starts = np.searchsorted(problem.owner, np.arange(len(problem.idle) + 1))
    gain = (problem.value - problem.idle[problem.owner]) / problem.devices
    for refill in (False, True):
        rows_by_owner = sorted(
            (owner for owner in range(len(problem.idle)) if starts[owner] < starts[owner + 1]),
            key=lambda owner: -float(gain[starts[owner] : starts[owner + 1]].max()),
        )
        for owner in rows_by_owner:
            rows = np.arange(starts[owner], starts[owner + 1])
            if (now := picked[owner]) >= 0:
                left.take(now, sign=-1)
            judged = problem.value[rows] if refill else net[rows]
            judged = np.where(problem.devices[rows] <= left.room(rows), judged, -np.inf)
            best = int(np.argmax(judged))
            idle = problem.idle[owner]
            picked[owner] = rows[best] if judged[best] > idle else -1
            if (row := picked[owner]) >= 0:
                left.take(row)
    return picked


class _Left:
    """What the limits have left."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._of_kind = problem.capacity.copy()
        self._of_queue = np.append(problem.limit, np.iinfo(np.intp).max // 2)
        self._avoiding = [one.devices for one in problem.shunned]

    def room(self, rows: Index) -> Index:
        """Devices for each of the rows of an owner."""
        problem = self._problem
        room = np.minimum(self._of_kind[problem.kind[rows]], self._of_queue[problem.queue[problem.owner[rows[0]]]])
        for one, left in zip(problem.shunned, self._avoiding, strict=True):
            room = np.where(problem.avoiding(one, rows), np.minimum(room, left), room)
        return np.asarray(room)

    def take(self, row: int, sign: int = 1) -> None:
        """Use what a row needs; give it back with a sign of -1."""
        problem, devices = self._problem, sign * int(self._problem.devices[row])
        self._of_kind[problem.kind[row]] -= devices
        self._of_queue[problem.queue[problem.owner[row]]] -= devices
        for number, one in enumerate(problem.shunned):
            if problem.kind[row] == one.kind and int(problem.owner[row]) in one.owners:
                self._avoiding[number] -= devices


def _milp(problem: Problem, rows: Index, may_idle: NDArray[np.bool_], gap: float) -> Index | None:
    """The options that are still open, by HiGHS; None where it finds nothing."""
    if len(rows) == 0:
        return np.full(len(problem.idle), -1)
    owner, count = problem.owner[rows], len(rows)
    gains = problem.value[rows] - problem.idle[owner]
    matrix, upper, lower = [], [], []
    inverse = np.full(len(problem.value), -1)
    inverse[rows] = np.arange(count)
    owners, position = np.unique(owner, return_inverse=True)
    one_each = coo_array((np.ones(count), (position, np.arange(count))), shape=(len(owners), count))
    for members, size in problem.usage:
        inside = inverse[members]
        inside = inside[inside >= 0]
        row = np.zeros(count)
        row[inside] = problem.devices[rows[inside]]
        matrix.append(row)
        upper.append(float(size))
        lower.append(-np.inf)
    constraints = [
        LinearConstraint(one_each.tocsr(), np.where(may_idle[owners], 0.0, 1.0), np.ones(len(owners))),
        LinearConstraint(np.array(matrix), lower, upper),
    ]
    found = milp(
        -gains,
        integrality=np.ones(count),
        bounds=Bounds(0.0, 1.0),
        constraints=constraints,
        options={"mip_rel_gap": gap, "node_limit": 20000},
    )
    if found.x is None:
        return None
    picked = np.full(len(problem.idle), -1)
    taken = np.flatnonzero(found.x > 0.5)
    picked[owner[taken]] = rows[taken]
    return picked
