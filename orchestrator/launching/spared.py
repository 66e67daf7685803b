"""Ray's ``TorchTrainer`` without the helpers that a run has no use for: each is a Python process. Imports Ray."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer

__all__ = ["SparingTrainer"]


class SparingTrainer(TorchTrainer):
    """A ``TorchTrainer`` with no manager of Ray datasets, for it is given none.

    On a cluster that lives and dies with the run (``lasting`` false) it also does without

    - the cleaner, which removes the workers' placement group where the controller has died. Here both go together. It
      asks the dashboard, which there is none of, so that the end of every run would wait 12 s for it; and where another
      cluster on this machine has one, it asks that, hears of no such controller, and takes the workers away.
    - the coordinator of requests for more nodes, which never come.
    """

    def __init__(self, *args: Any, lasting: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lasting = lasting

    def _create_default_callbacks(self) -> list[Any]:
        spared = (DatasetsCallback,) if self._lasting else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, spared)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = parts["scaling_policy"]
        if not self._lasting and type(policy) is FixedScalingPolicy:
            parts["scaling_policy"] = _FixedNodes(policy.scaling_config)
        return super()._initialize_and_run_controller(**parts)


class _FixedNodes(FixedScalingPolicy):
    """As many workers as were asked for, on the nodes that there are."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody for nodes."""

    def _maybe_send_resource_request(self) -> None:
        """Ask nobody for nodes."""
