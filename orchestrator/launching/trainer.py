"""Ray Train's trainer for an order: how many workers, with what, and when to give up. Imports Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.config import RunConfig
from orchestrator.launching.failures import lost_mark, read_failures
from orchestrator.launching.worker import Order, work
from orchestrator.planning.plan import Plan
from orchestrator.storage.folder import RunFolder

__all__ = ["StopOnError", "make_trainer"]


def make_trainer(order: Order, plan: Plan, config: RunConfig) -> TorchTrainer:
    """A ``TorchTrainer`` that runs ``order`` on the planned workers."""
    on_gpu = plan.device == "cuda"
    resources = {"CPU": config.scale.cpus_per_worker, **({"GPU": 1.0} if on_gpu else {})}
    workers: Any = config.scale.workers  # a range is elastic; ScalingConfig's annotation lags behind
    return TorchTrainer(
        work,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RayRunConfig(
            # Ray keeps its own records here. It is given no checkpoints, so nothing in them decides what exists.
            name="ray",
            storage_path=str(RunFolder(order.root).logs),
            failure_config=FailureConfig(max_failures=config.failures.max_restarts),
            callbacks=[StopOnError(order.root)],  # type: ignore[list-item]
        ),
    )


class StopOnError(UserCallback):
    """Ends a run at once where a retry would meet the same error; lost workers are left to Ray's restarts."""

    def __init__(self, root: Path) -> None:
        self._folder = RunFolder(root)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called in Ray Train's controller; raising there ends the run without a retry."""
        causes = [failure for failure in read_failures(self._folder) if not failure.is_collateral]
        if causes:
            raise RuntimeError(f"rank {causes[0].rank}: {causes[0].error}: not retried")
        lost_mark(self._folder).touch()
