"""Ray Train's trainer for an order: how many workers, with what, and when to give up. Imports Ray."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.failure_handling import create_failure_policy

from orchestrator.config import RunConfig
from orchestrator.launching.controller import Recovery, newest_step, say_resized
from orchestrator.launching.elastic import Sharing
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
"""How long a group of workers may take to be placed where a smaller one would do; where there is room, a second.

A node just lost still counts as room, until Ray has missed it for long enough; the next try is without it.
"""


def make_trainer(order: Order, plan: Plan, config: RunConfig) -> SparingTrainer:
    """A ``TorchTrainer`` that runs ``order`` on the planned workers."""
    counts = elastic_workers(config)
    if counts:
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, f"{ELASTIC_START_S:g}")  # Ray hands it on
    budgets: dict[str, Any] = {  # the annotations lag behind
        # How often is decided by ``recovery.answer``; Ray only does as it is told.
        "max_failures": -1,
        "max_preemption_failures": -1,
        "controller_failure_limit": 0 if order.nodes else -1,  # no place there: the fleet is asked again
    }
    failures = FailureConfig(**budgets)
    return _trainer(
        work,
        order,
        order,
        plan,
        workers=(counts[0], counts[-1]) if counts else config.scale.workers,
        name="ray",
        failures=failures,
        recovery=Recovery(create_failure_policy(failures), order, plan, config),
        elastic=partial(
            Sharing,
            counts=counts,
            avoided=order.avoid,
            newest_step=partial(newest_step, order),
            say_resized=partial(say_resized, order),
        )
        if counts
        else None,
    )


def make_probe_trainer(probe: ProbeOrder) -> SparingTrainer:
    """A ``TorchTrainer`` that probes on the planned workers, and is not started again when they end."""
    from orchestrator.launching.probing import work as work_probe  # which imports this module

    workers = probe.plan.layout.workers
    failures = FailureConfig(max_failures=0)
    return _trainer(work_probe, probe, probe.order, probe.plan, workers=workers, name="probe", failures=failures)


def _trainer(
    function: Callable[[dict[str, Any]], None],
    given: Any,
    order: Order,
    plan: Plan,
    *,
    workers: Any,  # the annotations of Ray's configs lag behind what they take
    name: str,
    failures: FailureConfig,
    recovery: Recovery | None = None,
    elastic: Callable[[Any], Sharing] | None = None,
) -> SparingTrainer:
    on_gpu = plan.device == "cuda"
    scale = order.job.config.scale
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": 1.0} if on_gpu else {})}
    # Annotations of Ray's configs lag behind here as well.
    look: dict[str, Any] = {"elastic_resize_monitor_interval_s": scale.resize_interval_s}
    return SparingTrainer(
        function,
        lasting=order.lasting,
        recovery=recovery,
        elastic=elastic,
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
            failure_config=failures,
        ),
    )


class Fit:
    """``TorchTrainer.fit`` in a thread, so that the main thread hears signals and shows progress."""

    def __init__(self, trainer: SparingTrainer) -> None:
        self.error: BaseException | None = None
        scaling: Any = trainer.scaling_config  # the annotations lag behind
        fewest = scaling.min_workers if scaling.elasticity_enabled else 0
        driver = ray.get_runtime_context().get_job_id()
        self.room = Room(scaling.resources_per_worker, driver=driver, fewest=fewest)
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
