"""Why workers do not start: Ray has no room for them beside what else runs on the cluster. Imports Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray
from ray.util import placement_group_table

__all__ = ["Room"]

LOOK_S = 5.0
PATIENCE_S = 10.0
"""How long workers may have no place before that is said: where there is room, they have one in a second."""
ELASTIC_PATIENCE_S = 30.0
"""The same where Ray asks for no place before the fewest workers fit: it asks for none either while it starts."""
AGAIN_S = 60.0


class Room:
    """Looks now and then whether a group of the run's workers waits for a place.

    ``resources`` are those of one worker, ``fewest`` how many an elastic run needs at least; 0: it is not elastic.
    ``driver`` is Ray's id of the job that the command is: the id of a placement group ends in it.
    """

    def __init__(
        self,
        resources: Mapping[str, float],
        *,
        driver: str,
        fewest: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fewest = fewest
        self._driver = driver
        self._resources = {name: float(amount) for name, amount in resources.items() if amount}
        self._clock = clock
        self._next_look = clock() + LOOK_S
        self._waits_since: float | None = None
        self._next_word = 0.0

    def wanting(self) -> str | None:
        """In words, what is wanted and what there is: once after ``PATIENCE_S`` without a place, then each minute."""
        now = self._clock()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        pending, placed = self._groups()
        workers = pending or (0 if placed else self._fewest)
        if workers == 0:
            self._waits_since = None
            return None
        if self._waits_since is None:
            self._waits_since, self._next_word = now - LOOK_S, 0.0
        if now < max(self._next_word, self._waits_since + (PATIENCE_S if pending else ELASTIC_PATIENCE_S)):
            return None
        self._next_word = now + AGAIN_S
        return self._said(workers, at_least=not pending)

    def _said(self, workers: int, *, at_least: bool) -> str:
        who = f"{'at least ' if at_least else ''}{workers} worker{'s' if workers != 1 else ''}"
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
        free, whole = ray.available_resources(), ray.cluster_resources()
        there = ", ".join(f"{free.get(name, 0.0):g} of {whole.get(name, 0.0):g} {name}" for name in self._resources)
        return (
            f"waiting for room for {who} with {wanted} each: free are {there}; "
            "others use the rest, or the nodes that are left are too small (`ray status`)"
        )

    def _groups(self) -> tuple[int, bool]:
        """For how many workers Ray looks for a place, and whether there are some that have one."""
        pending, placed = 0, False
        for number, group in placement_group_table().items():
            bundles = list(group["bundles"].values())
            own = number.endswith(self._driver)  # Ray's own groups have another shape
            if own and bundles and all(bundle == self._resources for bundle in bundles):
                pending = len(bundles) if group["state"] == "PENDING" else pending
                placed |= group["state"] == "CREATED"
        return pending, placed
