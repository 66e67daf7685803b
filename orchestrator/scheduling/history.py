"""What a run remembers of its steps to decide by: one frozen value, saved with every checkpoint.

A fold over the steps, so the same steps give the same memory: in the run, after a restart, and when the records of a
run are replayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.config import BatchPolicy
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.loss_trend import Deviation, LossTrend
from orchestrator.scheduling.noise_scale import FEWEST, NoiseSample, NoiseScale, NoiseScaleWindow
from orchestrator.scheduling.observation import Change, Kind

__all__ = ["History", "StepFacts"]

SHORTEST_NOISE_INTERVAL = 2
"""A measured step is not timed, so every second one at least must not be measured."""
LONGEST_NOISE_INTERVAL = 1000
OPENING_STEPS, OPENING_PACE = 4 * FEWEST, 5
"""Until then, or the first estimate, noise is measured so many times as often: nothing is decided without one, and what
a few measurements cost does not count."""
LEAST_STEP = 0.25
"""Of a measured step that is the step itself, at least: its cost is not known exactly."""
COST_MEMORY = 0.8
"""Weight of what was known of the cost of measuring, against the newest measurement."""


@dataclass(frozen=True)
class StepFacts:
    """One optimizer step, as it is remembered."""

    step: int
    progress: float
    """Reference samples at its end."""
    layout: Layout
    nodes: int
    loss: float
    finite: bool
    step_time_s: float
    micro_batch_time_s: float | None = None
    noise: NoiseSample | None = None
    noise_cost_s: float = 0.0


@dataclass(frozen=True)
class History:
    """Noise, times and losses so far, and the last change."""

    window: NoiseScaleWindow = field(default_factory=NoiseScaleWindow)
    noise_scale: NoiseScale | None = None
    """The window's estimate."""
    times: StepTimes = field(default_factory=StepTimes)
    trend: LossTrend = field(default_factory=LossTrend)
    change: Change | None = None
    ambition: float = 1.0
    """As it was left by the last revert; ``ambition_at`` tells today's."""
    reverted_at: float = 0.0
    """Progress at the last revert, in reference samples."""
    reversals: int = 0
    """Changes that took an earlier one back, wholly or in part: a sign that what is measured is less certain than it
    looks."""
    noise_interval: int | None = None
    """Steps between two measurements; None until the first has shown its cost, or where that does not count."""
    noise_cost_s: float = 0.0

    def after(self, facts: StepFacts, policy: BatchPolicy) -> History:
        """The history with one more step."""
        times = self._timed(facts)
        known = self._measured(facts, policy) if facts.noise_cost_s > 0.0 else self
        if not facts.finite:
            return replace(known, times=times)
        batch = facts.layout.global_batch
        change = self.change
        if change is not None:
            change = replace(change, deviation=change.deviation.after(facts.progress, facts.loss, batch))
        return replace(known, times=times, trend=self.trend.after(facts.progress, facts.loss, batch), change=change)

    def changed(self, kind: Kind, step: int, progress: float, before: Layout, after: Layout) -> History:
        """The history once ``before`` has been left for ``after``, or found to be the right place to stay."""
        if before == after and self.change is not None:
            return replace(self, change=replace(self.change, kind=kind))
        explored = self.change is not None and self.change.kind == "explore"
        reversed_ = kind in ("shrink", "revert") or (kind == "settle" and not explored)
        return replace(
            self,
            change=Change(kind, step, progress, before, Deviation(self.trend)),
            ambition=self.ambition_at(progress) / 2.0 if kind == "revert" else self.ambition,
            reverted_at=progress if kind == "revert" else self.reverted_at,
            reversals=self.reversals + reversed_,
        )

    def ambition_at(self, progress: float) -> float:
        """Factor on the noise scale to decide on: halved by each revert, doubled, to 1 at most, as progress doubles.

        What the loss did not bear early in a run says little about later: noise scales grow.
        """
        if self.ambition >= 1.0 or self.reverted_at <= 0.0:
            return self.ambition
        return min(1.0, self.ambition * 2.0 ** math.floor(math.log2(progress / self.reverted_at)))

    def measures(self, step: int, policy: BatchPolicy) -> bool:
        """Whether optimizer step ``step`` (from 1 on) measures the gradient noise."""
        opens = step <= OPENING_STEPS and self.noise_scale is None and policy.noise_cost < 1.0
        if opens:
            return step % max(policy.noise_interval_steps // OPENING_PACE, SHORTEST_NOISE_INTERVAL) == 0
        return step % (self.noise_interval or policy.noise_interval_steps) == 0

    def _measured(self, facts: StepFacts, policy: BatchPolicy) -> History:
        known = self.noise_cost_s
        cost = facts.noise_cost_s if known == 0.0 else COST_MEMORY * known + (1.0 - COST_MEMORY) * facts.noise_cost_s
        # The first measurement pays for what every first call pays.
        step_s = self.times.observed_step_time_s(nodes=facts.nodes, **vars(facts.layout))
        if step_s is None:
            step_s = max(facts.step_time_s - facts.noise_cost_s, LEAST_STEP * facts.step_time_s)
        wanted = math.ceil(cost / (policy.noise_cost * step_s))
        interval: int | None = min(max(wanted, SHORTEST_NOISE_INTERVAL), LONGEST_NOISE_INTERVAL)
        if policy.noise_cost == 1.0:
            interval = None
        if facts.noise is None:
            return replace(self, noise_cost_s=cost, noise_interval=interval)
        window = self.window.add(facts.noise)
        return replace(self, window=window, noise_scale=window.estimate(), noise_cost_s=cost, noise_interval=interval)

    def _timed(self, facts: StepFacts) -> StepTimes:
        """A measured step is longer than others and counts only for what it alone can tell apart: its backward pass."""
        layout, measured = facts.layout, facts.noise_cost_s > 0.0
        part = facts.micro_batch_time_s
        if measured and (part is None or layout.accumulation > 1 or layout.workers == 1):
            return self.times
        if measured and part is not None:
            part = max(part - facts.noise_cost_s, 0.0) or None
        return self.times.observe(
            nodes=facts.nodes,
            **vars(layout),
            step_time_s=None if measured else facts.step_time_s,
            accumulation_time_s=part,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "window": self.window.to_dict(),
            "times": self.times.to_dict(),
            "trend": self.trend.to_dict(),
            "change": None if self.change is None else self.change.to_dict(),
            "ambition": self.ambition,
            "reverted_at": self.reverted_at,
            "reversals": self.reversals,
            "noise_interval": self.noise_interval,
            "noise_cost_s": self.noise_cost_s,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> History:
        """The inverse of ``to_dict``."""
        window = NoiseScaleWindow.from_dict(saved["window"])
        return cls(
            window=window,
            noise_scale=window.estimate(),
            times=StepTimes.from_dict(saved["times"]),
            trend=LossTrend.from_dict(saved["trend"]),
            change=None if saved["change"] is None else Change.from_dict(saved["change"]),
            ambition=saved["ambition"],
            reverted_at=saved["reverted_at"],
            reversals=saved["reversals"],
            noise_interval=saved["noise_interval"],
            noise_cost_s=saved["noise_cost_s"],
        )
