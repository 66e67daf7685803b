"""The training loop: one page that reads like a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch.distributed as dist

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, NonFiniteLossError, did_you_mean
from orchestrator.job import Dataset, Task
from orchestrator.planning.plan import Plan
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.observation import Decision
from orchestrator.scheduling.schedule import factor
from orchestrator.training.cadence import Cadence
from orchestrator.training.checkpoint import Checkpoints
from orchestrator.training.data import Batches
from orchestrator.training.engine import Engine
from orchestrator.training.evaluation import evaluate
from orchestrator.training.recorder import Recorder
from orchestrator.training.scheduler import Scheduler, spoken, understood
from orchestrator.training.state import StepStats, TrainState
from orchestrator.training.stored import StoredCheckpoints
from orchestrator.training.tracing import Tracer
from orchestrator.training.watchdog import Watchdog

__all__ = ["NoNotice", "Notice", "Outcome", "Training", "train"]


class Notice(Protocol):
    """Whether nodes of the run are about to be taken away."""

    def due(self) -> bool:
        """On rank 0: whether it is time to ask."""
        ...

    def ask(self) -> str | None:
        """On every rank at the same step: what is to be said of it, once for each notice."""
        ...


class NoNotice:
    """Nodes stay, or go without a word."""

    def due(self) -> bool:
        """Never."""
        return False

    def ask(self) -> str | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class Outcome:
    """How a worker's part of a run ended: the last state, and why."""

    state: TrainState
    reason: str
    stopped: bool


@dataclass(frozen=True)
class Training:
    """Everything the loop works with; one per worker and attempt."""

    config: RunConfig
    plan: Plan
    task: Task
    engine: Engine
    train_set: Dataset
    evaluation_set: Dataset | None
    checkpoints: Checkpoints | StoredCheckpoints
    recorder: Recorder
    scheduler: Scheduler
    tracer: Tracer
    rank: int
    stop_requested: Callable[[], bool]
    watchdog: Watchdog = field(default_factory=Watchdog)
    notice: Notice = field(default_factory=NoNotice)
    failures: int = 0
    """Earlier attempts that did not end by themselves."""
    lived_s: float = 0.0
    """From the first attempt's beginning to this one's."""
    times: StepTimes = field(default_factory=StepTimes)
    """Step times that are known before the first step."""
    pause_at: float = math.inf
    """Progress; after the first evaluation there or later the run saves and stops, to go on another time."""


def train(run: Training) -> Outcome:
    """Train until the plan is finished or a stop is asked for; returns the same outcome on every rank.

    Raises:
        NonFiniteLossError: more steps in a row than allowed had no finite loss and gradient.
    """
    batches = Batches(run.train_set, run.config.seed, run.rank, run.config.data)
    state = run.checkpoints.restore(run.engine) or TrainState.start(run.plan, run.config, run.times)
    run.recorder.begin(state, run.engine.clock.lap())
    dist.barrier()  # an attempt is on record before any rank can fail in it
    state = _over_the_workers(run, state)
    scaling = run.scheduler.scale(run.engine, state, None)  # a new engine has the recipe's own
    cadence = Cadence.begin(
        run.config.checkpoint,
        time.monotonic(),
        failures=run.failures,
        lived_s=run.lived_s,
        progress=state.progress,
    )
    saved_step, stop = state.step, False
    while not (reason := run.plan.finished(state)) and not stop:
        run.checkpoints.check()
        run.watchdog.beat()
        run.tracer.before(state.step + 1)
        with run.engine.clock.part("data_wait"):
            micro_batches = batches.at(state.samples, state.layout)
        decision = run.scheduler.decide(state)
        run.scheduler.memory.running = state.layout.micro_batch
        stats = run.engine.step(
            micro_batches,
            learning_rate=_learning_rate(run, state),
            rank_zero_says=(*_asks(run, cadence, state), *spoken(decision)),
            measure_noise=run.scheduler.measures(state),
        )
        asked_to_stop, save_due, look, *said = stats.rank_zero_says
        stop, warned = bool(asked_to_stop), bool(look) and _warned(run)
        before, state = state, state.after(stats, run.plan, run.config)
        lap = run.engine.clock.lap()
        run.recorder.step(state, stats, lap, run.engine.loss_scale, batches.skipped_samples)
        _refuse_nonfinite(run, state, stats)
        state = _act(run, before, state, decision, said)
        # Before anything is saved: moments and settings of a checkpoint belong to its state.
        scaling = run.scheduler.scale(run.engine, state, scaling)
        best = state.best
        if state.evaluation_due(run.plan):
            state = _evaluate(run, state)
            stop = stop or state.progress >= run.pause_at
        if (save_due or warned or state.best != best) and stats.finite:
            cadence = cadence.saved(time.monotonic(), _save(run, state, at_once=warned), state.progress)
            saved_step = state.step
    run.watchdog.rest()
    run.tracer.close()
    if reason and run.plan.evaluation_samples and state.evaluated_at < state.progress:
        state = _evaluate(run, state)
    if saved_step < state.step:
        _save(run, state)
    _finish_saving(run)
    run.recorder.rest(run.engine.clock.lap())
    return Outcome(state, reason or "stop requested", stopped=reason is None)


def _over_the_workers(run: Training, state: TrainState) -> TrainState:
    """The same global batch over the workers that there are now, where a checkpoint comes from another number."""
    if (decision := run.scheduler.refactor(state)) is None:
        return state
    run.recorder.decision(state, decision)
    return state.changed(decision.kind, decision.layout)


def _asks(run: Training, cadence: Cadence, state: TrainState) -> tuple[bool, bool, bool]:
    """What rank 0 asks of all after ``state``: to stop, to save, and to look whether nodes are about to be taken away.

    By time a save is due only once the last one has reached its store, so that nobody waits for it.
    """
    now, uploading = time.monotonic(), run.checkpoints.uploading
    save_due = cadence.due(state.step + 1, state.progress, now, uploading=uploading)
    return run.stop_requested(), save_due, run.notice.due()


def _warned(run: Training) -> bool:
    """Whether there is notice that nodes will be taken away; every rank asks, since asking is a barrier."""
    if (told := run.notice.ask()) is None:
        return False
    run.recorder.event("preemption", told)
    return True


def _act(
    run: Training, before: TrainState, state: TrainState, decision: Decision | None, said: Sequence[float]
) -> TrainState:
    """Take up what rank 0 decided, on every rank; later, once, write down what came of it."""
    run.scheduler.memory.note(before.layout.micro_batch)  # of the layout that ran, which may be left now
    if (heard := understood(said, state.layout.workers)) is not None:
        run.recorder.decision(state, decision)
        return state.changed(*heard)
    if (found := run.scheduler.outcome(before, state)) is not None:
        run.recorder.measured(state, *found)
    return state


def _learning_rate(run: Training, state: TrainState) -> float:
    start, end = run.plan.shares(state.progress, state.step_progress(run.config))
    peak = run.config.recipe.optimizer.learning_rate
    return peak * factor(run.config.recipe.schedule, start, end) * state.learning_rate_factor


def _evaluate(run: Training, state: TrainState) -> TrainState:
    assert run.evaluation_set is not None
    run.watchdog.rest()
    started = time.perf_counter()
    with run.engine.clock.part("evaluation"):
        metrics = evaluate(run.engine, run.task, run.evaluation_set, batch=run.config.evaluation.batch)
    best = run.config.checkpoint.best
    for setting, wanted in (
        ("recipe.stop.metric", run.plan.stop.metric),
        ("checkpoint.best", best and best.split(":")[0]),
    ):
        if wanted is not None and wanted not in metrics:
            raise ConfigError(f"{setting}={wanted!r} is none of the task's metrics; {did_you_mean(wanted, metrics)}")
    state = state.evaluated(metrics, best)
    run.recorder.evaluation(state, time.perf_counter() - started)
    return state


def _save(run: Training, state: TrainState, *, at_once: bool = False) -> float:
    """Save, and ``at_once`` to the very end; returns for how many seconds the run was held up."""
    run.watchdog.rest()
    started = time.perf_counter()
    with run.engine.clock.part("checkpoint"), run.recorder.watching_a_checkpoint():
        saved = run.checkpoints.save(run.engine, state)
        if at_once:
            run.checkpoints.finish()
    blocked_s = time.perf_counter() - started
    run.recorder.checkpoint(saved, blocked_s)
    return blocked_s


def _finish_saving(run: Training) -> None:
    """Wait for what is still on its way to the store."""
    started = time.perf_counter()
    with run.engine.clock.part("checkpoint"), run.recorder.watching_a_checkpoint():
        run.checkpoints.finish()
    if (waited_s := time.perf_counter() - started) > NOTICED_S:
        run.recorder.checkpoint(None, waited_s)


def _refuse_nonfinite(run: Training, state: TrainState, stats: StepStats) -> None:
    allowed = run.config.failures.skip_nonfinite_steps
    # A loss scaler that is still searching for its scale skips steps by design.
    searching = (
        run.plan.precision == "fp16" and np.isfinite(stats.loss) and state.nonfinite_in_a_row <= FP16_SEARCH_STEPS
    )
    if stats.finite or searching or state.nonfinite_in_a_row <= allowed:
        return
    newest = run.checkpoints.newest()
    last = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
    raise NonFiniteLossError(
        f"step {state.step}: loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g} at learning rate "
        f"{stats.learning_rate:.3g}; {last}. Lower recipe.optimizer.learning_rate, set recipe.clip_norm, check the "
        f"data, or allow skipping with failures.skip_nonfinite_steps (now {allowed})"
    )


NOTICED_S = 1e-3
# DeepSpeed starts at a scale of 2^16 and halves it after each overflow: 16 halvings reach 1.
FP16_SEARCH_STEPS = 17
