"""What each Ray Train worker runs: from the job to a trained model, with every failure written down."""

from __future__ import annotations

import functools
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import DataError
from orchestrator.job import Job
from orchestrator.launching.failures import describe, restart_cause, write_failure
from orchestrator.launching.hub import HubClient, HubSettings
from orchestrator.launching.limits import container_limits
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.probe import Probe
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.policy import make_policy
from orchestrator.storage.fence import Fence
from orchestrator.storage.folder import RunFolder, write_json
from orchestrator.storage.tally import REQUESTS
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.observing import RunFacts, observe_place, observe_requests
from orchestrator.telemetry.publisher import Publisher
from orchestrator.telemetry.records import read

__all__ = ["Order", "device_of", "memory_share", "output_in", "work"]


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


def work(order: dict[str, Order]) -> None:
    """Entry point of a worker; ``order["order"]`` is the ``Order``."""
    import ray.train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    folder = RunFolder(order["order"].root)
    with output_in(folder.logs / f"worker-{rank}.log"):
        worker = _Worker(order["order"], folder, rank, world_size)
        try:
            worker.train()
        except BaseException as error:
            write_failure(folder, describe(error, rank=rank, step=worker.step + 1))
            raise


class _Worker:
    def __init__(self, order: Order, folder: RunFolder, rank: int, world_size: int) -> None:
        self._order = order
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._recorder: Any = None
        self._publisher: Publisher | None = None

    @property
    def step(self) -> int:
        """The last optimizer step that was taken."""
        return 0 if self._recorder is None else int(self._recorder.last_step)

    def train(self) -> None:
        """Train to the end; rank 0 leaves the outcome in the run's folder."""
        from orchestrator.training.loop import train

        fence, attempt, cause = self._fence()
        run = self._training(fence, attempt, cause)
        try:
            outcome = train(run)
        finally:
            if self._publisher is not None:
                self._publisher.close()
        if self._rank == 0:
            run.recorder.end(outcome.state, outcome.reason)
            state = "stopped" if outcome.stopped else "finished"
            write_json(
                self._folder.outcome, {"state": state, "reason": outcome.reason, "last": outcome.state.to_dict()}
            )
        fence.release()

    def _fence(self) -> tuple[Fence, int, str]:
        """Rank 0 ends every earlier attempt's right to write and numbers this one; all ranks join it."""
        import torch.distributed as dist

        word: list[Any] = [None]
        if self._rank == 0:
            token = Fence.begin(self._folder.control, driver=self._order.driver)
            attempts = read(self._folder.attempts)
            started = sum(record["event"] == "started" for record in attempts)
            cause = restart_cause(self._folder, attempts)
            for stale in self._folder.failures.glob("rank-*.json"):
                stale.unlink()
            word = [(token, started + 1, cause)]
        dist.broadcast_object_list(word, src=0)
        token, attempt, cause = word[0]
        return Fence(self._folder.control, token), attempt, cause

    def _training(self, fence: Fence, attempt: int, cause: str) -> Any:
        from orchestrator.training.checkpoint import Checkpoints
        from orchestrator.training.data import open_dataset
        from orchestrator.training.engine import Engine
        from orchestrator.training.loop import Training
        from orchestrator.training.memory import MemoryGauge
        from orchestrator.training.recorder import Recorder
        from orchestrator.training.scheduler import Scheduler
        from orchestrator.training.tracing import Tracer

        task = self._order.job.task
        _prepare_on_this_host(self._order.job)
        datasets = task.datasets()
        train_set = open_dataset(datasets.train, self._order.job.config)
        evaluation_set = (
            None if datasets.evaluation is None else open_dataset(datasets.evaluation, self._order.job.config)
        )
        config = _for_workers(self._order.job.config, self._world_size)
        evaluation_samples = 0 if evaluation_set is None else len(evaluation_set)
        plan = make_plan(
            config,
            self._order.shape,
            train_samples=len(train_set),
            evaluation_samples=evaluation_samples,
            profile=self._order.profile,
            probe=self._order.probe,
        )
        if self._rank == 0:
            write_json(self._folder.plan, plan.to_dict())
        device = device_of(plan)
        memory = MemoryGauge(device, memory_share(device, plan))
        probe = self._order.probe
        measured = probe if probe is not None and probe.matches(plan) else None
        if measured is not None:
            memory.peaks.update(measured.peaks)
            memory.refused = measured.refused
        self._publisher = self._publish(config, attempt, str(device), memory.observe)
        self._recorder = Recorder(
            self._folder,
            fence,
            plan,
            rank=self._rank,
            attempt=attempt,
            cause=cause,
            facts=_facts(config, plan),
            publisher=self._publisher,
        )
        return Training(
            config=config,
            plan=plan,
            task=task,
            engine=Engine(task, config, plan, device=device),
            train_set=train_set,
            evaluation_set=evaluation_set,
            checkpoints=Checkpoints(self._folder.checkpoints, fence, config.checkpoint.keep, _layout_key(plan)),
            recorder=self._recorder,
            scheduler=Scheduler(
                policy=make_policy(config),
                config=config,
                plan=plan,
                memory=memory,
                decides=self._rank == 0,
            ),
            tracer=Tracer(config.telemetry.profile if self._rank == 0 else None, self._folder.root / "traces", rank=0),
            rank=self._rank,
            stop_requested=self._folder.stop_request.exists,
            times=StepTimes() if measured is None else measured.step_times(),
            **_past(self._folder),
        )

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


def _past(folder: RunFolder) -> dict[str, Any]:
    """How often earlier attempts failed, and for how long the run has lived; this attempt is not written down yet."""
    attempts = read(folder.attempts)
    failures = sum((1 if one["event"] == "started" else -1) for one in attempts)
    return {"failures": max(0, failures), "lived_s": time.time() - attempts[0]["time"] if attempts else 0.0}


def _for_workers(config: RunConfig, workers: int) -> RunConfig:
    """The config at the number of workers that Ray gave: an elastic range becomes a number."""
    return config.model_copy(update={"scale": config.scale.model_copy(update={"workers": workers})})


def _layout_key(plan: Plan) -> dict[str, Any]:
    return {"workers": plan.layout.workers, "zero_stage": plan.zero_stage, "precision": plan.precision}


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
