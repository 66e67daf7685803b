"""Goodput of layouts: samples per second times what a sample of that batch is worth to the recipe.

``goodput = B / T_step x eff(B)`` (Qiao et al. 2021, arXiv:2008.12260, equation 6), in reference samples per second;
``eff`` is that of McCandlish et al. 2018 (arXiv:1812.06162). Time to the target is proportional to 1 / goodput. The
space is small: it is enumerated, without a heuristic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.errors import ConfigError
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel
from orchestrator.scheduling.noise_scale import statistical_efficiency
from orchestrator.scheduling.observation import Alternative

__all__ = ["RatedLayout", "best_layout", "rate", "rated"]


@dataclass(frozen=True)
class RatedLayout:
    """What each worker runs, and the goodput it gives in reference samples per second."""

    micro_batch: int
    accumulation: int
    goodput: float


def best_layout(
    model: StepTimeModel,
    noise_scale: float,
    reference_batch: int,
    *,
    nodes: int,
    workers: int,
    micro_batches: Sequence[int],
    batch_range: tuple[int, int],
) -> RatedLayout:
    """Return the layout of the highest goodput with a global batch within ``batch_range``, both ends included.

    Args:
        model: Predicts the time of a step.
        noise_scale: In samples; infinite where every sample counts alike.
        reference_batch: Samples per step the recipe was tuned at.
        nodes: Machines the workers are on.
        workers: Data-parallel workers.
        micro_batches: Samples per worker and forward pass that memory allows.
        batch_range: Smallest and largest global batch.

    Raises:
        ConfigError: no micro batch and accumulation give a batch in the range.
    """
    low, high = batch_range
    layouts = [
        Layout(workers, micro_batch, accumulation)
        for micro_batch in micro_batches
        for accumulation in range(max(1, -(-low // (workers * micro_batch))), high // (workers * micro_batch) + 1)
    ]
    if not layouts:
        units = ", ".join(str(workers * micro_batch) for micro_batch in micro_batches) or "none"
        raise ConfigError(
            f"no global batch from {low} to {high} is a multiple of workers x micro batch ({units}): widen the range, "
            "or allow smaller micro batches"
        )
    best = rated(model, noise_scale, reference_batch, nodes, layouts)[0]
    return RatedLayout(best.layout.micro_batch, best.layout.accumulation, best.goodput)


def rated(
    model: StepTimeModel, noise_scale: float, reference_batch: int, nodes: int, layouts: Iterable[Layout]
) -> list[Alternative]:
    """Return ``layouts`` as predicted, best first; of equals the larger micro batch, then the smaller accumulation."""
    by_workers: dict[int, list[Layout]] = {}
    for layout in layouts:
        by_workers.setdefault(layout.workers, []).append(layout)
    found: list[Alternative] = []
    for workers, ours in by_workers.items():  # all at once: one by one takes as long as a step of a small model
        micro_batches, accumulations = np.array([(one.micro_batch, one.accumulation) for one in ours]).T
        times = model.step_time_s(
            nodes=nodes, workers=workers, micro_batch=micro_batches, accumulation=accumulations
        ).tolist()
        for layout, step_time_s in zip(ours, times, strict=True):
            found.append(_alternative(layout, step_time_s, noise_scale, reference_batch))
    return sorted(found, key=lambda one: (-one.goodput, -one.layout.micro_batch, one.layout.accumulation))


def rate(model: StepTimeModel, noise_scale: float, reference_batch: int, nodes: int, layout: Layout) -> Alternative:
    """Return ``layout`` as predicted."""
    step_time_s = float(model.step_time_s(nodes=nodes, **vars(layout)))
    return _alternative(layout, step_time_s, noise_scale, reference_batch)


def _alternative(layout: Layout, step_time_s: float, noise_scale: float, reference_batch: int) -> Alternative:
    efficiency = float(statistical_efficiency(noise_scale, reference_batch, layout.global_batch))
    return Alternative(layout, step_time_s, efficiency, layout.global_batch / step_time_s * efficiency)
