"""What a model is worth, whatever runs it: its metrics on the held-out set, and how long a call takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import JobError
from orchestrator.job import Dataset, Task
from orchestrator.training.evaluation import MetricSums

__all__ = ["Latency", "evaluate_model", "largest_difference", "model_inputs", "time_calls"]

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Latency:
    """How long calls took: of one sample each, and of a batch, on this machine."""

    median_s: float
    p99_s: float
    samples_per_s: float
    """Of the batch."""
    threads: int


def evaluate_model(task: Task, model: nn.Module, dataset: Dataset, *, batch: int) -> dict[str, float]:
    """Metrics of ``model`` over ``dataset``, as the training loop takes them, in this process."""
    sums = MetricSums(task)
    with torch.inference_mode():
        for columns, count in _batches(dataset, batch):
            sums.add(task.metrics(model, columns), count)
    return sums.metrics(len(dataset))


def model_inputs(task: Task, model: nn.Module, dataset: Dataset, *, batch: int) -> list[Inputs]:
    """What the task calls its model with, for every batch of ``dataset``; the last may be shorter.

    Raises:
        JobError: ``Task.metrics`` calls the model with anything but tensors, or not once.
    """
    seen: list[Inputs] = []
    name = type(task).__name__

    def note(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        if kwargs or not args or not all(isinstance(value, Tensor) for value in args):
            raise JobError(f"{name}.metrics calls its model with more than tensors in order: export needs just those")
        seen.append(tuple(value.detach().clone() for value in args if isinstance(value, Tensor)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    calls = 0
    try:
        with torch.no_grad():
            for columns, _ in _batches(dataset, batch):
                task.metrics(model, columns)
                calls += 1
    finally:
        handle.remove()
    if len(seen) != calls:
        raise JobError(f"{name}.metrics calls its model {len(seen) / calls:g} times a batch: export needs one call")
    return seen


def largest_difference(model: nn.Module, reference: nn.Module, inputs: Sequence[Inputs]) -> float:
    """Largest absolute difference between the outputs of two models on ``inputs``."""
    with torch.inference_mode():
        return max(float((model(*args) - reference(*args)).abs().max()) for args in inputs)


def time_calls(model: nn.Module, inputs: Inputs, *, seconds: float = 1.0) -> Latency:
    """Time calls on one sample, then on all samples of ``inputs``, for about ``seconds`` together."""
    single = tuple(value[:1].contiguous() for value in inputs)
    with torch.inference_mode():
        alone = _durations(model, single, seconds / 2)
        together = _durations(model, inputs, seconds / 2)
    return Latency(
        median_s=float(np.median(alone)),
        p99_s=float(np.quantile(alone, 0.99)),
        samples_per_s=len(inputs[0]) / float(np.median(together)),
        threads=torch.get_num_threads(),
    )


def _durations(model: nn.Module, inputs: Inputs, seconds: float) -> list[float]:
    for _ in range(3):  # the first calls allocate and choose kernels
        model(*inputs)
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while len(durations) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        model(*inputs)
        durations.append(time.perf_counter() - started)
    return durations


def _batches(dataset: Dataset, batch: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    for start in range(0, len(dataset), batch):
        positions = np.arange(start, min(start + batch, len(dataset)))
        yield {name: torch.as_tensor(column) for name, column in dataset.take(positions).items()}, len(positions)
