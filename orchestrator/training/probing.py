"""A probe inside a worker: the real model takes two steps at one micro batch after another, and its peak is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.job import Dataset
from orchestrator.planning.probe import ACCUMULATION, Trial, next_micro_batch
from orchestrator.training.engine import Engine
from orchestrator.training.memory import MemoryGauge

__all__ = ["Probing", "run_trials"]


@dataclass(frozen=True)
class Probing:
    """One worker's part of a probe."""

    engine: Engine
    train_set: Dataset
    memory: MemoryGauge
    rank: int
    planned: int
    """The micro batch that the run is to begin with."""
    candidates: Sequence[int]
    begun: Callable[[int], None]
    """Told each micro batch before it is tried."""
    ended: Callable[[Trial], None]


def run_trials(probing: Probing, known: Sequence[Trial]) -> None:
    """Try one micro batch after another until enough is known; every rank must call it with the same arguments.

    A rank that runs out of memory raises: the others may wait for it in a collective, so the whole group has to end.
    """
    trials = list(known)
    while (size := _next(probing, trials)) is not None:
        if probing.rank == 0:
            probing.begun(size)
        trials.append(_try(probing, size))
        if probing.rank == 0:
            probing.ended(trials[-1])


def _next(probing: Probing, trials: Sequence[Trial]) -> int | None:
    """Rank 0's answer: it is worked out from the same numbers everywhere, but one must have the word."""
    word: list[Any] = [None]
    if probing.rank == 0:
        capacity = probing.memory.usable
        word = [
            next_micro_batch(trials, probing.candidates, planned=probing.planned, capacity_bytes=capacity),
        ]
    dist.broadcast_object_list(word, src=0, device=probing.engine.device)
    return None if word[0] is None else int(word[0])


def _try(probing: Probing, micro_batch: int) -> Trial:
    probing.memory.forget()
    engine, samples = probing.engine, len(probing.train_set)
    for _ in range(2):
        own = np.arange(ACCUMULATION * micro_batch, dtype=np.int64) + probing.rank * ACCUMULATION * micro_batch
        micro_batches = [probing.train_set.take(part % samples) for part in np.split(own, ACCUMULATION)]
        # A rate of 0: every kernel runs, and no weight moves.
        stats = engine.step(micro_batches, learning_rate=0.0)
    probing.memory.note(micro_batch)
    peak = torch.tensor([probing.memory.peaks[micro_batch]], dtype=torch.int64, device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return Trial(micro_batch, int(peak), stats.step_time_s, stats.micro_batch_time_s)
