"""Squared norms of the gradients of single micro batches: what the noise scale is estimated from.

A hook on a parameter sees this micro batch's own, unreduced gradient, in every ZeRO stage, before anything is added
to it or sent. The hooks are there only while a step is measured: a hook that does nothing still costs every parameter
of every step a call into Python.

DeepSpeed's own hooks see a running sum (stages 0 and 1) or nothing (3), and reading each gradient back after the
step would cost an all-reduce per parameter. The norm of the whole batch's gradient needs no hook: the engine knows it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["GradientNorms"]


class GradientNorms:
    """Sums over micro batches of the squared gradient norm of each parameter of ``module``.

    ``sums`` is [parameters], fp64, on the parameters' device: ``take`` adds one micro batch to it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self.sums = torch.zeros(len(self._parameters), dtype=torch.float64, device=device)
        self.micro_batches = 0
        self.cost_s = 0.0
        """Host seconds spent in here."""
        self._now: list[tuple[int, torch.Tensor]] = []
        self._last: Callable[[], None] = lambda: None

    @contextmanager
    def hooked(self, after_each: Callable[[], None] = lambda: None) -> Iterator[GradientNorms]:
        """Watch every gradient inside the context; ``after_each`` is called after each parameter's, cheaply."""
        started = time.perf_counter()
        self._last = after_each
        handles = [p.register_hook(self._hook(index)) for index, p in enumerate(self._parameters)]
        self.cost_s += time.perf_counter() - started
        try:
            yield self
        finally:
            started = time.perf_counter()
            for handle in handles:
                handle.remove()
            self.cost_s += time.perf_counter() - started

    def take(self, scale: float) -> None:
        """End a micro batch whose gradients were ``scale`` times those of its mean loss.

        A parameter whose gradient came in several parts (reentrant checkpointing of a shared layer) makes the sum
        NaN: the norm of a sum is not known from the norms of its parts.
        """
        started = time.perf_counter()
        indices = [index for index, _ in self._now]
        if indices:
            norms = torch.stack([norm for _, norm in self._now]).double() / scale
            if len(set(indices)) < len(indices):
                norms = norms * math.nan
            self.sums.index_add_(0, torch.tensor(indices, device=norms.device), norms.square().to(self.sums.device))
        self.micro_batches += 1
        self._now = []
        self.cost_s += time.perf_counter() - started

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            started = time.perf_counter()
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            # In fp32: squares of bf16 and fp16 lose what is small, or overflow.
            self._now.append((index, torch.linalg.vector_norm(values.detach(), dtype=torch.float32)))
            self._last()
            self.cost_s += time.perf_counter() - started

        return hook
