"""A probe before a run: a throw-away group of workers tries the real model at a few micro batches.

A rank that runs out of memory leaves the others waiting in a collective, so such a group cannot be saved: its error
ends it, Ray kills what is left, and a new one goes on below.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from orchestrator.config import Goodput, RunConfig
from orchestrator.errors import WorkerLostError
from orchestrator.launching.failures import WorkerFailedError, describe, said_by, to_error
from orchestrator.launching.trainer import Fit, make_probe_trainer
from orchestrator.launching.worker import Order, device_of, memory_share, output_in
from orchestrator.planning.plan import Plan
from orchestrator.planning.probe import ACCUMULATION, Probe, Trial, next_micro_batch
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry import human

__all__ = ["Board", "ProbeOrder", "candidates", "probe", "work"]

POLL_S = 0.25


def candidates(plan: Plan, config: RunConfig) -> tuple[int, ...]:
    """Micro batches that the run could use: what divides a worker's share, and on accelerators what it may grow to."""
    layout, share = config.layout, plan.layout.worker_batch
    if layout.micro_batch != "auto":
        return (layout.micro_batch,)
    if layout.accumulation != "auto":
        return (share // layout.accumulation,)
    if plan.device == "cpu":  # the limit is the machine's memory: nobody goes and looks for it
        return tuple(size for size in range(1, plan.layout.micro_batch + 1) if share % size == 0)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if isinstance(config.policy, Goodput):
        most = config.policy.max_batch
        largest = (64 * plan.reference_batch if most == "auto" else most) // plan.layout.workers
        grown = 2 * share
        while grown <= largest and ACCUMULATION * grown * plan.layout.workers <= plan.train_samples:
            sizes.append(grown)
            grown *= 2
    return tuple(sizes)


def probe(order: Order, plan: Plan, note: Callable[[str], None]) -> Probe:
    """Try the planned combination on the planned workers; ``note`` is told each trial.

    Raises:
        RunError: the model's own code failed, or workers were lost.
    """
    sizes = candidates(plan, order.job.config)
    note(f"probing {len(sizes)} micro batch{'es' if len(sizes) > 1 else ''} on {plan.layout.workers} worker(s) ...")
    ran: tuple[Trial, ...] = ()
    failed: tuple[Trial, ...] = ()
    while True:
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        fit = Fit(make_probe_trainer(ProbeOrder(order, plan, sizes, (*ran, *failed), board)))
        before = ran
        while fit.running:
            ran = _tell((*before, *ray.get(board.seen.remote()).trials), ran, note)
            time.sleep(POLL_S)
        seen: Seen = ray.get(board.seen.remote())
        ran = _tell((*before, *seen.trials), ran, note)
        if fit.error is None:
            break
        failed = (*failed, _failed(seen, ran, fit.error))
        note(f"  micro batch {failed[-1].micro_batch}: out of memory")
        # What comes next depends on no capacity now: no group is started to hear that it is over.
        if next_micro_batch((*ran, *failed), sizes, planned=plan.layout.micro_batch, capacity_bytes=0.0) is None:
            break
    return Probe(
        device=seen.device,
        workers=plan.layout.workers,
        nodes=plan.nodes,
        precision=plan.precision,
        zero_stage=plan.zero_stage,
        offload=plan.offload,
        activation_checkpointing=plan.activation_checkpointing,
        trials=(*ran, *failed),
    )


def _tell(trials: tuple[Trial, ...], told: tuple[Trial, ...], note: Callable[[str], None]) -> tuple[Trial, ...]:
    for trial in trials[len(told) :]:
        assert trial.peak_bytes is not None
        assert trial.step_time_s is not None
        each = human.duration(trial.step_time_s / ACCUMULATION)
        note(f"  micro batch {trial.micro_batch}: {human.size(trial.peak_bytes)}, {each} a micro batch")
    return trials


def _failed(seen: Seen, ran: tuple[Trial, ...], error: BaseException) -> Trial:
    """The trial that a group ended in, if memory was the cause; everything else is raised."""
    said = said_by(getattr(error, "worker_failures", {}))
    causes = [failure for failure in said if not failure.is_collateral]
    if causes and causes[0].kind != "memory":
        raise to_error(causes[0])
    if seen.trying is None or not (causes or ran):  # nothing has ever run: this is no question of size
        raise WorkerLostError(f"the probe's workers were lost: {str(error).splitlines()[0] if str(error) else error!r}")
    return Trial(seen.trying, None)


# -- how driver and workers find each other ----------------------------------------------------


@dataclass
class Seen:
    """What rank 0 has said so far."""

    device: str = ""
    trying: int | None = None
    """The micro batch that was begun last."""
    trials: list[Trial] = field(default_factory=list)
    """Those that ran, in this group."""


class Board:
    """An actor that outlives the group: what rank 0 wrote on it is there when the group is not."""

    def __init__(self) -> None:
        self._seen = Seen()

    def seen(self) -> Seen:
        """All of it."""
        return self._seen

    def begins(self, device: str) -> None:
        """The group is up, on such devices."""
        self._seen.device = device

    def tries(self, micro_batch: int) -> None:
        """A trial begins."""
        self._seen.trying = micro_batch

    def ran(self, trial: Trial) -> None:
        """It has ended well."""
        self._seen.trials.append(trial)


# -- inside a worker ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeOrder:
    """What the driver hands to every worker of a probe."""

    order: Order
    plan: Plan
    candidates: tuple[int, ...]
    known: tuple[Trial, ...]
    board: Any
    """Handle of the ``Board``."""


def work(order: dict[str, ProbeOrder]) -> None:
    """Entry point of a probe's worker."""
    import ray.train

    probing = order["order"]
    rank = ray.train.get_context().get_world_rank()
    logs = RunFolder(probing.order.root).logs
    folder = logs if logs.is_dir() else Path(tempfile.mkdtemp(prefix="orchestrator-probe-"))  # on another machine
    with output_in(folder / f"probe-{rank}.log"):
        try:
            _run(probing, rank)
        except BaseException as error:
            raise WorkerFailedError(describe(error, rank=rank, step=0)) from error


def _run(probing: ProbeOrder, rank: int) -> None:
    import torch

    from orchestrator.training.data import open_dataset
    from orchestrator.training.engine import Engine
    from orchestrator.training.memory import MemoryGauge
    from orchestrator.training.probing import Probing, run_trials

    job, plan, board = probing.order.job, probing.plan, probing.board
    device = device_of(plan)
    if rank == 0:
        ray.get(board.begins.remote(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"))
    run_trials(
        Probing(
            engine=Engine(job.task, job.config, plan, device=device),
            train_set=open_dataset(job.task.datasets().train, job.config),
            memory=MemoryGauge(device, memory_share(device, plan)),
            rank=rank,
            planned=plan.layout.micro_batch,
            candidates=probing.candidates,
            begun=lambda size: ray.get(board.tries.remote(size)),
            ended=lambda trial: ray.get(board.ran.remote(trial)),
        ),
        probing.known,
    )
