"""Squared norms of the gradients of single micro batches: what the noise scale is estimated from.

A hook on a parameter sees this micro batch's own, unreduced gradient, in every ZeRO stage, before anything is added
to it or sent. The hooks are there only while a step is measured: a hook that does nothing still costs every parameter
of every step a call into Python.

Adam divides each coordinate's gradient by the root of its second moment, so what is noise to the loss is less so to the
update. ``Preconditioner`` measures in the update's own units, with one scalar for each parameter tensor: one for each
coordinate is useless where most of a gradient is zero, as on embeddings.

DeepSpeed's own hooks see a running sum (stages 0 and 1) or nothing (3), and reading each gradient back after the
step would cost an all-reduce per parameter. The norm of the whole batch's gradient needs no hook: the engine knows it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.training.shares import Share

__all__ = ["GradientNorms", "Preconditioner"]

UNCOUNTED = 1.5
"""How much longer a measured step takes than the seconds counted in here: autograd's way into Python, and caches that
the norms have turned over. Measured: a ResNet's steps on two CPUs were 0.98 ms longer, with about 0.65 ms counted."""


class GradientNorms:
    """Sums over micro batches of the squared gradient norm of each parameter of ``module``.

    ``sums`` is [parameters], fp64, on the parameters' device: ``take`` adds one micro batch to it.
    """

    def __init__(self, module: nn.Module) -> None:
        started = time.perf_counter()
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self.sums = torch.zeros(len(self._parameters), dtype=torch.float64, device=device)
        self.micro_batches = 0
        self._now: list[tuple[int, torch.Tensor]] = []
        self._last: Callable[[], None] = lambda: None
        self._counted_s = time.perf_counter() - started

    @property
    def cost_s(self) -> float:
        """Host seconds by which a step got longer, about."""
        return UNCOUNTED * self._counted_s

    @contextmanager
    def hooked(self, after_each: Callable[[], None] = lambda: None) -> Iterator[GradientNorms]:
        """Watch every gradient inside the context; ``after_each`` is called after each parameter's, cheaply."""
        started = time.perf_counter()
        self._last = after_each
        handles = [p.register_hook(self._hook(index)) for index, p in enumerate(self._parameters)]
        self._counted_s += time.perf_counter() - started
        try:
            yield self
        finally:
            started = time.perf_counter()
            for handle in handles:
                handle.remove()
            self._counted_s += time.perf_counter() - started

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
        self._counted_s += time.perf_counter() - started

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            started = time.perf_counter()
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            # In fp32: squares of bf16 and fp16 lose what is small, or overflow.
            self._now.append((index, torch.linalg.vector_norm(values.detach(), dtype=torch.float32)))
            self._last()
            self._counted_s += time.perf_counter() - started

        return hook


class Preconditioner:
    """Squared norms with each parameter tensor's gradient over ``sqrt(mean second moment) + eps``.

    The moments are those from before the step, so they are independent of the gradient that they weigh. Weights are
    scaled to a mean of 1: the noise scale, a ratio, does not depend on it.

    Args:
        optimizer: torch's Adam or AdamW inside DeepSpeed's wrapper; its step is watched from now on.
        held: this rank's shares of the parameters.
        sizes: elements of each parameter, by name, in the order of ``GradientNorms.sums``.
        sharded: whether a share is this rank's alone (ZeRO 1 to 3) or the same on all ranks (0).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, held: Sequence[Share], sizes: dict[str, int], *, sharded: bool
    ) -> None:
        self._index = {name: index for index, name in enumerate(sizes)}
        self._sizes = torch.tensor(list(sizes.values()), dtype=torch.float64)
        self._held = {id(share.tensor): share for share in held}
        self._sharded = sharded
        self._seen: torch.Tensor | None = None
        """While a step is watched, [2, parameters]: squares of gradients, and corrected second moments, summed."""
        self._eps = 0.0
        self.cost_s = 0.0
        """Host seconds that the last watched step took in here."""
        optimizer.register_step_pre_hook(self._look)

    def watch(self) -> None:
        """Look at the next step."""
        self._seen = torch.zeros(2, len(self._sizes), dtype=torch.float64)
        self.cost_s = 0.0

    def weigh(self, small_sums: torch.Tensor, grad_norm: float) -> tuple[float, float]:
        """End the watched step; returns the weighed mean square of the small batches and square of the whole.

        All ranks call it. Both are NaN where Adam had no moments yet.

        Args:
            small_sums: [parameters], this rank's mean over its micro batches of squared norms.
            grad_norm: of the whole gradient before clipping; the optimizer sees it clipped.
        """
        assert self._seen is not None
        started = time.perf_counter()
        seen, self._seen = self._seen, None
        workers = dist.get_world_size()
        device = small_sums.device
        sums = torch.stack([small_sums.cpu() / workers, *(seen if self._sharded else seen / workers)])
        if workers > 1:
            sums = sums.to(device)
            dist.all_reduce(sums)
            sums = sums.cpu()
        small, big, moments = sums
        self.cost_s += time.perf_counter() - started
        if not (float(moments.sum()) > 0.0 and float(big.sum()) > 0.0):
            return math.nan, math.nan
        weights = 1.0 / ((moments / self._sizes).sqrt() + self._eps).square()
        weights /= float((weights * self._sizes).sum() / self._sizes.sum())
        unclipped = grad_norm * grad_norm / float(big.sum())
        return float((weights * small).sum()), float((weights * big).sum()) * unclipped

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Stage 3 steps one sub-group at a time: each call adds what it sees."""
        if self._seen is None:
            return
        started = time.perf_counter()
        for group in optimizer.param_groups:
            self._eps = group["eps"]
            for tensor in group["params"]:
                state, share = optimizer.state.get(tensor, {}), self._held.get(id(tensor))
                if share is not None and tensor.grad is not None:
                    self._add(share, tensor.grad.flatten(), state, group["betas"][1])
        self.cost_s += time.perf_counter() - started

    def _add(self, share: Share, gradient: torch.Tensor, state: dict[str, object], beta2: float) -> None:
        assert self._seen is not None
        moment = state.get("exp_avg_sq")
        steps = float(state["step"]) if "step" in state else 0.0  # type: ignore[arg-type]
        for part in share.slices:
            index, inside = self._index[part.name], slice(part.here, part.here + part.numel)
            self._seen[0, index] += float(gradient[inside].double().square().sum())
            if isinstance(moment, torch.Tensor) and steps > 0.0:
                self._seen[1, index] += float(moment.flatten()[inside].double().sum()) / (1.0 - beta2**steps)
