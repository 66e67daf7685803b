"""Ray's ``TorchTrainer`` as a run needs it: without helpers that it has no use for, and elastic in steps that share its
batch. Imports Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer

__all__ = ["SparingTrainer"]


class SparingTrainer(TorchTrainer):
    """A ``TorchTrainer`` with no manager of Ray datasets, for it is given none.

    On a cluster that lives and dies with the run (``lasting`` false) it also does without

    - the cleaner, which removes the workers' placement group where the controller has died. Here both go together. It
      asks the dashboard, which there is none of, so that the end of every run would wait 12 s for it; and where another
      cluster on this machine has one, it asks that, hears of no such controller, and takes the workers away.
    - the coordinator of requests for more nodes, which never come.

    An elastic run is given only numbers of workers that are among ``counts``, and grows when it has just saved.
    """

    def __init__(
        self, *args: Any, lasting: bool, counts: Sequence[int], newest_step: Callable[[], int], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._lasting = lasting
        self._counts = counts
        self._newest_step = newest_step

    def _create_default_callbacks(self) -> list[Any]:
        spared = (DatasetsCallback,) if self._lasting else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, spared)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = parts["scaling_policy"]
        if not self._lasting and type(policy) is FixedScalingPolicy:
            parts["scaling_policy"] = _FixedNodes(policy.scaling_config)
        if isinstance(policy, ElasticScalingPolicy):
            parts["scaling_policy"] = _Sharing(policy.scaling_config, self._counts, self._newest_step)
        return super()._initialize_and_run_controller(**parts)


class _FixedNodes(FixedScalingPolicy):
    """As many workers as were asked for, on the nodes that there are."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody for nodes."""

    def _maybe_send_resource_request(self) -> None:
        """Ask nobody for nodes."""


class _Sharing(ElasticScalingPolicy):
    """As many workers as there is room for and as can share the batch.

    Ray ends all workers for a resize, without notice: what was done since the newest checkpoint is done again. So a
    running group is resized only once there is a newer checkpoint than when room was found for it.
    """

    def __init__(self, scaling_config: Any, counts: Sequence[int], newest_step: Callable[[], int]) -> None:
        super().__init__(scaling_config)
        self._counts = counts
        self._newest_step = newest_step
        self._found_at: int | None = None
        """The newest checkpoint's step when room was found."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= room), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Called by Ray Train's controller each time it has looked at its workers."""
        saved = self._found_at is not None and self._newest_step() > self._found_at
        if self._found_at is not None and not saved:
            return NoopDecision()
        if saved:
            self._found_at, self._latest_monitor_time = None, float("-inf")  # is there still room?
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if saved or not isinstance(decision, ResizeDecision):
            return decision
        self._found_at = self._newest_step()
        return NoopDecision()
