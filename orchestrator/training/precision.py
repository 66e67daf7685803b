"""16-bit compute: what flows into a model is cast, what it returns is fp32, and batch norm keeps fp32 statistics."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["DTYPES", "compute_in"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Fit ``model``, whose parameters DeepSpeed will cast to the 16-bit ``dtype``, with what else that takes."""
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (_cast(args, dtype), _cast(kwargs, dtype)), with_kwargs=True
    )
    # Losses are computed in fp32.
    model.register_forward_hook(lambda _, __, output: _cast(output, torch.float32))
    for module in model.modules():
        if type(module) in BATCH_NORMS:
            module.forward = functools.partial(_batch_norm, module)


def _batch_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What batch norm's own forward does, with its affine parameters in fp32.

    Running statistics stay fp32, since a momentum of 0.1 is lost in 8 bits of mantissa, and torch computes on
    16-bit inputs with fp32 statistics only where weight and bias are fp32 as well.
    """
    module._check_input_dim(x)  # noqa: SLF001
    momentum = module.momentum or 0.0
    tracks = module.track_running_stats
    if module.training and tracks:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # a cumulative average
            momentum = 1.0 / float(module.num_batches_tracked)
    return F.batch_norm(
        x,
        module.running_mean if tracks else None,
        module.running_var if tracks else None,
        None if module.weight is None else module.weight.float(),
        None if module.bias is None else module.bias.float(),
        module.training or not tracks,
        momentum,
        module.eps,
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value
