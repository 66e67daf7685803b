"""The learning-rate range test: let the rate rise over some steps and see where the loss falls fastest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.job import Task
from orchestrator.training.data import Stream, open_dataset
from orchestrator.training.optimizer import add_penalties, build_optimizer, set_learning_rate

__all__ = ["RangeTest", "range_test", "suggest"]

DIVERGED = 4.0
"""The test ends where the smoothed loss is so many times its lowest, as in fastai's."""
MEMORY = 0.9
"""Of the smoothed loss, per step."""


@dataclass(frozen=True)
class RangeTest:
    """Rates, the smoothed losses at them, and the rate to begin with."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float


def range_test(task: Task, config: RunConfig, *, low: float, high: float, steps: int) -> RangeTest:
    """Train a new model for up to ``steps`` steps of the reference batch, the rate rising from ``low`` to ``high``.

    Smith 2017 (arXiv:1506.01186, section 3.3), on a logarithmic scale. In this process and on its CPU: what it looks
    for is a factor of 3, which neither the number of workers nor the precision moves.

    Raises:
        ConfigError: bounds that do not rise, too few steps, or a loss that is not finite from the start.
    """
    if not 0 < low < high or steps < 20:
        raise ConfigError(
            f"range test from {low:g} to {high:g} in {steps} steps: give rising rates and 20 steps or more"
        )
    torch.manual_seed(config.seed)
    model = task.model().train()
    optimizer = build_optimizer(model, config.recipe, fused=False)
    add_penalties(optimizer)
    data = open_dataset(task.datasets().train, config)
    stream, batch = Stream.over(data, config.seed), config.recipe.batch
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for step in range(steps):
        rate = low * (high / low) ** (step / (steps - 1))
        columns = data.take(stream.indices(step * batch, batch))
        loss = task.loss(model, {name: torch.as_tensor(column) for name, column in columns.items()})
        optimizer.zero_grad()
        loss.backward()
        if config.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.recipe.clip_norm)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        mean = MEMORY * mean + (1 - MEMORY) * loss.item()
        smoothed = mean / (1 - MEMORY ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > DIVERGED * min(losses)):
            break
        rates.append(rate)
        losses.append(smoothed)
    if len(losses) < 10:
        raise ConfigError(f"the loss leaves all bounds at a rate of {rate:.2g} already: begin lower than {low:g}")
    return RangeTest(tuple(rates), tuple(losses), suggest(rates, losses))


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate at which the smoothed loss fell fastest per factor of the rate, before its lowest.

    The lowest loss itself lies near the edge of what is stable (Howard & Gugger 2020, arXiv:2002.04688, section 5.4.2).
    A place to begin a search from: a habit that works, not a law.
    """
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = [b - a for a, b in itertools.pairwise(losses[: lowest + 1])]
    return rates[min(range(len(slopes)), key=slopes.__getitem__)] if slopes else rates[0]
