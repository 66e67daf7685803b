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
AGAIN_S = 60.0


class Room:
    """Looks now and then whether a group of workers waits for a place; ``resources`` are those of one worker."""

    def __init__(self, resources: Mapping[str, float], *, clock: Callable[[], float] = time.monotonic) -> None:
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
        workers = self._pending()
        if workers == 0:
            self._waits_since = None
            return None
        if self._waits_since is None:
            self._waits_since, self._next_word = now, now + PATIENCE_S - LOOK_S
        if now < self._next_word:
            return None
        self._next_word = now + AGAIN_S
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
        free, whole = ray.available_resources(), ray.cluster_resources()
        there = ", ".join(f"{free.get(name, 0.0):g} of {whole.get(name, 0.0):g} {name}" for name in self._resources)
        return (
            f"waiting for room for {workers} worker{'s' if workers != 1 else ''} with {wanted} each: free are {there}; "
            "others use the rest, or the nodes that are left are too small (`ray status`)"
        )

    def _pending(self) -> int:
        """For how many workers Ray looks for a place: of a group that wants what ours want, since Ray names none."""
        for group in placement_group_table().values():
            bundles = list(group["bundles"].values())
            if group["state"] == "PENDING" and bundles and all(bundle == self._resources for bundle in bundles):
                return len(bundles)
        return 0
