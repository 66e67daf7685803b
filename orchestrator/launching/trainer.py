"""Ray Train's trainer for an order: how many workers, with what, and when to give up. Imports Ray."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.config import RunConfig
from orchestrator.errors import StorageError
from orchestrator.launching.failures import lost_mark, read_failures, said_by, write_failure
from orchestrator.launching.places import Stored
from orchestrator.launching.worker import Order, work
from orchestrator.planning.plan import Plan
from orchestrator.storage.filesystem import storage_filesystem
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
            **_rays_own(order),
            failure_config=FailureConfig(max_failures=config.failures.max_restarts),
            callbacks=[StopOnError(order.root, order.stored)],  # type: ignore[list-item]
        ),
    )


def _rays_own(order: Order) -> dict[str, Any]:
    """Where Ray keeps its own records: a place that every machine of the cluster sees."""
    if order.stored is None:
        return {"storage_path": str(RunFolder(order.root).logs)}
    filesystem, path = storage_filesystem(f"{order.stored.uri}/logs", order.stored.storage)
    return {"storage_filesystem": filesystem, "storage_path": path}


class StopOnError(UserCallback):
    """Ends a run at once where a retry would meet the same error; lost workers are left to Ray's restarts."""

    def __init__(self, root: Path, stored: Stored | None = None) -> None:
        self._folder = RunFolder(root)
        self._stored = stored

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called in Ray Train's controller; raising there ends the run without a retry."""
        if self._stored is not None:  # in a shared folder the next attempt does this, once it has fenced off this one
            for stale in self._folder.failures.glob("rank-*.json"):
                stale.unlink()
        for failure in said_by(worker_exceptions):
            write_failure(self._folder, failure)
        if self._stored is not None:
            with contextlib.suppress(StorageError):  # the next attempt asks why there is one, if it can
                self._stored.run(quick=True).publish_failures(self._folder.failures)
        causes = [failure for failure in read_failures(self._folder) if not failure.is_collateral]
        if causes and causes[0].kind != "storage":
            raise RuntimeError(f"rank {causes[0].rank}: {causes[0].error}: not retried")
        lost_mark(self._folder).touch()
