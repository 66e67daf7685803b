"""A probe before a run: a throw-away group of workers tries the real model at a few micro batches.

A rank that runs out of memory leaves the others waiting in a collective, so such a group cannot be saved: its error
ends it, Ray kills what is left, and a new one goes on below. What was found is kept for the next run of the same job
on the same devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.config import Goodput, RunConfig
from orchestrator.errors import WorkerLostError
from orchestrator.launching.failures import describe, read_failures, to_error, write_failure
from orchestrator.launching.trainer import Fit, make_probe_trainer
from orchestrator.launching.worker import Order, device_of, memory_share, output_in
from orchestrator.planning.plan import Plan
from orchestrator.planning.probe import ACCUMULATION, Probe, Trial, next_micro_batch
from orchestrator.storage.folder import RunFolder, read_json, write_json
from orchestrator.telemetry import human

__all__ = ["ProbeOrder", "candidates", "probe", "work"]

POLL_S = 0.25
PACKAGES = ("torch", "deepspeed", "ray", "orchestrator")


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
    place = _Place(RunFolder(order.root).control / "probe")
    sizes = candidates(plan, order.job.config)
    note(f"probing {len(sizes)} micro batch{'es' if len(sizes) > 1 else ''} on {plan.layout.workers} worker(s) ...")
    ran: tuple[Trial, ...] = ()
    failed: tuple[Trial, ...] = ()
    while True:
        place.begin(ran, failed)
        fit = Fit(make_probe_trainer(ProbeOrder(order, plan, sizes), plan, order.job.config))
        while fit.running:
            ran = _tell(place.trials(), ran, note)
            time.sleep(POLL_S)
        ran = _tell(place.trials(), ran, note)
        if fit.error is None:
            break
        failed = (*failed, _failed(place, order, ran, fit.error))
        note(f"  micro batch {failed[-1].micro_batch}: out of memory")
        # What comes next depends on no capacity now: no group is started to hear that it is over.
        if next_micro_batch((*ran, *failed), sizes, planned=plan.layout.micro_batch, capacity_bytes=0.0) is None:
            break
    return Probe(
        device=place.device(),
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


def _failed(place: _Place, order: Order, ran: tuple[Trial, ...], error: BaseException) -> Trial:
    """The trial that a group ended in, if memory was the cause; everything else is raised."""
    causes = [failure for failure in read_failures(RunFolder(order.root)) if not failure.is_collateral]
    tried = place.trying()
    if causes and causes[0].kind != "memory":
        raise to_error(causes[0])
    if tried is None or not (causes or ran):  # nothing has ever run: this is no question of size
        raise WorkerLostError(f"the probe's workers were lost: {str(error).splitlines()[0] if str(error) else error!r}")
    return Trial(tried, None)


# -- inside a worker ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeOrder:
    """What the driver hands to every worker of a probe."""

    order: Order
    plan: Plan
    candidates: tuple[int, ...]


def work(order: dict[str, ProbeOrder]) -> None:
    """Entry point of a probe's worker."""
    import ray.train

    probing = order["order"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    folder = RunFolder(probing.order.root)
    with output_in(folder.logs / f"probe-{rank}.log"):
        try:
            _run(probing, folder, rank)
        except BaseException as error:
            write_failure(folder, describe(error, rank=rank, step=0))
            raise


def _run(probing: ProbeOrder, folder: RunFolder, rank: int) -> None:
    import torch

    from orchestrator.training.data import open_dataset
    from orchestrator.training.engine import Engine
    from orchestrator.training.memory import MemoryGauge
    from orchestrator.training.probing import Probing, run_trials

    job, plan = probing.order.job, probing.plan
    place = _Place(folder.control / "probe")
    device = device_of(plan)
    if rank == 0:
        place.note_device(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    memory = MemoryGauge(device, memory_share(device, plan))
    run_trials(
        Probing(
            engine=Engine(job.task, job.config, plan, device=device),
            train_set=open_dataset(job.task.datasets().train, job.config),
            memory=memory,
            rank=rank,
            workers=plan.layout.workers,
            planned=plan.layout.micro_batch,
            candidates=probing.candidates,
            begun=place.note_trying,
            ended=place.note_trial,
        ),
        place.known(),
    )


@dataclass(frozen=True)
class _Place:
    """How a probe's driver and workers find each other: files in the run's folder, written by one at a time."""

    folder: Path

    def begin(self, ran: tuple[Trial, ...], failed: tuple[Trial, ...]) -> None:
        """For a new group, which goes on from these."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in [self.folder / "trying.json", *(self.folder.parent / "failures").glob("rank-*.json")]:
            stale.unlink(missing_ok=True)
        write_json(self.folder / "failed.json", {"trials": [asdict(trial) for trial in failed]})
        write_json(self.folder / "trials.json", {"trials": [asdict(trial) for trial in ran]})

    def known(self) -> list[Trial]:
        return [*self.trials(), *_trials(self.folder / "failed.json")]

    def trials(self) -> tuple[Trial, ...]:
        """Those that ran."""
        return tuple(_trials(self.folder / "trials.json"))

    def note_trial(self, trial: Trial) -> None:
        trials = [*self.trials(), trial]
        write_json(self.folder / "trials.json", {"trials": [asdict(each) for each in trials]})

    def trying(self) -> int | None:
        found = read_json(self.folder / "trying.json")
        return None if found is None else int(found["micro_batch"])

    def note_trying(self, micro_batch: int) -> None:
        write_json(self.folder / "trying.json", {"micro_batch": micro_batch})

    def device(self) -> str:
        return str((read_json(self.folder / "device.json") or {}).get("device", ""))

    def note_device(self, device: str) -> None:
        write_json(self.folder / "device.json", {"device": device})


def _trials(path: Path) -> list[Trial]:
    return [Trial(**trial) for trial in (read_json(path) or {"trials": []})["trials"]]
