"""What of a run lives in Ray Train's controller: it asks the policy about each failure, and clears up. Imports Ray."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from orchestrator.config import RunConfig
from orchestrator.errors import StorageError
from orchestrator.launching.failures import (
    PEER_LOST,
    Failure,
    last_line,
    lost_mark,
    read_failures,
    said_by,
    say_ending,
    write_failure,
)
from orchestrator.launching.recovery import Answer, Cause, Trouble, answer
from orchestrator.launching.worker import Order
from orchestrator.planning.plan import Plan, elastic_workers
from orchestrator.storage.folder import RunFolder, write_json
from orchestrator.telemetry.records import JsonLines, read
from orchestrator.training.checkpoint import list_checkpoints

__all__ = ["Leftovers", "Recovery", "newest_step", "say_resized", "spare_nodes"]


class Recovery(FailurePolicy):
    """Asks the policy about each failure, writes its answer down, and ends the attempt or leaves the restart to Ray.

    It lives in Ray Train's controller, on the driver's node, and so works in the driver's folder. Ray asks it once for
    each failure, and for what stops its controller; what of that is no failure of workers is left to the ``usual``
    policy of Ray. Workers that are lost while they start are a failure like any other: Ray itself starts such a group
    again for ever where one is lost early, and ends the run where one is lost late.
    """

    def __init__(self, usual: FailurePolicy, order: Order, plan: Plan, config: RunConfig) -> None:
        super().__init__(usual.failure_config)
        self._usual = usual
        self._folder = RunFolder(order.root)
        self._order = order
        self._plan = plan
        self._config = config
        self._known = frozenset(self._left())
        """What workers of earlier attempts had left: it says nothing of a later failure."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Called by Ray Train's controller after a failure; RAISE ends ``fit``."""
        if isinstance(training_failed_error, WorkerGroupError):
            return self._after_losses(training_failed_error.worker_failures)
        if isinstance(training_failed_error, PreemptionError):
            return self._act("preempted", None, "")
        if (lost := _lost_at_start(training_failed_error)) is not None:
            preempted = isinstance(lost, RayActorError) and lost.preempted
            return self._act("preempted" if preempted else "start", _places({0: lost}).get(0), last_line(lost))
        return self._usual.make_decision(training_failed_error)

    def _after_losses(self, errors: Mapping[int, Exception]) -> FailureDecision:
        causes = [failure for failure in self._last_words(errors) if not failure.is_collateral]
        lost = {rank: died for rank, error in errors.items() if (died := _death(error)) is not None}
        if not causes and (self._had_notice() or any(death.preempted for death in lost.values())):
            cause: Cause = "preempted"
        else:
            cause = causes[0].kind if causes and causes[0].kind != "peer" else "worker_lost"
        nodes = dict(enumerate(self._nodes())) | _places(lost)
        places = {nodes[rank] for rank in ([causes[0].rank] if causes else lost) if rank in nodes}
        if causes and causes[0].node:
            places = {causes[0].node}
        said = causes[0].message if causes else next(map(last_line, lost.values()), "")
        return self._act(cause, places.pop() if len(places) == 1 else None, said, causes[0] if causes else None)

    def _act(self, cause: Cause, node: str | None, said: str, by: Failure | None = None) -> FailureDecision:
        """Ask the policy, write down its answer, and do as it says."""
        trouble = Trouble(cause, newest_step(self._order) or 0, node)
        found = self._asked(trouble, by)
        record = {"time": time.time(), "driver": self._order.driver, **asdict(trouble), "message": said}
        with JsonLines(self._folder.failure_log) as log:
            rank = None if by is None else by.rank
            log.append({**record, "rank": rank, "action": found.action, "reason": found.reason})
        if cause != "start":  # what had ended the attempt before that still holds
            say_ending(self._folder, cause)
        self._publish()
        if found.action == "restart":
            lost_mark(self._folder).touch()
            if not self._order.nodes:
                return FailureDecision.RETRY
        if found.action != "stop":  # Ray would wait for the same nodes: the fleet may know better ones
            change = {"reason": found.reason, "micro_batch": found.micro_batch, "avoid": list(found.avoid)}
            write_json(self._folder.change, change)
        return FailureDecision.RAISE

    def _asked(self, trouble: Trouble, by: Failure | None) -> Answer:
        known = [record for record in read(self._folder.failure_log) if record["driver"] == self._order.driver]
        earlier = [Trouble(record["cause"], record["step"], record["node"]) for record in known]
        return answer(
            [*earlier, trouble],
            self._config.failures,
            micro_batch=self._micro_batch(by),
            avoidable=spare_nodes(self._plan, self._config, self._order.avoid, fewest=self._order.fewest),
        )

    def _last_words(self, errors: Mapping[int, Exception]) -> list[Failure]:
        """What the workers said: by Ray, and in the folder or the store those that could not go on to say it."""
        told = said_by(errors)
        left = self._left()
        for failure in told:
            write_failure(self._folder, failure)
        found = [each for each in read_failures(self._folder) if each in told or each not in self._known]
        self._known = frozenset(left) | frozenset(told)
        return found

    def _left(self) -> list[Failure]:
        if self._order.stored is not None:
            for stale in self._folder.failures.glob("*.json"):
                stale.unlink()
            with contextlib.suppress(StorageError):
                self._order.stored.run(quick=True).failures(self._folder.failures)
        return read_failures(self._folder)

    def _nodes(self) -> Sequence[str]:
        """The node of each rank, as the last attempt wrote it down."""
        started = [record for record in read(self._folder.attempts) if record["event"] == "started"]
        return started[-1].get("nodes", ()) if started else ()

    def _had_notice(self) -> bool:
        """Whether the attempt that ended had been told that nodes will be taken away."""
        started = [record["attempt"] for record in read(self._folder.attempts) if record["event"] == "started"]
        warned = [record["attempt"] for record in read(self._folder.events) if record["event"] == "preemption"]
        return bool(started) and started[-1:] == warned[-1:]

    def _micro_batch(self, by: Failure | None) -> int:
        """The one that ran out of memory, as far as is known; else that of the last step."""
        if by is not None and by.micro_batch:
            return by.micro_batch
        steps = read(self._folder.metrics)
        used = int(steps[-1]["micro_batch"]) if steps else self._plan.layout.micro_batch
        return min(used, self._order.micro_batch_limit or used)

    def _publish(self) -> None:
        if self._order.stored is not None:
            with contextlib.suppress(StorageError):  # the next attempt asks why there is one, if it can
                run = self._order.stored.run(quick=True)
                run.publish_failures(self._folder.failures)
                run.publish(self._folder.root, [self._folder.failure_log.name])


class Leftovers(WorkerGroupCallback, ControllerCallback):
    """Ends groups of workers whose start failed late: Ray forgets them, and their place is theirs for good.

    The next group would wait for it without end. First among the callbacks: it is to know a group before another fails.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train when all workers are there."""
        self._group = worker_group

    def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002
        """Called before another group is started: one that had its day has been shut down."""
        self._clear()

    async def before_controller_shutdown(self) -> None:
        """Called at the end, when the last group has been shut down."""
        self._clear()

    def _clear(self) -> None:
        if self._group is not None and self._group.has_started():
            self._group.abort()
        self._group = None


def newest_step(order: Order) -> int | None:
    """The step of the run's newest checkpoint, 0 where there is none; None where the store does not say."""
    if order.stored is None:
        names = [path.name for path in list_checkpoints(RunFolder(order.root).checkpoints)]
    else:
        try:
            names = order.stored.run(quick=True).checkpoints()
        except StorageError:
            return None
    return int(names[-1].split("-")[1]) if names else 0


def say_resized(order: Order) -> None:
    """Leave word that the attempt is ended for no failure, but to give the run another number of workers."""
    folder = RunFolder(order.root)
    say_ending(folder, "resized")
    if order.stored is not None:
        with contextlib.suppress(StorageError):  # the next attempt takes its workers for lost
            order.stored.run(quick=True).publish_failures(folder.failures)


def spare_nodes(
    plan: Plan, config: RunConfig, avoided: Sequence[str] = (), *, fewest: int | None = None
) -> frozenset[str]:
    """The nodes without any one of which the others have room for all workers, or for the fewest that will do."""
    scale = config.scale
    needed = fewest or (scale.workers if isinstance(scale.workers, int) else elastic_workers(config)[0])
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


def _lost_at_start(error: Any) -> BaseException | None:
    """What was said of a worker that was lost before training began; None for whatever else stops Ray's controller."""
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    if isinstance(failure, WorkerGroupStartupFailedError):
        return failure.__cause__ or failure
    told_by_peer = isinstance(failure, RayTaskError) and PEER_LOST.search(last_line(failure))
    return failure if isinstance(failure, RayActorError) or told_by_peer else None


def _places(lost: Mapping[int, BaseException]) -> dict[int, str]:
    """The node on which each died, where it is the only one with the address in what Ray says of that."""
    nodes: dict[str, list[str]] = {}
    for node in ray.nodes():
        nodes.setdefault(node["NodeManagerAddress"], []).append(node["NodeID"])
    said = {rank: re.search(r"^\s*ip: (\S+)$", str(death), re.MULTILINE) for rank, death in lost.items()}
    found = {rank: nodes.get(match[1], []) for rank, match in said.items() if match}
    return {rank: there[0] for rank, there in found.items() if len(there) == 1}
