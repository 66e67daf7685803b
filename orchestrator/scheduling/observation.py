"""What a policy sees and what it answers: aggregated numbers in, one decision out, both frozen and printable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.loss_trend import Deviation, LossTrend
from orchestrator.scheduling.noise_scale import NoiseScale

__all__ = ["KINDS", "Alternative", "Change", "Decision", "Observation", "Policy"]

Kind = Literal["explore", "settle", "grow", "shrink", "revert", "ramp", "refactor"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""explore: time another micro batch, at the same global batch or at twice as much; settle: take the better of the two;
grow, shrink: another global batch; revert: the loss did not like it; ramp: as written down; refactor: the same batch
over another number of workers."""


@dataclass(frozen=True)
class Alternative:
    """A layout as predicted: seconds per step, what a sample of its batch is worth, and the goodput of both.

    ``goodput`` is in reference samples per second; ``efficiency`` is 1 at the reference batch.
    """

    layout: Layout
    step_time_s: float
    efficiency: float
    goodput: float


@dataclass(frozen=True)
class Decision:
    """Take this layout from the next step on, and why."""

    kind: Kind
    layout: Layout
    reason: str
    now: Alternative | None = None
    """The layout in use, as predicted."""
    then: Alternative | None = None
    """The layout chosen, as predicted."""
    alternatives: tuple[Alternative, ...] = ()
    """What else was weighed, best first."""


@dataclass(frozen=True)
class Change:
    """The last change of the layout, and how the loss has gone since."""

    kind: Kind
    step: int
    progress: float
    before: Layout
    deviation: Deviation
    """Of the losses since then from what the trend before it foretold."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it."""
        return {
            "kind": self.kind,
            "step": self.step,
            "progress": self.progress,
            "before": vars(self.before),
            "deviation": self.deviation.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Change:
        """The inverse of ``to_dict``."""
        deviation = Deviation.from_dict(saved["deviation"])
        return cls(**{**saved, "before": Layout(**saved["before"]), "deviation": deviation})


@dataclass(frozen=True)
class Observation:
    """Everything a policy may know, the same for a run that goes and for one that is replayed from its records."""

    step: int
    progress: float
    """Reference samples."""
    length: float | None
    """Reference samples of the whole run; None where only time or a target ends it."""
    schedule_factor: float
    """Share of its peak that the recipe's schedule asks for now."""
    layout: Layout
    nodes: int
    reference_batch: int
    train_samples: int
    noise_scale: NoiseScale | None
    """None until enough steps were measured."""
    times: StepTimes
    trend: LossTrend
    change: Change | None = None
    """The last change; None before the first."""
    ambition: float = 1.0
    """Factor on the noise scale that decisions are made on; halved each time the loss did not like a change."""
    reversals: int = 0
    """How often a change was taken back so far."""
    micro_batch_limit: int | None = None
    """Largest micro batch that memory allows; None where it is not known to be limited."""

    @property
    def steps_since_change(self) -> int:
        """Optimizer steps since the last change, or since the start."""
        return self.step - (self.change.step if self.change is not None else 0)


class Policy(Protocol):
    """Chooses the layout. One verb, because a policy answers and never acts."""

    def decide(self, seen: Observation) -> Decision | None:
        """The change to make now, or None to leave everything as it is. Pure: the same answer to the same numbers."""
        ...
