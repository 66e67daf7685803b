"""Evaluate the held-out set, split over the ranks, every sample counted exactly once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.job import Dataset, Task
from orchestrator.training.data import share_of
from orchestrator.training.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["evaluate"]


def evaluate(engine: Engine, task: Task, dataset: Dataset, *, batch: int) -> dict[str, float]:
    """Mean of each of ``task.metrics`` over ``dataset``, the same on every rank.

    Every rank runs the same number of forward passes, because ZeRO stage 3 gathers parameters in each;
    a rank whose share is used up repeats a sample and does not count it.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = share_of(len(dataset), rank, world_size)
    passes = math.ceil(len(share_of(len(dataset), 0, world_size)) / batch)
    sums: dict[str, Tensor] = {}
    with engine.evaluation() as model:
        for index in range(passes):
            counted = mine[index * batch : (index + 1) * batch]
            positions = np.asarray(counted if counted else [0], dtype=np.int64)
            values = task.metrics(model, engine.to_device(dataset.take(positions)))
            for name, value in _checked(values, len(positions)).items():
                total = value.double().sum() * bool(counted)
                sums[name] = sums.get(name, torch.zeros_like(total)) + total
    names = sorted(sums)
    totals = torch.stack([sums[name] for name in names])
    dist.all_reduce(totals)
    return {name: float(total) / len(dataset) for name, total in zip(names, totals, strict=True)}


def _checked(values: Mapping[str, Tensor], samples: int) -> Mapping[str, Tensor]:
    if not values:
        raise ValueError("Task.metrics returned nothing; return at least one metric, such as {'loss': ...}")
    for name, value in values.items():
        if value.shape != (samples,):
            raise ValueError(
                f"Task.metrics[{name!r}] has shape {tuple(value.shape)} for {samples} samples; "
                "return one value per sample"
            )
    return values
