"""Ray's ``TorchTrainer`` as a run needs it. Imports Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer

from orchestrator.launching.controller import Leftovers, Recovery
from orchestrator.launching.elastic import Sharing

__all__ = ["SparingTrainer"]


class SparingTrainer(TorchTrainer):
    """A ``TorchTrainer`` with no manager of Ray datasets, for it is given none.

    On a cluster that lives and dies with the run (``lasting`` false) it also does without

    - the cleaner, which removes the workers' placement group where the controller has died. Here both go together. It
      asks the dashboard, which there is none of, so that the end of every run would wait 12 s for it; and where another
      cluster on this machine has one, it asks that, hears of no such controller, and takes the workers away.
    - the coordinator of requests for more nodes, which never come.

    What to do about a failure is ``recovery``'s to say, where there is one; an elastic run grows and shrinks by what
    ``elastic`` makes of its scaling config. Groups whose start failed are cleared away.
    """

    def __init__(
        self,
        *args: Any,
        lasting: bool,
        recovery: Recovery | None,
        elastic: Callable[[Any], Sharing] | None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._lasting = lasting
        self._recovery = recovery
        self._elastic = elastic

    def _create_default_callbacks(self) -> list[Any]:
        spared = (DatasetsCallback,) if self._lasting else (DatasetsCallback, PlacementGroupCleanerCallback)
        usual = [each for each in super()._create_default_callbacks() if not isinstance(each, spared)]
        return [Leftovers(), *usual]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = parts["scaling_policy"]
        if self._recovery is not None:
            parts["failure_policy"] = self._recovery
        if not self._lasting and type(policy) is FixedScalingPolicy:
            parts["scaling_policy"] = _FixedNodes(policy.scaling_config)
        if self._elastic is not None:
            parts["scaling_policy"] = self._elastic(policy.scaling_config)
        return super()._initialize_and_run_controller(**parts)


class _FixedNodes(FixedScalingPolicy):
    """As many workers as were asked for, on the nodes that there are."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody for nodes."""

    def _maybe_send_resource_request(self) -> None:
        """Ask nobody for nodes."""
