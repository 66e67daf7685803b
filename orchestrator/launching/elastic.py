"""How many workers an elastic run asks Ray for: numbers that share its batch, and no resize before it has saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

__all__ = ["Sharing"]


class Sharing(ElasticScalingPolicy):
    """As many workers as there is room for, on nodes that are not ``avoided``, and as are among ``counts``.

    Ray ends all workers for a resize, without notice: what was done since the newest checkpoint is done again. So a
    running group is resized only once there is a newer checkpoint than when room was found for it, by ``newest_step``,
    which is None where that is not known; ``say_resized`` is called before.
    """

    def __init__(
        self,
        scaling_config: Any,
        counts: Sequence[int],
        avoided: Collection[str],
        newest_step: Callable[[], int | None],
        say_resized: Callable[[], None],
    ) -> None:
        super().__init__(scaling_config)
        self._counts = counts
        self._avoided = avoided
        self._newest_step = newest_step
        self._say_resized = say_resized
        self._found_at: int | None = None
        """The newest checkpoint's step when room was found."""

    def _get_reserved_resources(self) -> Any:
        """By node. Ray reserves for a run on whichever nodes come first, be they those that its workers may not go to:
        it would be given more workers than there is room for, again and again, or none. Then all other nodes count.
        """
        if not self._avoided:
            return super()._get_reserved_resources()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in self._avoided]
        return {node["NodeID"]: node["Resources"] for node in nodes}

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= room), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Called by Ray Train's controller each time it has looked at its workers."""
        newest = None if self._found_at is None else self._newest_step()
        saved = self._found_at is not None and newest is not None and newest > self._found_at
        if self._found_at is not None and not saved:
            return NoopDecision()
        if saved:
            self._found_at, self._latest_monitor_time = None, float("-inf")  # is there still room?
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        if saved:
            self._say_resized()
            return decision
        self._found_at = self._newest_step()  # of a store that does not say: it is asked again at the next look
        return NoopDecision()
