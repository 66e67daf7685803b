"""Ray Train's trainer for an order: how many workers, with what, and when to give up. Imports Ray."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from orchestrator.config import RunConfig
from orchestrator.launching.controller import Recovery, newest_step
from orchestrator.launching.room import Room
from orchestrator.launching.spared import SparingTrainer
from orchestrator.launching.worker import Order, work
from orchestrator.planning.plan import Plan, elastic_workers
from orchestrator.storage.filesystem import storage_filesystem
from orchestrator.storage.folder import RunFolder

if TYPE_CHECKING:
    from orchestrator.launching.probing import ProbeOrder

__all__ = ["Fit", "make_probe_trainer", "make_trainer"]

ELASTIC_START_S = 15.0
"""How long a group of workers may take to be placed where a smaller one would do; where there is room, a second."""


def make_trainer(order: Order, plan: Plan, config: RunConfig) -> SparingTrainer:
    """A ``TorchTrainer`` that runs ``order`` on the planned workers."""
    counts = elastic_workers(config)
    if counts:
        # A node just lost still counts as room, until Ray has missed it for long enough: workers for it are given up
        # on after a minute, and the next try is without it. Ray hands this on to its controller.
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, f"{ELASTIC_START_S:g}")
    return _trainer(
        work,
        order,
        order,
        plan,
        workers=config.scale.workers,  # a range is elastic
        counts=counts,
        name="ray",
        # How often is decided by ``recovery.answer``; Ray only does as it is told.
        budgets={
            "max_failures": -1,
            "max_preemption_failures": config.failures.max_preemptions,
            **({"controller_failure_limit": 0} if order.nodes else {}),  # no place there: the fleet is asked again
        },
        recovery=Recovery(order, plan, config),
    )


def make_probe_trainer(probe: ProbeOrder) -> SparingTrainer:
    """A ``TorchTrainer`` that probes on the planned workers, and is not started again when they end."""
    from orchestrator.launching.probing import work as work_probe  # which imports this module

    workers = probe.plan.layout.workers
    return _trainer(
        work_probe, probe, probe.order, probe.plan, workers=workers, name="probe", budgets={"max_failures": 0}
    )


def _trainer(
    function: Callable[[dict[str, Any]], None],
    given: Any,
    order: Order,
    plan: Plan,
    *,
    workers: Any,  # the annotations of Ray's configs lag behind what they take
    name: str,
    budgets: dict[str, Any],
    counts: Sequence[int] = (),
    recovery: Recovery | None = None,
) -> SparingTrainer:
    on_gpu = plan.device == "cuda"
    scale = order.job.config.scale
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": 1.0} if on_gpu else {})}
    # Annotations of Ray's configs lag behind here as well.
    look: dict[str, Any] = {"elastic_resize_monitor_interval_s": scale.resize_interval_s}
    callbacks: list[Any] = [] if recovery is None else [recovery]
    return SparingTrainer(
        function,
        lasting=order.lasting,
        counts=counts,
        avoided=order.avoid,
        newest_step=partial(newest_step, order),
        recovery=recovery,
        train_loop_config={"order": given},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            **look,
            **_elsewhere(order),
        ),
        run_config=RayRunConfig(
            # Ray keeps its own records here. It is given no checkpoints, so nothing in them decides what exists.
            name=name,
            **_rays_own(order),
            failure_config=FailureConfig(**budgets),
            callbacks=callbacks,
        ),
    )


class Fit:
    """``TorchTrainer.fit`` in a thread, so that the main thread hears signals and shows progress."""

    def __init__(self, trainer: SparingTrainer) -> None:
        self.error: BaseException | None = None
        scaling: Any = trainer.scaling_config  # the annotations lag behind
        fewest = scaling.min_workers if scaling.elasticity_enabled else 0
        self.room = Room(scaling.resources_per_worker, fewest=fewest)
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


def _elsewhere(order: Order) -> dict[str, Any]:
    """Where to place workers, or where not to."""
    if order.nodes:
        return {"label_selector": [{"ray.io/node-id": node} for node in order.nodes]}
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(order.avoid)})"}} if order.avoid else {}


def _rays_own(order: Order) -> dict[str, Any]:
    """Where Ray keeps its own records: a place that every machine of the cluster sees."""
    if order.stored is None:
        return {"storage_path": str(RunFolder(order.root).logs)}
    filesystem, path = storage_filesystem(f"{order.stored.uri}/logs", order.stored.storage)
    return {"storage_filesystem": filesystem, "storage_path": path}
