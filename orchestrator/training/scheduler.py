"""The scheduler inside a worker: rank 0 asks the policy, all ranks hear the answer and act on it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import RunConfig
from orchestrator.planning.layout import Layout, refactor
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.adaptive import TIMED_STEPS
from orchestrator.scheduling.learning_rate import Scaling, scale
from orchestrator.scheduling.observation import KINDS, Decision, Kind, Observation, Policy
from orchestrator.scheduling.policy import measures_noise
from orchestrator.scheduling.schedule import factor
from orchestrator.training.engine import Engine
from orchestrator.training.memory import MemoryGauge
from orchestrator.training.state import TrainState

__all__ = ["Scheduler", "observe", "spoken", "understood"]


@dataclass(frozen=True)
class Scheduler:
    """What rank 0 decides by, and what every rank does about it."""

    policy: Policy
    config: RunConfig
    plan: Plan
    memory: MemoryGauge
    decides: bool
    """Rank 0 alone: no two ranks may ever disagree."""

    def decide(self, state: TrainState) -> Decision | None:
        """The policy's answer to ``state``; None on all ranks but 0."""
        if not self.decides or state.step == 0:
            return None
        return self.policy.decide(observe(state, self.plan, self.config, self.memory.largest_micro_batch()))

    def refactor(self, state: TrainState) -> Decision | None:
        """What becomes of the batch when the workers are not those of ``state``; the same answer on every rank.

        The same where its micro batch has run out of memory.
        """
        before, workers, pinned = state.layout, self.plan.layout.workers, self.config.layout
        if (limit := self.memory.limit) is not None and before.micro_batch > limit:
            after = refactor(before, workers, at_most=limit)
            return Decision("refactor", after, f"out of memory: at most {limit} samples in a micro batch")
        if before.workers == workers:
            return None
        after = refactor(before, workers, micro_batch=pinned.micro_batch, accumulation=pinned.accumulation)
        kept = after.global_batch == before.global_batch
        reason = (
            f"{before.workers} -> {workers} workers: global batch {'kept' if kept else 'as near as they divide it'}"
        )
        return Decision("refactor", after, reason)

    def measures(self, state: TrainState) -> bool:
        """Whether the step after ``state`` measures the gradient noise."""
        if not measures_noise(self.config, state.layout.global_batch):
            return False
        return state.history.measures(state.step + 1, self.config.policy)

    def outcome(self, before: TrainState, state: TrainState) -> tuple[float, float] | None:
        """Goodput and step time of the layout in use, once, at the step that makes them known after a change.

        As many timed steps as the policy waits for: a layout is never left for a better one before it is measured.
        """
        times, layout = state.history.times, state.layout
        where = {"nodes": self.plan.nodes, **vars(layout)}
        just_known = before.history.times.count(**where) < TIMED_STEPS <= times.count(**where)
        if state.history.change is None or not just_known:
            return None
        step_time_s = times.observed_step_time_s(**where)
        return None if step_time_s is None else (state.step_progress(self.config) / step_time_s, step_time_s)

    def scale(self, engine: Engine, state: TrainState, before: Scaling | None) -> Scaling:
        """Set what goes with the learning rate of the batch in use, where it differs from ``before``.

        None stands for a new engine: it has the recipe's own settings, and moments that belong to ``state``.
        """
        recipe = self.config.recipe
        wanted = state.scaling(self.config)
        neutral = scale(self.config.policy.rule, recipe.optimizer, None, recipe.batch, recipe.batch)
        if wanted != (neutral if before is None else before):
            engine.rescale(wanted, carry=before is not None)
        return wanted


def observe(state: TrainState, plan: Plan, config: RunConfig, micro_batch_limit: int | None) -> Observation:
    """What a policy sees of ``state``."""
    history = state.history
    start, end = plan.shares(state.progress, state.step_progress(config))
    return Observation(
        step=state.step,
        progress=state.progress,
        length=plan.length,
        schedule_factor=factor(config.recipe.schedule, start, end),
        layout=state.layout,
        nodes=plan.nodes,
        reference_batch=plan.reference_batch,
        train_samples=plan.train_samples,
        noise_scale=history.noise_scale,
        times=history.times,
        trend=history.trend,
        change=history.change,
        ambition=history.ambition_at(state.progress),
        reversals=history.reversals,
        micro_batch_limit=micro_batch_limit,
    )


def spoken(decision: Decision | None) -> tuple[float, float, float]:
    """A decision as the three numbers that travel with a step."""
    if decision is None:
        return 0.0, 0.0, 0.0
    layout = decision.layout
    return float(1 + KINDS.index(decision.kind)), float(layout.micro_batch), float(layout.accumulation)


def understood(said: Sequence[float], workers: int) -> tuple[Kind, Layout] | None:
    """The inverse of ``spoken``."""
    kind, micro_batch, accumulation = (int(number) for number in said)
    return (KINDS[kind - 1], Layout(workers, micro_batch, accumulation)) if kind else None
