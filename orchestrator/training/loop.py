"""The training loop: one page that reads like a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, NonFiniteLossError, did_you_mean
from orchestrator.job import Dataset, Task
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.observation import Decision
from orchestrator.scheduling.schedule import factor
from orchestrator.training.checkpoint import Checkpoints, list_checkpoints
from orchestrator.training.data import Batches
from orchestrator.training.engine import Engine
from orchestrator.training.evaluation import evaluate
from orchestrator.training.recorder import Recorder
from orchestrator.training.scheduler import Scheduler, spoken, understood
from orchestrator.training.state import StepStats, TrainState

__all__ = ["Outcome", "Training", "train"]


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
    checkpoints: Checkpoints
    recorder: Recorder
    scheduler: Scheduler
    rank: int
    stop_requested: Callable[[], bool]


def train(run: Training) -> Outcome:
    """Train until the plan is finished or a stop is asked for; returns the same outcome on every rank.

    Raises:
        NonFiniteLossError: more steps in a row than allowed had no finite loss and gradient.
    """
    batches = Batches(run.train_set, run.config.seed, run.rank, run.config.data)
    state = run.checkpoints.restore(run.engine) or TrainState.start(run.plan, run.config)
    run.recorder.begin(state)
    scaling = run.scheduler.scale(run.engine, state, None)  # a new engine has the recipe's own
    saved_step, saved_at, stop = state.step, time.monotonic(), False
    while not (reason := run.plan.finished(state)) and not stop:
        micro_batches = batches.at(state.samples, state.layout)
        decision = run.scheduler.decide(state)
        stats = run.engine.step(
            micro_batches,
            learning_rate=_learning_rate(run, state),
            rank_zero_says=(run.stop_requested(), _save_due(run, state, saved_at), *spoken(decision)),
            measure_noise=run.scheduler.measures(state),
        )
        asked_to_stop, save_due, *said = stats.rank_zero_says
        stop = bool(asked_to_stop)
        before, state = state, state.after(stats, run.plan, run.config)
        run.recorder.step(state, stats, batches.skipped_samples)
        _refuse_nonfinite(run, state, stats)
        state = _act(run, before, state, decision, said)
        # Before anything is saved: moments and settings of a checkpoint belong to its state.
        scaling = run.scheduler.scale(run.engine, state, scaling)
        if state.evaluation_due(run.plan):
            state = _evaluate(run, state)
        if save_due and stats.finite:
            run.checkpoints.save(run.engine, state)
            saved_step, saved_at = state.step, time.monotonic()
    if reason and run.plan.evaluation_samples and state.evaluated_at < state.progress:
        state = _evaluate(run, state)
    if saved_step < state.step:
        run.checkpoints.save(run.engine, state)
    return Outcome(state, reason or "stop requested", stopped=reason is None)


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


def _save_due(run: Training, state: TrainState, saved_at: float) -> bool:
    every = run.config.checkpoint.interval_steps
    by_step = every is not None and (state.step + 1) % every == 0
    return by_step or time.monotonic() - saved_at >= run.config.checkpoint.interval_s


def _evaluate(run: Training, state: TrainState) -> TrainState:
    assert run.evaluation_set is not None
    started = time.perf_counter()
    metrics = evaluate(run.engine, run.task, run.evaluation_set, batch=run.config.evaluation.batch)
    if (wanted := run.plan.stop.metric) is not None and wanted not in metrics:
        raise ConfigError(
            f"recipe.stop.metric={wanted!r} is none of the task's metrics; {did_you_mean(wanted, metrics)}"
        )
    state = state.evaluated(metrics)
    run.recorder.evaluation(state, time.perf_counter() - started)
    return state


def _refuse_nonfinite(run: Training, state: TrainState, stats: StepStats) -> None:
    allowed = run.config.failures.skip_nonfinite_steps
    # A loss scaler that is still searching for its scale skips steps by design.
    searching = (
        run.plan.precision == "fp16" and np.isfinite(stats.loss) and state.nonfinite_in_a_row <= FP16_SEARCH_STEPS
    )
    if stats.finite or searching or state.nonfinite_in_a_row <= allowed:
        return
    existing = list_checkpoints(run.checkpoints.root)
    last = f"the last good checkpoint is {existing[-1]}" if existing else "there is no checkpoint yet"
    raise NonFiniteLossError(
        f"step {state.step}: loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g} at learning rate "
        f"{stats.learning_rate:.3g}; {last}. Lower recipe.optimizer.learning_rate, set recipe.clip_norm, check the "
        f"data, or allow skipping with failures.skip_nonfinite_steps (now {allowed})"
    )


# DeepSpeed starts at a scale of 2^16 and halves it after each overflow: 16 halvings reach 1.
FP16_SEARCH_STEPS = 17
