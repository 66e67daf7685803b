"""Which trial of a search goes on: asynchronous successive halving, Algorithm 2 of Li et al. 2020 (arXiv:1810.05934).

A trial is judged at rungs, after ``SHARES`` of its length. Whenever there is room, one of those goes on that are among
the best of all that have come to the same rung, one of ``FACTOR``; the highest rung that has one first. If there is
none, a new trial begins. Nobody waits for a round to be complete, and nobody is stopped: who is not good enough yet
may be later, when more have come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FACTOR", "SHARES", "Standing", "goes_on", "goes_on_at_last"]

FACTOR = 4
SHARES = (1 / 9, 1 / 3, 1.0)
"""Of a trial's length."""


@dataclass(frozen=True)
class Standing:
    """How a trial stands."""

    name: str
    losses: tuple[float, ...]
    """At each rung that it has come to, the lowest first; infinity where it measured nothing or broke."""
    may_go_on: bool = True
    """Not if it is running, or broke."""

    def may_leave(self, rung: int) -> bool:
        """Whether it stands at this rung, with a value, and may go on."""
        return self.may_go_on and len(self.losses) == rung + 1 < len(SHARES) and self.losses[rung] < math.inf


def goes_on(standings: Sequence[Standing]) -> Standing | None:
    """The trial that is to go on to its next rung, if any is good enough."""
    for rung in reversed(range(len(SHARES) - 1)):
        came = sorted((one for one in standings if len(one.losses) > rung), key=lambda one: one.losses[rung])
        for one in came[: len(came) // FACTOR]:
            if one.may_leave(rung):
                return one
    return None


def goes_on_at_last(standings: Sequence[Standing]) -> Standing | None:
    """Where nothing else is left to do: the best of those that came furthest, unless one has come to the end."""
    furthest = max((len(one.losses) for one in standings), default=0)
    if furthest == len(SHARES) and any(len(one.losses) == furthest and one.may_go_on for one in standings):
        return None
    able = [one for one in standings if one.may_leave(len(one.losses) - 1)]
    return min(able, key=lambda one: (-len(one.losses), one.losses[-1]), default=None)
