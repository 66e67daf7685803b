"""What a plan says of how a device computes, switched on: compiling, TF32, order of memory, kernel of attention."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchestrator.errors import ConfigError
from orchestrator.planning.plan import Plan

__all__ = ["attending", "compile_model", "in_channels_last", "require_compiler", "set_fp32_products"]

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPILERS = ("c++", "g++", "clang++")


def require_compiler(plan: Plan) -> None:
    """Refuse to compile for a CPU where nothing can: torch.compile writes C++ there.

    Raises:
        ConfigError: no C++ compiler is found.
    """
    if not plan.computing.compile or plan.device != "cpu":
        return
    named = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if not any(shutil.which(name) for name in named):
        raise ConfigError(
            f"layout.compile=true needs a C++ compiler, and {' and '.join(named)} cannot be found: install one, "
            "or set layout.compile=false"
        )


def compile_model(engine: Any, plan: Plan) -> None:
    """Have DeepSpeed's ``engine`` compile its module, in place: names of parameters and hooks stay.

    By DeepSpeed's own method and once it has been set up, so that it knows of it, and its hooks are compiled or left
    out as it has marked them. Shapes that change, when the batch does, are compiled once more and then for any size.
    """
    if plan.computing.compile:
        require_compiler(plan)
        engine.compile(backend="inductor")


def set_fp32_products(plan: Plan) -> None:
    """Let fp32 matrix products and convolutions round to TF32, or not, in this process."""
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("high" if plan.computing.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = plan.computing.tf32


def in_channels_last(model: nn.Module) -> None:
    """Put the images that flow into ``model`` into channels_last, as convolutions hand it on.

    The inputs alone: DeepSpeed 0.19.8 cannot broadcast weights that lie in this order.
    """
    model.register_forward_pre_hook(lambda _, args: tuple(_laid_out(value) for value in args))


def _laid_out(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


@contextlib.contextmanager
def attending(plan: Plan) -> Iterator[None]:
    """Inside, attention takes the planned kernel and no other."""
    if plan.computing.attention == "auto":
        yield
        return
    with sdpa_kernel(KERNELS[plan.computing.attention]):
        yield
