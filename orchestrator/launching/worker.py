"""What each Ray Train worker runs: from the job to a trained model, with every failure written down."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.job import Job
from orchestrator.launching.drains import DrainNotice
from orchestrator.launching.failures import WorkerFailedError, describe, hanging, write_failure
from orchestrator.launching.hub import HubClient, HubSettings
from orchestrator.launching.limits import container_limits
from orchestrator.launching.places import Attempt, Place, SharedPlace, Stored, StoredPlace
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.probe import Probe
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.policy import make_policy
from orchestrator.storage.folder import RunFolder, write_json
from orchestrator.storage.tally import REQUESTS
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.metrics import ASKED_FOR
from orchestrator.telemetry.observing import RunFacts, observe_place, observe_requests
from orchestrator.telemetry.publisher import Publisher
from orchestrator.telemetry.records import read

__all__ = ["Order", "device_of", "memory_share", "output_in", "work"]

HANG_GRACE_S = 5.0


@dataclass(frozen=True)
class Order:
    """What the driver hands to every worker."""

    job: Job
    root: Path
    shape: ClusterShape
    driver: str
    """Names the driver that gave the order: a worker whose driver has been replaced does not begin."""
    profile: Profile | None = None
    """The model as the driver traced it: from the same numbers every worker makes the same plan."""
    probe: Probe | None = None
    """What was measured of it."""
    stored: Stored | None = None
    """Where the run lies, if that is a store; ``root`` is then the driver's own folder."""
    micro_batch_limit: int | None = None
    """The largest micro batch, after a larger one ran out of memory."""
    avoid: tuple[str, ...] = ()
    """Ids of nodes on which no worker is to be placed."""
    nodes: tuple[str, ...] = ()
    """The node of each worker, where a fleet says on which; otherwise Ray chooses."""
    fewest: int | None = None
    """Workers with which it can do, where a fleet says how many it has."""
    told: str = ""
    """Why the fleet gives it these."""
    cause: str = ""
    """What ended the attempt before, where its driver knows better than the records."""
    pause_share: float | None = None
    """Of its length after which it is to save and stop, at an evaluation."""
    lasting: bool = False
    """Whether the cluster outlives the run, and nodes may be taken away after notice: not so where it is embedded."""


def work(order: dict[str, Order]) -> None:
    """Entry point of a worker; ``order["order"]`` is the ``Order``."""
    import ray.train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    try:
        place = _place(order["order"], rank)
    except OrchestratorError as error:
        raise WorkerFailedError(describe(error, rank=rank, step=0)) from error
    try:
        with output_in(place.log):
            worker = _Worker(order["order"], place, rank, world_size)
            try:
                worker.train()
            except BaseException as error:
                failure = describe(error, rank=rank, step=worker.step + 1, micro_batch=worker.micro_batch)
                write_failure(place.folder, failure)
                raise WorkerFailedError(failure) from error
    finally:
        place.leave()


def _place(order: Order, rank: int) -> Place:
    if order.stored is not None:
        return StoredPlace(order.stored, rank)
    return SharedPlace(order.root, rank, order.driver)


class _Worker:
    def __init__(self, order: Order, place: Place, rank: int, world_size: int) -> None:
        self._order = order
        self._place = place
        self._folder = place.folder
        self._rank = rank
        self._world_size = world_size
        self._recorder: Any = None
        self._publisher: Publisher | None = None
        self._memory: Any = None

    @property
    def micro_batch(self) -> int:
        """The one of the step that it is in; 0 before the first."""
        return 0 if self._memory is None else int(self._memory.running)

    @property
    def step(self) -> int:
        """The last optimizer step that was taken."""
        return 0 if self._recorder is None else int(self._recorder.last_step)

    def train(self) -> None:
        """Train to the end; rank 0 leaves the outcome in the run's folder."""
        from orchestrator.training.loop import train

        run = self._training(*self._begin())
        try:
            outcome = train(run)
        finally:
            run.watchdog.close()
            if self._publisher is not None:
                self._publisher.close()
        run.recorder.end(outcome.state, outcome.reason)
        state = "stopped" if outcome.stopped else "finished"
        said = {"state": state, "reason": outcome.reason, "last": outcome.state.to_dict()}
        self._place.end(said if self._rank == 0 else None)

    def _begin(self) -> tuple[Attempt, list[str]]:
        """Rank 0 ends every earlier attempt's right to write and numbers this one; also the node of each rank."""
        import ray
        import torch.distributed as dist

        word: list[Any] = [self._place.begin() if self._rank == 0 else None]
        dist.broadcast_object_list(word, src=0)
        nodes: list[Any] = [None] * self._world_size
        dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
        found: Attempt = word[0]
        return dataclasses.replace(found, cause=self._order.cause or found.cause), nodes

    def _training(self, attempt: Attempt, nodes: Sequence[str]) -> Any:
        from orchestrator.training.loop import NoNotice, Training
        from orchestrator.training.recorder import Recorder
        from orchestrator.training.scheduler import Scheduler
        from orchestrator.training.tracing import Tracer
        from orchestrator.training.watchdog import Watchdog

        guard = self._place.guard(attempt.token)
        _prepare_on_this_host(self._order.job)
        train_set, evaluation_set = _datasets(self._order.job)
        asked = _for_workers(self._order.job.config, self._world_size)
        config = _within(asked, self._order.micro_batch_limit)
        # A limit is no pin: where the job leaves the layout open, the gauge alone keeps the policy below it.
        is_open = asked.layout.micro_batch == asked.layout.accumulation == "auto"
        pinned = asked if is_open else config
        plan = make_plan(
            config,
            self._order.shape,
            train_samples=len(train_set),
            evaluation_samples=0 if evaluation_set is None else len(evaluation_set),
            profile=self._order.profile,
            probe=self._order.probe,
        )
        if self._rank == 0:
            write_json(self._folder.plan, plan.to_dict())
        device, share = device_of(plan), self._order.pause_share
        probe = self._order.probe
        measured = probe if probe is not None and probe.matches(plan) else None
        self._memory = memory = self._gauge(device, plan, measured)
        self._publisher = self._publish(config, attempt.number, str(device), memory.observe)
        self._recorder = Recorder(
            self._folder,
            guard,
            plan,
            rank=self._rank,
            attempt=attempt.number,
            cause=attempt.cause,
            facts=_facts(config, plan),
            nodes=nodes,
            publisher=self._publisher,
            keep=self._place.keep,
        )
        if self._order.told:
            self._recorder.event("fleet", f"the fleet: {self._order.told}")
        return Training(
            config=config,
            plan=plan,
            task=self._order.job.task,
            engine=self._engine(config, plan, device, nodes),
            train_set=train_set,
            evaluation_set=evaluation_set,
            checkpoints=self._place.checkpoints(config, plan.layout_key, self._recorder),
            recorder=self._recorder,
            scheduler=Scheduler(
                policy=make_policy(pinned),
                config=pinned,
                plan=plan,
                memory=memory,
                decides=self._rank == 0,
            ),
            tracer=Tracer(config.telemetry.profile if self._rank == 0 else None, self._folder.root / "traces", rank=0),
            rank=self._rank,
            times=StepTimes() if measured is None else measured.step_times(),
            stop_requested=self._place.stop_requested,
            watchdog=Watchdog(self._hangs, factor=config.failures.hang_factor, least_s=config.failures.hang_least_s),
            pause_at=math.inf if share is None or plan.length is None else share * plan.length,
            notice=DrainNotice() if self._order.lasting else NoNotice(),
            **_past(self._folder, attempt.cause),
        )

    def _gauge(self, device: Any, plan: Plan, measured: Probe | None) -> Any:
        """What holds the micro batch down: what ran out of memory in an attempt or the probe, and the probe's peaks."""
        from orchestrator.training.memory import MemoryGauge

        limits = [self._order.micro_batch_limit, measured.refused - 1 if measured and measured.refused else None]
        limit = min((each for each in limits if each is not None), default=None)
        memory = MemoryGauge(device, memory_share(device, plan), limit=limit)
        if measured is not None:
            memory.peaks.update(measured.peaks)
        return memory

    def _engine(self, config: RunConfig, plan: Plan, device: Any, nodes: Sequence[str]) -> Any:
        """Find out how well all ranks are, before the engine takes the device; leave a slow node where asked to.

        Raises:
            UnhealthyNodeError: on the rank whose node is to be left; the others wait until they are ended.
        """
        from orchestrator.training.engine import Engine
        from orchestrator.training.health import examine, leave_slow_node

        found = examine(device, self._place.disk, config.health, nodes=nodes)
        self._recorder.health(self._rank, found)
        if config.health.exclude:
            leave_slow_node(found, functools.partial(self._spare, plan), self._recorder.event)
        return Engine(self._order.job.task, config, plan, device=device)

    def _spare(self, plan: Plan) -> frozenset[str]:
        from orchestrator.launching.controller import spare_nodes  # which imports this module

        return spare_nodes(plan, self._order.job.config, self._order.avoid, fewest=self._order.fewest)

    def _hangs(self, seen: str) -> None:
        """In the watchdog's thread: leave word of where every thread stands, and end this process.

        The other ranks' watchdogs wake at the same time; they get a moment to do the same.
        """
        from orchestrator.training.watchdog import stacks

        found = self._folder.logs / f"stacks-{self._rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        failure = hanging(f"{seen}; see logs/{found.name}", stacks(), rank=self._rank, step=self.step + 1)
        found.write_text(failure.trace)
        write_failure(self._folder, failure)
        self._place.tell(found)
        time.sleep(HANG_GRACE_S)
        os._exit(1)

    def _publish(
        self, config: RunConfig, attempt: int, device: str, sample: Callable[[Meter], None]
    ) -> Publisher | None:
        """What sends this rank's metrics to the cluster's hub, from now to the end."""
        if not config.telemetry.enabled:
            return None
        client = HubClient(HubSettings.of(config.telemetry))
        source = str(self._rank)
        everything = functools.partial(_sample, sample)
        publisher = Publisher(client, run=config.name, source=source, attempt=attempt, sample=everything)
        publisher.note(observe_place, socket.gethostname(), device)
        return publisher


def _sample(memory: Callable[[Meter], None], meter: Meter) -> None:
    """What is only read, once a second: memory, and the trouble that this process had with storage."""
    memory(meter)
    for operation, trouble in REQUESTS.troubles().items():
        observe_requests(meter, operation, retries=trouble.retries, errors=trouble.errors)


def _datasets(job: Job) -> tuple[Any, Any]:
    """The task's training set and, where it has one, the held-out set, opened as the config says."""
    from orchestrator.training.data import open_dataset

    found = job.task.datasets()
    train_set = open_dataset(found.train, job.config)
    return train_set, None if found.evaluation is None else open_dataset(found.evaluation, job.config)


def _prepare_on_this_host(job: Job) -> None:
    """The job's prepare step, by one worker of each host, before any opens the data: the driver's host may be another.

    Raises:
        DataError: the data cannot be written.
    """
    import ray.train
    import torch.distributed as dist

    if job.prepare is None:
        return
    if ray.train.get_context().get_local_rank() == 0:
        try:
            job.prepare()
        except OSError as error:
            raise DataError(f"the job's prepare step failed on {socket.gethostname()}: {error}") from error
    dist.barrier()


def _facts(config: RunConfig, plan: Plan) -> RunFacts:
    """FLOPs as the config has them, or else as the planner traced them; the peak of a CPU is never guessed."""
    telemetry, costing = config.telemetry, plan.costing
    flops, peak = telemetry.flops_per_sample, telemetry.peak_flops_per_s
    if costing is not None:
        flops = flops or costing.flops_per_sample
        accelerator = accelerator_named(costing.accelerator, config.planning.accelerator)
        peak = peak or (None if accelerator.is_cpu else accelerator.flops(plan.precision) or None)
    return RunFacts(
        reference_batch=plan.reference_batch,
        tokens_per_sample=telemetry.tokens_per_sample or 0.0,
        flops_per_sample=flops,
        peak_flops_per_s=peak,
    )


def _past(folder: RunFolder, cause: str) -> dict[str, Any]:
    """How often earlier attempts failed, and for how long the run has lived; this attempt is not written down yet.

    ``cause`` is what ended the one before. What was done on purpose is no failure.
    """
    attempts = read(folder.attempts)
    ends = [one.get("cause", "") for one in attempts if one["event"] == "started"][1:] + ([cause] if attempts else [])
    failures = sum(1 for end in ends if end not in ASKED_FOR)
    return {"failures": failures, "lived_s": time.time() - attempts[0]["time"] if attempts else 0.0}


def _for_workers(config: RunConfig, workers: int) -> RunConfig:
    """The config at the number of workers that Ray gave: an elastic range becomes a number."""
    return config.model_copy(update={"scale": config.scale.model_copy(update={"workers": workers})})


def _within(config: RunConfig, limit: int | None) -> RunConfig:
    """With the largest micro batch within ``limit`` that divides a worker's share of the same global batch."""
    if limit is None:
        return config
    workers = config.scale.workers
    assert isinstance(workers, int)
    batch = config.recipe.batch if config.layout.global_batch == "auto" else config.layout.global_batch
    share = max(1, batch // workers)
    micro_batch = max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
    layout = {"global_batch": batch, "micro_batch": micro_batch, "accumulation": "auto"}
    return config.model_copy(update={"layout": config.layout.model_copy(update=layout)})


def device_of(plan: Plan) -> Any:
    """This worker's device. Never the CPU in silence where an accelerator was planned."""
    import torch
    from ray.train.torch import get_device

    device = get_device()
    if device.type != plan.device:
        raise RuntimeError(f"planned for {plan.device}, but this worker's torch sees {device.type}: check its drivers")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def memory_share(device: Any, plan: Plan) -> int:
    """Bytes this worker may take: its accelerator's, or its part of what container or machine offer."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = container_limits().memory_bytes or psutil.virtual_memory().total
    return int(total / math.ceil(plan.layout.workers / plan.nodes))


@contextmanager
def output_in(path: Path) -> Iterator[None]:
    """Send all this process prints, in any language, to ``path``."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, file in zip((1, 2), saved, strict=True):
                os.dup2(file, target)
                os.close(file)
