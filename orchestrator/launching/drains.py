"""Ray's notice that nodes of the run will be taken away, as the training loop asks for it."""

from __future__ import annotations

import math
import time

__all__ = ["DrainNotice"]

LOOK_S = 2.0
"""Asking is a barrier over all ranks: often enough for half a minute's notice, too rarely to be felt."""


class DrainNotice:
    """See ``loop.Notice``. A node that gets SIGTERM, or is drained, stays for a while; Ray tells every worker."""

    def __init__(self) -> None:
        # The first time a worker asks it needs the head, who may be gone later: so after the first step.
        self._asked_at = -math.inf
        self._told: frozenset[str] = frozenset()

    def due(self) -> bool:
        """Whether it is time to ask again."""
        return time.monotonic() - self._asked_at >= LOOK_S

    def ask(self) -> str | None:
        """What is to be said of nodes that will go, once for each."""
        import ray.train

        info = ray.train.get_preemption_info()
        self._asked_at = time.monotonic()
        if info is None or self._told >= (nodes := frozenset(info.preempted_node_ids)):
            return None
        self._told |= nodes
        ranks = ", ".join(map(str, info.preempted_ranks))
        return f"nodes will be taken away (rank {ranks} is there): saving now"
