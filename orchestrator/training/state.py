"""TrainState: everything of a run that must survive, but weights and optimizer, in one frozen value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.planning.layout import Layout
from orchestrator.planning.plan import Plan

__all__ = ["StepStats", "TrainState"]


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports, the same on every rank.

    ``loss`` is the mean over the global batch; ``grad_norm`` the norm of its gradient before clipping;
    ``applied`` is False where the update was discarded; ``step_time_s`` is rank 0's time for the forward and backward
    passes of this step and the update of the one before, which is when it was known; ``rank_zero_says`` is what rank 0
    sent along.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    step_time_s: float
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
    ``nonfinite_in_a_row`` counts discarded steps since the last good one.
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

    @classmethod
    def start(cls, plan: Plan) -> TrainState:
        """The state before the first step."""
        return cls(layout=plan.layout)

    def after(self, stats: StepStats) -> TrainState:
        """The state after one step. A discarded one has consumed its samples and counts as progress too."""
        batch = self.layout.global_batch
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + batch,
            # At a constant batch one sample is one reference sample: eff(B0) = 1.
            progress=self.progress + batch,
            loss=stats.loss,
            train_time_s=self.train_time_s + stats.step_time_s,
            nonfinite_in_a_row=0 if stats.finite else self.nonfinite_in_a_row + 1,
        )

    def evaluated(self, metrics: dict[str, float]) -> TrainState:
        """The state after an evaluation."""
        return replace(self, evaluation=metrics, evaluated_at=self.progress)

    def evaluation_due(self, plan: Plan) -> bool:
        """Whether progress has passed a multiple of ``plan.evaluate_every`` since the last evaluation."""
        if not plan.evaluation_samples:
            return False
        return math.floor(self.progress / plan.evaluate_every) > math.floor(self.evaluated_at / plan.evaluate_every)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a loss or metric that is not a finite number becomes None."""
        data = asdict(self)
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
        return cls(**{**data, "layout": layout, "loss": loss, "evaluation": evaluation})


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value
