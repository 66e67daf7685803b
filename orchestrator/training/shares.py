"""Which part of which parameter each flat tensor of this rank's optimizer holds, in every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Share", "Slice", "shares"]


@dataclass(frozen=True)
class Slice:
    """``numel`` elements of parameter ``name`` from ``there`` on lie in the flat tensor from ``here`` on."""

    name: str
    here: int
    there: int
    numel: int


@dataclass(frozen=True)
class Share:
    """A tensor that the optimizer updates, flat in stages 1 to 3, and what it is made of; the rest of it is padding."""

    tensor: torch.Tensor
    slices: tuple[Slice, ...]


def shares(optimizer: Any, names: Mapping[torch.Tensor, str]) -> list[Share] | None:
    """This rank's shares, in the optimizer's order; None in stage 0 with 16 bit, whose wrappers do not tell.

    Args:
        optimizer: DeepSpeed's wrapper (0.19.8), or torch's own in stage 0 and fp32.
        names: of every parameter of the model.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return [Share(p, (Slice(names[p], 0, 0, p.numel()),)) for p in parameters]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [Share(flat, tuple(_stage_3(group, names))) for flat, group in pairs]
    if hasattr(optimizer, "update_lp_params"):
        groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
        pairs = zip(optimizer.param_groups, groups, strict=True)
        return [Share(held["params"][0], tuple(_stage_1_or_2(group, names))) for held, group in pairs]
    return None


def _stage_1_or_2(group: Sequence[Any], names: Mapping[torch.Tensor, str]) -> Iterator[Slice]:
    for parameter in group:
        if (mapping := parameter._hp_mapping) is not None:  # noqa: SLF001 - DeepSpeed's own loader goes by it too
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            yield Slice(names[parameter], here.start, there.start, here.numel)


def _stage_3(group: Sequence[Any], names: Mapping[torch.Tensor, str]) -> Iterator[Slice]:
    """Of each parameter a rank holds an equal part, the last one padded, one parameter after the other."""
    offset, rank = 0, dist.get_rank()
    for parameter in group:
        part, numel = parameter.partition_numel(), parameter.ds_numel
        if (size := min(part, numel - rank * part)) > 0:
            yield Slice(names[parameter], offset, rank * part, size)
        offset += part
