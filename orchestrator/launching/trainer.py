"""Ray Train's trainer for an order: how many workers, with what, and when to give up. Imports Ray."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from orchestrator.config import RunConfig, ScaleConfig
from orchestrator.errors import StorageError
from orchestrator.launching.failures import Failure, lost_mark, read_failures, said_by, write_failure
from orchestrator.launching.recovery import Cause, Trouble, answer
from orchestrator.launching.room import Room
from orchestrator.launching.spared import SparingTrainer
from orchestrator.launching.worker import Order, work
from orchestrator.planning.plan import Plan, elastic_workers
from orchestrator.storage.filesystem import storage_filesystem
from orchestrator.storage.folder import RunFolder, write_json
from orchestrator.telemetry.records import JsonLines, read
from orchestrator.training.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from orchestrator.launching.probing import ProbeOrder

__all__ = ["Fit", "Recovery", "make_probe_trainer", "make_trainer", "spare_nodes"]

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
        callbacks=[Recovery(order, plan, config)],
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
    callbacks: Sequence[Any] = (),
) -> SparingTrainer:
    on_gpu = plan.device == "cuda"
    scale = order.job.config.scale
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": 1.0} if on_gpu else {})}
    # Annotations of Ray's configs lag behind here as well.
    look: dict[str, Any] = {"elastic_resize_monitor_interval_s": scale.resize_interval_s}
    return SparingTrainer(
        function,
        lasting=order.lasting,
        counts=counts,
        avoided=order.avoid,
        newest_step=partial(newest_step, order),
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
            callbacks=list(callbacks),
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


class Recovery(UserCallback):
    """Asks the policy about each failure, writes the answer down, and ends the attempt or leaves the restart to Ray.

    It lives in Ray Train's controller, on the driver's node, and so works in the driver's folder.
    """

    def __init__(self, order: Order, plan: Plan, config: RunConfig) -> None:
        self._folder = RunFolder(order.root)
        self._order = order
        self._plan = plan
        self._config = config

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called by Ray Train; raising here ends ``fit`` without a retry."""
        causes = [failure for failure in self._last_words(worker_exceptions) if not failure.is_collateral]
        trouble = self._trouble(causes, worker_exceptions)
        said = causes[0].message if causes else ""
        known = [record for record in read(self._folder.failure_log) if record["driver"] == self._order.driver]
        earlier = [Trouble(record["cause"], record["step"], record["node"]) for record in known]
        found = answer(
            [*earlier, trouble],
            self._config.failures,
            micro_batch=self._micro_batch(),
            avoidable=spare_nodes(self._plan, self._config.scale, self._order.avoid, fewest=self._order.fewest),
        )
        record = {"time": time.time(), "driver": self._order.driver, **asdict(trouble), "message": said}
        with JsonLines(self._folder.failure_log) as log:
            log.append({**record, "action": found.action, "reason": found.reason})
        self._publish()
        if found.action == "restart":
            lost_mark(self._folder).touch()
            if not self._order.nodes:
                return
        if found.action != "stop":  # Ray would wait for the same nodes: the fleet may know better ones
            change = {"reason": found.reason, "micro_batch": found.micro_batch, "avoid": list(found.avoid)}
            write_json(self._folder.change, change)
        raise RuntimeError(found.reason)

    def _last_words(self, worker_exceptions: dict[int, Exception]) -> list[Failure]:
        """What the workers said: by Ray, and in the folder or the store those that could not go on to say it."""
        if self._order.stored is not None:
            for stale in self._folder.failures.glob("rank-*.json"):
                stale.unlink()
            with contextlib.suppress(StorageError):
                self._order.stored.run(quick=True).failures(self._folder.failures)
        for failure in said_by(worker_exceptions):
            write_failure(self._folder, failure)
        return read_failures(self._folder)

    def _trouble(self, causes: Sequence[Failure], worker_exceptions: dict[int, Exception]) -> Trouble:
        lost = {rank: died for rank, error in worker_exceptions.items() if (died := _death(error)) is not None}
        if not causes and (self._had_notice() or any(death.preempted for death in lost.values())):
            cause: Cause = "preempted"
        else:
            cause = causes[0].kind if causes and causes[0].kind != "peer" else "worker_lost"
        ranks = [causes[0].rank] if causes else list(lost)
        nodes = self._nodes()
        places = {nodes[rank] for rank in ranks if rank < len(nodes)}
        if causes and causes[0].node:
            places = {causes[0].node}
        return Trouble(cause, newest_step(self._order), places.pop() if len(places) == 1 else None)

    def _nodes(self) -> Sequence[str]:
        """The node of each rank, as the last attempt wrote it down."""
        started = [record for record in read(self._folder.attempts) if record["event"] == "started"]
        return started[-1].get("nodes", ()) if started else ()

    def _had_notice(self) -> bool:
        """Whether the attempt that ended had been told that nodes will be taken away."""
        started = [record["attempt"] for record in read(self._folder.attempts) if record["event"] == "started"]
        warned = [record["attempt"] for record in read(self._folder.events) if record["event"] == "preemption"]
        return bool(started) and started[-1:] == warned[-1:]

    def _micro_batch(self) -> int:
        steps = read(self._folder.metrics)
        used = int(steps[-1]["micro_batch"]) if steps else self._plan.layout.micro_batch
        return min(used, self._order.micro_batch_limit or used)

    def _publish(self) -> None:
        if self._order.stored is not None:
            with contextlib.suppress(StorageError):  # the next attempt asks why there is one, if it can
                run = self._order.stored.run(quick=True)
                run.publish_failures(self._folder.failures)
                run.publish(self._folder.root, [self._folder.failure_log.name])


def newest_step(order: Order) -> int:
    """The step of the run's newest checkpoint; 0 where there is none, or the store does not say."""
    if order.stored is None:
        names = [path.name for path in list_checkpoints(RunFolder(order.root).checkpoints)]
    else:
        try:
            names = order.stored.run(quick=True).checkpoints()
        except StorageError:
            return 0
    return int(names[-1].split("-")[1]) if names else 0


def spare_nodes(
    plan: Plan, scale: ScaleConfig, avoided: Sequence[str] = (), *, fewest: int | None = None
) -> frozenset[str]:
    """The nodes without any one of which the others have room for all workers, or for the fewest that will do."""
    needed = fewest or (scale.workers if isinstance(scale.workers, int) else scale.workers[0])
    room = {
        node["NodeID"]: _room(node["Resources"], scale.cpus_per_worker, on_gpu=plan.device == "cuda")
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in avoided
    }
    return frozenset(node for node, own in room.items() if sum(room.values()) - own >= needed)


def _room(resources: Mapping[str, float], cpus_per_worker: float, *, on_gpu: bool) -> int:
    """For how many workers a node was built."""
    by_cpu = int(resources.get("CPU", 0.0) / cpus_per_worker + 1e-9)
    return min(by_cpu, int(resources.get("GPU", 0.0))) if on_gpu else by_cpu


def _death(error: Exception) -> RayActorError | None:
    """Ray's own word on a worker that is gone, or None for one that raised."""
    found = getattr(error, "health_check_failure", None) or error
    return found if isinstance(found, RayActorError) else None
