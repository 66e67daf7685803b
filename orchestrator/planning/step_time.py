"""TEMPORARY stand-in so that other modules can be run until the real module lands here. Overwrite it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StepTiming:
    nodes: int
    workers: int
    micro_batch: float
    step_time_s: float
    accumulation_time_s: float


@dataclass(frozen=True)
class StepTimeModel:
    alpha: float
    beta: float
    network: float
    observed: tuple = ()

    def step_time_s(self, *, nodes: int, workers: int, micro_batch: Any, accumulation: Any) -> Any:
        acc = self.alpha + self.beta * micro_batch
        for o in self.observed:
            if o[:4] == (nodes, workers, micro_batch, accumulation):
                return o[4]
        return acc * accumulation + (self.network if workers > 1 else 0.0)


def fit_step_time(timings: Iterable[StepTiming]) -> StepTimeModel:
    t = list(timings)
    m = np.array([x.micro_batch for x in t], float)
    a = np.array([x.accumulation_time_s for x in t])
    s = np.array([x.step_time_s for x in t])
    if len(set(m)) > 1:
        beta, alpha = np.polyfit(m, a, 1)
        beta, alpha = max(beta, 1e-9), max(alpha, 1e-9)
    else:
        alpha, beta = 0.5 * a[0], 0.5 * a[0] / m[0]
    return StepTimeModel(float(alpha), float(beta), float(max(np.mean(s - a), 0)))


@dataclass(frozen=True)
class StepTimes:
    seen: tuple = ()  # ((nodes, workers, m, a), count, steps, accs)

    def observe(self, *, nodes, workers, micro_batch, accumulation, step_time_s, accumulation_time_s) -> StepTimes:
        key = (nodes, workers, micro_batch, accumulation)
        rest = tuple(x for x in self.seen if x[0] != key)
        old = next((x for x in self.seen if x[0] == key), (key, 0, (), ()))
        steps = (*old[2], step_time_s)[-16:] if old[1] >= 2 else ()
        accs = (*old[3], accumulation_time_s)[-16:] if old[1] >= 2 and accumulation_time_s else old[3]
        return StepTimes((*rest, (key, old[1] + 1, steps, accs)))

    def count(self, *, nodes, workers, micro_batch, accumulation) -> int:
        return next(
            (
                len(x[2]) if x[1] < 18 else x[1] - 2
                for x in self.seen
                if x[0] == (nodes, workers, micro_batch, accumulation)
            ),
            0,
        )

    def micro_batches(self, *, nodes, workers) -> set[int]:
        return {x[0][2] for x in self.seen if x[0][:2] == (nodes, workers) and x[2]}

    def observed_step_time_s(self, *, nodes, workers, micro_batch, accumulation) -> float | None:
        return next(
            (
                statistics.median(x[2])
                for x in self.seen
                if x[0] == (nodes, workers, micro_batch, accumulation) and x[2]
            ),
            None,
        )

    def timings(self) -> tuple[StepTiming, ...]:
        out = []
        for (n, w, m, a), _, steps, accs in self.seen:
            if steps:
                s = statistics.median(steps)
                acc = statistics.median(accs) if accs else s / a * 0.9
                out.append(StepTiming(n, w, m, max(s - (a - 1) * acc, 1e-6), acc))
        return tuple(out)

    def model(self) -> StepTimeModel | None:
        t = self.timings()
        if not t:
            return None
        fit = fit_step_time(t)
        obs = tuple((*x[0], statistics.median(x[2])) for x in self.seen if x[2])
        return StepTimeModel(fit.alpha, fit.beta, fit.network, obs)

    def to_dict(self) -> dict[str, Any]:
        return {"seen": [list(x) for x in self.seen]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StepTimes:
        return cls(tuple((tuple(k), c, tuple(s), tuple(a)) for k, c, s, a in saved["seen"]))
