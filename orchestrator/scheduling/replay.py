"""Another policy on a recorded run, without training: what it would have decided, and how long it would have taken.

The recorded run says how long each layout's step takes (through the same model that decides) and how noisy the gradient
was at each progress. That the noise depends on progress alone, and not on the batch that led there, is what counting
progress in reference samples means; that the loss follows is assumed too, so the guard never strikes in a replay.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel, StepTimes
from orchestrator.scheduling.history import History
from orchestrator.scheduling.learning_rate import step_worth
from orchestrator.scheduling.noise_scale import NoiseScale
from orchestrator.scheduling.observation import Observation
from orchestrator.scheduling.policy import make_policy
from orchestrator.scheduling.schedule import factor

__all__ = ["Decided", "Replayed", "replay"]

Record = Mapping[str, Any]
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Decided:
    """A decision of the replayed policy."""

    step: int
    progress: float
    kind: str
    batch: int
    reason: str


@dataclass(frozen=True)
class Replayed:
    """What the policy would have done with the recorded run."""

    steps: int
    samples: int
    progress: float
    time_s: float
    decisions: tuple[Decided, ...]


def replay(
    records: Sequence[Record], config: RunConfig, *, train_samples: int, length: float | None, nodes: int = 1
) -> Replayed:
    """Run ``config.policy`` over what ``records`` (``metrics.jsonl``) tell, to the progress that they reach.

    Raises:
        ConfigError: the records hold too little to predict a step's time from.
    """
    times, noise = _recorded_times(records, nodes), _Noise.of(records)
    model = times.model()
    if model is None:
        raise ConfigError(
            "too few steps were recorded to know how long a step takes: replay a run of ten steps or more"
        )
    first = records[0]
    batch = config.layout.global_batch
    workers = first["workers"]
    layout = Layout(workers, first["micro_batch"], first["accumulation"])
    if batch != "auto" and batch != layout.global_batch:
        layout = Layout(workers, max(1, batch // workers), 1)
    return _follow(config, model, noise, layout, (train_samples, length, nodes, records[-1]["progress"]))


def _follow(
    config: RunConfig,
    model: StepTimeModel,
    noise: _Noise,
    layout: Layout,
    frame: tuple[int, float | None, int, float],
) -> Replayed:
    train_samples, length, nodes, end = frame
    policy, reference = make_policy(config), config.recipe.batch
    steps, samples, progress, time_s = 0, 0, 0.0, 0.0
    times, history, decided = StepTimes(), History(), []
    while progress < end and steps < MOST_STEPS:
        known = noise.at(progress)
        step_time_s = float(model.step_time_s(nodes=nodes, **asdict(layout)))
        worth = step_worth(known, reference, layout.global_batch)
        steps, samples = steps + 1, samples + layout.global_batch
        progress, time_s = progress + worth, time_s + step_time_s
        times = times.observe(nodes=nodes, **asdict(layout), step_time_s=step_time_s, accumulation_time_s=None)
        share = min(1.0, progress / length) if length else 0.0
        seen = Observation(
            step=steps,
            progress=progress,
            length=length,
            schedule_factor=factor(config.recipe.schedule, share, share),
            layout=layout,
            nodes=nodes,
            reference_batch=reference,
            train_samples=train_samples,
            noise_scale=known,
            times=times,
            trend=history.trend,
            change=history.change,
            reversals=history.reversals,
        )
        if (decision := policy.decide(seen)) is not None:
            decided.append(Decided(steps, progress, decision.kind, decision.layout.global_batch, decision.reason))
            history = history.changed(decision.kind, steps, progress, layout, decision.layout)
            layout = decision.layout
    return Replayed(steps, samples, progress, time_s, tuple(decided))


def _recorded_times(records: Sequence[Record], nodes: int) -> StepTimes:
    times = StepTimes()
    for record in records:
        if not record.get("noise_cost_s"):
            times = times.observe(
                nodes=nodes,
                workers=record["workers"],
                micro_batch=record["micro_batch"],
                accumulation=record["accumulation"],
                step_time_s=record["step_time_s"],
                accumulation_time_s=record.get("micro_batch_time_s"),
            )
    return times


@dataclass(frozen=True)
class _Noise:
    """The recorded noise scale by progress."""

    progress: list[float]
    scales: list[NoiseScale]

    @classmethod
    def of(cls, records: Sequence[Record]) -> _Noise:
        known = [record for record in records if record.get("noise_scale_low") is not None]
        scales = [
            NoiseScale(_or_inf(r.get("noise_scale")), r["noise_scale_low"], _or_inf(r.get("noise_scale_high")))
            for r in known
        ]
        return cls([r["progress"] for r in known], scales)

    def at(self, progress: float) -> NoiseScale | None:
        """The last estimate at or before ``progress``; None before the first."""
        index = bisect.bisect_right(self.progress, progress) - 1
        return self.scales[index] if index >= 0 else None


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
