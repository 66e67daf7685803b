"""A made-up run for policies: its steps take as long, and its gradient is as noisy, as it is told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from orchestrator.config import BatchPolicy, Goodput
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.history import History, StepFacts
from orchestrator.scheduling.noise_scale import NoiseSample, gain
from orchestrator.scheduling.observation import Decision, Observation, Policy


@dataclasses.dataclass
class Simulation:
    """Trains ``steps`` steps under ``policy``; decisions act one step later, as in a run."""

    policy: Policy
    settings: BatchPolicy = dataclasses.field(default_factory=Goodput)
    noise_scale: Callable[[float], float] = lambda _: 1000.0
    step_time: Callable[[Layout], float] = lambda layout: (
        0.004 + layout.accumulation * (0.016 + 1e-4 * layout.micro_batch)
    )
    speed: Callable[[int], float] = lambda _: 1.0
    """How fast the machine is at a step: other people use it too."""
    loss: Callable[[float, Layout], float] = lambda progress, _: 0.5 + 4.0 * progress**-0.3
    layout: Layout = dataclasses.field(default_factory=lambda: Layout(2, 8, 1))
    reference: int = 16
    length: float | None = 1e6
    train_samples: int = 100_000
    limit: int | None = None
    seed: int = 0
    history: History = dataclasses.field(default_factory=History)
    step: int = 0
    progress: float = 0.0
    time_s: float = 0.0
    decisions: list[tuple[int, Decision]] = dataclasses.field(default_factory=list)
    layouts: list[Layout] = dataclasses.field(default_factory=list)
    chance: np.random.Generator = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.chance = np.random.default_rng(self.seed)

    def observe(self) -> Observation:
        return Observation(
            step=self.step,
            progress=self.progress,
            length=self.length,
            schedule_factor=1.0 if self.length is None else max(1.0 - self.progress / self.length, 0.0),
            layout=self.layout,
            nodes=1,
            reference_batch=self.reference,
            train_samples=self.train_samples,
            noise_scale=self.history.noise_scale,
            times=self.history.times,
            trend=self.history.trend,
            change=self.history.change,
            ambition=self.history.ambition_at(self.progress),
            reversals=self.history.reversals,
            micro_batch_limit=self.limit,
        )

    def run(self, steps: int) -> Simulation:
        for _ in range(steps):
            decision = self.policy.decide(self.observe()) if self.step else None
            self._take()
            if decision is not None:
                self.decisions.append((self.step, decision))
                before, self.layout = self.layout, decision.layout
                self.history = self.history.changed(decision.kind, self.step, self.progress, before, self.layout)
        return self

    def _take(self) -> None:
        generator, layout, noise = self.chance, self.layout, self.noise_scale(self.progress)
        self.layouts.append(layout)
        seconds = self.step_time(layout) / self.speed(self.step) * generator.lognormal(0.0, 0.03)
        measured = self.history.measures(self.step + 1, self.settings)
        self.step += 1
        self.time_s += seconds
        self.progress += self.reference * float(gain(noise, self.reference, layout.global_batch))
        loss = self.loss(self.progress, layout) + generator.standard_normal() / math.sqrt(layout.global_batch)
        facts = StepFacts(
            step=self.step,
            progress=self.progress,
            layout=layout,
            nodes=1,
            loss=loss,
            finite=True,
            step_time_s=seconds,
            micro_batch_time_s=0.8 * seconds / layout.accumulation,
            noise=_sample(generator, noise, layout) if measured else None,
            noise_cost_s=5e-4 if measured else 0.0,
        )
        self.history = self.history.after(facts, self.settings)

    @property
    def batches(self) -> list[int]:
        """Global batch of every step."""
        return [layout.global_batch for layout in self.layouts]


def _sample(generator: np.random.Generator, noise: float, layout: Layout, dimension: int = 200) -> NoiseSample:
    """Norms of gradients with |G|^2 = 1 and tr(Sigma) = ``noise`` spread over ``dimension`` axes."""
    small = layout.workers * layout.accumulation
    true = np.zeros(dimension)
    true[0] = 1.0
    spread = math.sqrt(noise / dimension / layout.micro_batch)
    gradients = true + spread * generator.standard_normal((small, dimension))
    return NoiseSample.from_norms(
        mean_small_sq=float((gradients**2).sum(axis=1).mean()),
        big_sq=float((gradients.mean(axis=0) ** 2).sum()),
        small_batch=layout.micro_batch,
        small_batches=small,
    )
