"""Evaluate the held-out set, split over the ranks, every sample counted exactly once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.job import Dataset, Summarizing, Task
from orchestrator.training.data import share_of
from orchestrator.training.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MetricSums", "evaluate"]


def evaluate(engine: Engine, task: Task, dataset: Dataset, *, batch: int) -> dict[str, float]:
    """Metrics of ``task`` over ``dataset``: means of ``task.metrics``, or what the task makes of them, on every rank.

    Every rank runs the same number of forward passes, because ZeRO stage 3 gathers parameters in each;
    a rank whose share is used up repeats a sample and does not count it.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = share_of(len(dataset), rank, world_size)
    passes = math.ceil(len(share_of(len(dataset), 0, world_size)) / batch)
    sums = MetricSums(task)
    with engine.evaluation() as model:
        for index in range(passes):
            counted = mine[index * batch : (index + 1) * batch]
            positions = np.asarray(counted if counted else [0], dtype=np.int64)
            values = task.metrics(model, engine.to_device(dataset.take(positions)))
            sums.add(values, len(positions), counted=bool(counted))
    sums.all_reduce()
    return sums.metrics(len(dataset))


class MetricSums:
    """Sums of ``task.metrics`` over samples, in fp64, and what the task makes of their means."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], samples: int, *, counted: bool = True) -> None:
        """Add the values of ``samples`` samples, or their shape alone where they are not ``counted``."""
        for name, value in self._checked(values, samples).items():
            total = value.double().sum(dim=0) * counted
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total

    def all_reduce(self) -> None:
        """Add up the sums of all ranks, in one message."""
        names = sorted(self._sums)
        flat = torch.cat([self._sums[name].flatten() for name in names])
        dist.all_reduce(flat)
        parts = flat.split([self._sums[name].numel() for name in names])
        self._sums = {name: part.view_as(self._sums[name]) for name, part in zip(names, parts, strict=True)}

    def metrics(self, samples: int) -> dict[str, float]:
        """Return the metrics of a set of ``samples``: the means, or what ``task.summarize`` makes of them."""
        means = {name: total / samples for name, total in self._sums.items()}
        found = self._task.summarize(means) if isinstance(self._task, Summarizing) else means
        return {name: float(value) for name, value in sorted(found.items())}

    def _checked(self, values: Mapping[str, Tensor], samples: int) -> Mapping[str, Tensor]:
        if not values:
            raise ValueError("Task.metrics returned nothing; return at least one metric, such as {'loss': ...}")
        summarizes = isinstance(self._task, Summarizing)
        for name, value in values.items():
            if value.shape != (samples,) and not (summarizes and value.shape[:1] == (samples,)):
                remedy = "one row per sample" if summarizes else "one value per sample"
                raise ValueError(
                    f"Task.metrics[{name!r}] has shape {tuple(value.shape)} for {samples} samples; return {remedy}"
                )
        return values
