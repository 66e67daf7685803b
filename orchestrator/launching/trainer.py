"""Ray Train's trainer for an order: how many workers, with what, and when to give up. Imports Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.config import RunConfig
from orchestrator.launching.failures import lost_mark, read_failures
from orchestrator.launching.worker import Order, work
from orchestrator.planning.plan import Plan
from orchestrator.storage.folder import RunFolder

if TYPE_CHECKING:
    from orchestrator.launching.probing import ProbeOrder

__all__ = ["Fit", "StopOnError", "make_probe_trainer", "make_trainer"]


def make_trainer(order: Order, plan: Plan, config: RunConfig) -> TorchTrainer:
    """A ``TorchTrainer`` that runs ``order`` on the planned workers."""
    return _trainer(
        work,
        order,
        plan,
        config,
        workers=config.scale.workers,  # a range is elastic
        root=order.root,
        name="ray",
        restarts=config.failures.max_restarts,
        callbacks=[StopOnError(order.root)],
    )


def make_probe_trainer(order: ProbeOrder, plan: Plan, config: RunConfig) -> TorchTrainer:
    """A ``TorchTrainer`` that probes on the planned workers, and is not started again when they end."""
    from orchestrator.launching.probing import work as work_probe  # which imports this module

    root = order.order.root
    return _trainer(
        work_probe, order, plan, config, workers=plan.layout.workers, root=root, name="probe", restarts=0, callbacks=[]
    )


def _trainer(
    function: Callable[[dict[str, Any]], None],
    order: Any,
    plan: Plan,
    config: RunConfig,
    *,
    workers: Any,  # ScalingConfig's annotation knows no ranges
    root: Path,
    name: str,
    restarts: int,
    callbacks: list[Any],
) -> TorchTrainer:
    on_gpu = plan.device == "cuda"
    resources = {"CPU": config.scale.cpus_per_worker, **({"GPU": 1.0} if on_gpu else {})}
    return TorchTrainer(
        function,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RayRunConfig(
            # Ray keeps its own records here. It is given no checkpoints, so nothing in them decides what exists.
            name=name,
            storage_path=str(RunFolder(root).logs),
            failure_config=FailureConfig(max_failures=restarts),
            callbacks=callbacks,
        ),
    )


class Fit:
    """``TorchTrainer.fit`` in a thread, so that the main thread hears signals and shows progress."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self.error: BaseException | None = None
        self._trainer = trainer
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the workers are still at it."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self.error = error


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
