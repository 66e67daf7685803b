"""TrainState: everything of a run that must survive, but weights and optimizer, in one frozen value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.config import SGD, RunConfig
from orchestrator.planning.layout import Layout
from orchestrator.planning.plan import Plan
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.history import History, StepFacts
from orchestrator.scheduling.learning_rate import Scaling, ramp, scale, step_worth
from orchestrator.scheduling.noise_scale import NoiseSample
from orchestrator.scheduling.observation import Kind
from orchestrator.scheduling.policy import measures_noise

__all__ = ["StepStats", "TrainState"]


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports, the same on every rank.

    ``loss`` is the mean over the global batch; ``grad_norm`` the norm of its gradient before clipping;
    ``applied`` is False where the update was discarded; ``step_time_s`` is rank 0's time for the forward and backward
    passes of this step and the update of the one before, which is when it was known; ``micro_batch_time_s`` its mean
    time for a micro batch without synchronisation, where that can be told; ``noise`` what a measured step says of the
    gradient noise, and ``noise_cost_s`` what measuring took; ``rank_zero_says`` is what rank 0 sent along.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    step_time_s: float
    micro_batch_time_s: float | None = None
    noise: NoiseSample | None = None
    noise_cost_s: float = 0.0
    rank_zero_says: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the loss was a number and the update was applied."""
        return self.applied and math.isfinite(self.loss)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after ``step`` optimizer steps.

    ``samples`` is the data cursor; ``progress`` counts reference samples; ``learning_rate_factor`` is what
    the batch in use multiplies the recipe's rate by; ``train_time_s`` is summed over attempts;
    ``nonfinite_in_a_row`` counts discarded steps since the last good one; ``history`` is what decisions are made on.
    """

    layout: Layout
    step: int = 0
    samples: int = 0
    progress: float = 0.0
    learning_rate_factor: float = 1.0
    loss: float = math.nan
    train_time_s: float = 0.0
    nonfinite_in_a_row: int = 0
    evaluation: dict[str, float] | None = None
    evaluated_at: float = 0.0
    best: float | None = None
    """Best value so far of the metric that ``checkpoint.best`` names."""
    history: History = field(default_factory=History)

    @classmethod
    def start(cls, plan: Plan, config: RunConfig, times: StepTimes | None = None) -> TrainState:
        """The state before the first step. There is nothing yet that a higher rate could upset: no ramp.

        ``times`` are what a probe found; a run that never leaves its recipe's batch has no use for them.
        """
        watched = times is not None and measures_noise(config, plan.layout.global_batch)
        state = cls(layout=plan.layout, history=History(times=times) if watched and times else History())
        return replace(state, learning_rate_factor=state.scaling(config).learning_rate)

    def scaling(self, config: RunConfig) -> Scaling:
        """What the batch in use does to learning rate, beta2, eps, weight decay and momentum."""
        recipe = config.recipe
        known, batch = self.history.noise_scale, self.layout.global_batch
        return scale(config.policy.rule, recipe.optimizer, known, recipe.batch, batch)

    def step_progress(self, config: RunConfig) -> float:
        """Reference samples that one step of the batch in use is worth."""
        return step_worth(self.history.noise_scale, config.recipe.batch, self.layout.global_batch)

    def after(self, stats: StepStats, plan: Plan, config: RunConfig) -> TrainState:
        """The state after one step. A discarded one has consumed its samples and counts as progress too."""
        progress = self.progress + self.step_progress(config)
        facts = StepFacts(
            step=self.step + 1,
            progress=progress,
            layout=self.layout,
            nodes=plan.nodes,
            loss=stats.loss,
            finite=stats.finite,
            step_time_s=stats.step_time_s,
            micro_batch_time_s=stats.micro_batch_time_s,
            noise=stats.noise,
            noise_cost_s=stats.noise_cost_s,
        )
        # A run that never leaves its recipe's batch keeps nothing that nobody will ask for.
        watched = measures_noise(config, self.layout.global_batch)
        state = replace(
            self,
            step=facts.step,
            samples=self.samples + self.layout.global_batch,
            progress=progress,
            loss=stats.loss,
            train_time_s=self.train_time_s + stats.step_time_s,
            nonfinite_in_a_row=0 if stats.finite else self.nonfinite_in_a_row + 1,
            history=self.history.after(facts, config.policy) if watched else self.history,
        )
        target = state.scaling(config).learning_rate
        return replace(state, learning_rate_factor=ramp(self.learning_rate_factor, target, _memory(config)))

    def changed(self, kind: Kind, layout: Layout) -> TrainState:
        """The state once a decision is taken: from the next step on, the other layout."""
        history = self.history.changed(kind, self.step, self.progress, self.layout, layout)
        return replace(self, layout=layout, history=history)

    def evaluated(self, metrics: dict[str, float], best: str | None = None) -> TrainState:
        """The state after an evaluation; ``best`` is the config's ``checkpoint.best``."""
        state = replace(self, evaluation=metrics, evaluated_at=self.progress)
        if best is None:
            return state
        name, direction = best.split(":")
        value = metrics[name]
        better = self.best is None or (value > self.best if direction == "max" else value < self.best)
        return replace(state, best=value) if better and math.isfinite(value) else state

    def evaluation_due(self, plan: Plan) -> bool:
        """Whether progress has passed a multiple of ``plan.evaluate_every`` since the last evaluation."""
        if not plan.evaluation_samples:
            return False
        return math.floor(self.progress / plan.evaluate_every) > math.floor(self.evaluated_at / plan.evaluate_every)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a loss or metric that is not a finite number becomes None."""
        data = asdict(replace(self, history=History()))
        data["history"] = self.history.to_dict()
        data["loss"] = _finite_or_none(self.loss)
        if self.evaluation is not None:
            data["evaluation"] = {name: _finite_or_none(value) for name, value in self.evaluation.items()}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainState:
        """The inverse of ``to_dict``; what was not finite comes back as NaN."""
        metrics = data["evaluation"]
        evaluation = None if metrics is None else {name: _nan_for_none(value) for name, value in metrics.items()}
        layout, loss = Layout(**data["layout"]), _nan_for_none(data["loss"])
        history = History.from_dict(data["history"])
        return cls(**{**data, "layout": layout, "loss": loss, "evaluation": evaluation, "history": history})


def _memory(config: RunConfig) -> float:
    """Decay of the optimizer's mean of gradients: what a higher rate meets is as old as that."""
    optimizer = config.recipe.optimizer
    return optimizer.momentum if isinstance(optimizer, SGD) else optimizer.beta1


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value
