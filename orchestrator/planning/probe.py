"""What a probe found: the real model at a few micro batches on the real devices, and how that corrects what is planned.

1. **Memory.** The peaks p(m) of those that ran are held against what was predicted, ``F + A(m)``: fixed part and
   activations. With two micro batches ``p = F + extra + factor * A(m)`` gives both by least squares; with one the
   difference is ``extra``. ``extra`` and ``factor`` then correct every other choice too: what the trace does not see (a
   library's workspace, a kernel's temporaries) belongs to the model and the device more than to the ZeRO stage.
2. **The limit.** A micro batch at which a rank ran out of memory does not fit the combination that was probed.
3. **Time.** The combination that was probed has the fitted step-time model of ``step_time.py``; others have the
   roofline's times, by what the probed ones took longer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import LayoutTimes, StepTimeModel, StepTimes, StepTiming, fit_step_time

__all__ = ["ACCUMULATION", "Correction", "Probe", "Trial", "next_micro_batch"]

ACCUMULATION = 2
"""Micro batches in a trial's step: the first of them is without synchronisation, so its time can be told."""
MOST_TRIALS = 6
FILLED = 0.95
"""Of the capacity, where the next trial is to land: closer would only find fragmentation."""
LARGEST_FACTOR = 4.0


class Planned(Protocol):
    """What a plan says that a probe depends on."""

    @property
    def layout(self) -> Layout: ...
    @property
    def nodes(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def zero_stage(self) -> int: ...
    @property
    def offload(self) -> str: ...
    @property
    def activation_checkpointing(self) -> bool: ...


@dataclass(frozen=True)
class Trial:
    """Two optimizer steps of ``ACCUMULATION`` micro batches each; the first of them is warm-up."""

    micro_batch: int
    peak_bytes: int | None
    """Most that was in use on any rank; None where a rank ran out of memory."""
    step_time_s: float | None = None
    micro_batch_time_s: float | None = None
    """Without synchronisation."""


@dataclass(frozen=True)
class Probe:
    """The trials, and the combination and workers they were run with."""

    device: str
    workers: int
    nodes: int
    precision: str
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    activation_checkpointing: bool
    trials: tuple[Trial, ...]

    @property
    def combination(self) -> tuple[int, Literal["none", "optimizer", "all"], bool]:
        """ZeRO stage, offload, activation checkpointing."""
        return self.zero_stage, self.offload, self.activation_checkpointing

    def matches(self, plan: Planned) -> bool:
        """Whether ``plan`` is what was probed."""
        combination = (plan.zero_stage, plan.offload, plan.activation_checkpointing)
        place = (plan.layout.workers, plan.nodes, plan.precision)
        return combination == self.combination and place == (self.workers, self.nodes, self.precision)

    @property
    def peaks(self) -> dict[int, int]:
        """Peak bytes by micro batch, of those that ran."""
        return {trial.micro_batch: trial.peak_bytes for trial in self.trials if trial.peak_bytes is not None}

    @property
    def refused(self) -> int | None:
        """The smallest micro batch at which a rank ran out of memory."""
        return min((trial.micro_batch for trial in self.trials if trial.peak_bytes is None), default=None)

    @property
    def timings(self) -> tuple[StepTiming, ...]:
        """What ``fit_step_time`` takes."""
        return tuple(
            StepTiming(
                nodes=self.nodes,
                workers=self.workers,
                micro_batch=trial.micro_batch,
                step_time_s=trial.step_time_s - (ACCUMULATION - 1) * _part(trial),
                accumulation_time_s=_part(trial),
            )
            for trial in self.trials
            if trial.step_time_s is not None
        )

    @cached_property
    def model(self) -> StepTimeModel | None:
        """Step times of the combination that was probed; None where nothing ran."""
        return fit_step_time(self.timings) if self.timings else None

    def step_times(self) -> StepTimes:
        """What a run begins to decide on."""
        return StepTimes(
            tuple(
                LayoutTimes(
                    nodes=self.nodes,
                    workers=self.workers,
                    micro_batch=trial.micro_batch,
                    accumulation=ACCUMULATION,
                    steps=1,
                    step_times_s=(trial.step_time_s,),
                    micro_batch_times_s=(_part(trial),),
                )
                for trial in self.trials
                if trial.step_time_s is not None
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Probe:
        """The inverse of ``to_dict``, also after a way through JSON."""
        return cls(**{**saved, "trials": tuple(Trial(**trial) for trial in saved["trials"])})


@dataclass(frozen=True)
class Correction:
    """What a probe does to predicted memory and times."""

    probe: Probe
    extra_bytes: float
    """On a device, whatever the micro batch."""
    factor: float
    """On activations and the peak over them."""
    slowdown: float
    """On times of combinations that were not probed."""

    @classmethod
    def of(
        cls,
        probe: Probe,
        *,
        fixed_bytes: float,
        peak_bytes: Callable[[int], float],
        step_time_s: Callable[[int], float],
    ) -> Correction:
        """From what was predicted for the probed combination.

        Args:
            probe: at least one of its trials ran.
            fixed_bytes: predicted to be in use whatever the micro batch.
            peak_bytes: predicted beside it, of a micro batch.
            step_time_s: predicted for ``ACCUMULATION`` micro batches.
        """
        sizes = list(probe.peaks)
        predicted = np.array([peak_bytes(size) for size in sizes])
        over = np.array([probe.peaks[size] for size in sizes]) - fixed_bytes
        factor = 1.0
        if len(sizes) > 1 and np.ptp(predicted) > 0:
            slope = float(np.polyfit(predicted, over, 1)[0])
            factor = min(max(slope, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
        ratios = [
            trial.step_time_s / step_time_s(trial.micro_batch)
            for trial in probe.trials
            if trial.step_time_s is not None
        ]
        return cls(
            probe=probe,
            extra_bytes=float(np.mean(over - factor * predicted)),
            factor=factor,
            slowdown=math.exp(statistics.mean(math.log(ratio) for ratio in ratios)),
        )


def next_micro_batch(
    trials: Sequence[Trial], candidates: Sequence[int], *, planned: int, capacity_bytes: float
) -> int | None:
    """The micro batch to try next, or None when enough is known.

    First a quarter of the planned one, then the planned one; then the largest that should fit by the line through what
    ran; after one that did not fit, the middle between it and the largest that did.

    Args:
        trials: those so far.
        candidates: micro batches that a run could use.
        planned: the one that it is to begin with.
        capacity_bytes: what a device may hold of what ``Trial.peak_bytes`` counts.
    """
    ran = {trial.micro_batch: trial.peak_bytes for trial in trials if trial.peak_bytes is not None}
    ceiling = min((trial.micro_batch for trial in trials if trial.peak_bytes is None), default=math.inf)
    floor = max(ran, default=0)
    left = sorted(size for size in set(candidates) if floor < size < ceiling)
    if not left or len(trials) >= MOST_TRIALS:
        return None
    if math.isfinite(ceiling):
        middle = math.sqrt(floor * ceiling)
        return max((size for size in left if size <= middle), default=left[0])
    if len(ran) < 2:
        wanted = planned if ran else max(1, planned // 4)
        return min((size for size in left if size >= wanted), default=left[-1])
    smallest = min(ran)
    growth = (ran[floor] - ran[smallest]) / (floor - smallest)
    room = FILLED * capacity_bytes - ran[floor]
    if room <= 0:
        return None
    limit = math.inf if growth <= 0 else floor + room / growth
    return max((size for size in left if size <= limit), default=None)


def _part(trial: Trial) -> float:
    """Seconds of a micro batch without synchronisation, never more than its share of the step."""
    assert trial.step_time_s is not None
    share = trial.step_time_s / ACCUMULATION
    return share if trial.micro_batch_time_s is None else min(trial.micro_batch_time_s, share)
