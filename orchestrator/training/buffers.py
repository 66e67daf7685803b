"""Buffers such as batch-norm statistics: one truth over all ranks, where each rank keeps its own while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["averaged", "load_local_buffers", "local_buffers", "mean_of"]


@contextlib.contextmanager
def averaged(model: nn.Module) -> Iterator[None]:
    """Inside, every rank's floating-point buffers are the mean over the ranks, and the others are rank 0's.

    Afterwards each rank has its own again, so that evaluating or saving never changes the course of a run:
    a run that is interrupted and one that is left alone stay bit for bit the same.
    """
    own = local_buffers(model)
    if own and dist.get_world_size() > 1:
        _average(model)
    try:
        yield
    finally:
        load_local_buffers(model, own)


def local_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of this rank's own buffers, by name."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def load_local_buffers(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Put copies made by ``local_buffers`` back."""
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def mean_of(ranks: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What ``averaged`` shows of the buffers of several ranks, from copies of them."""
    first = ranks[0]
    return {
        name: torch.stack([own[name].double() for own in ranks]).mean(dim=0).to(buffer.dtype)
        if buffer.is_floating_point()
        else buffer
        for name, buffer in first.items()
    }


@torch.no_grad()
def _average(model: nn.Module) -> None:
    buffers = [buffer for _, buffer in model.named_buffers()]
    floating = [b for b in buffers if b.is_floating_point()]
    if floating:
        # One message for all of them; fp64, so that the order of ranks does not show.
        flat = torch.cat([b.detach().double().flatten() for b in floating])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for buffer, mean in zip(floating, flat.split([b.numel() for b in floating]), strict=True):
            buffer.copy_(mean.view_as(buffer))
    for buffer in buffers:
        if not buffer.is_floating_point():
            dist.broadcast(buffer, src=0)
