"""A model profile as plain numbers: what one micro batch computes, moves, keeps and needs at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Kernel", "Linear", "Pass", "Profile"]

Kind = Literal["matmul", "attention", "memory"]


class Linear(NamedTuple):
    """``base + per_sample * micro_batch``."""

    base: float
    per_sample: float

    def at(self, micro_batch: ArrayLike) -> Any:
        """The value at a micro batch, or an array of them; never negative."""
        return np.maximum(0.0, self.base + self.per_sample * np.asarray(micro_batch, dtype=float))


@dataclass(frozen=True)
class Kernel:
    """Calls of one kernel on operands of one size."""

    kind: Kind
    count: int
    flops: Linear
    """Done in one call."""
    moved_bytes: Linear
    """Read and written in one call."""
    inner: Linear
    """Length of a matrix product's inner dimension."""


@dataclass(frozen=True)
class Pass:
    """Forward and backward of one micro batch."""

    kernels: tuple[Kernel, ...]
    forward_flops: Linear
    """As publications count them: whole attention, whatever its mask."""
    backward_flops: Linear
    """Likewise; with activation checkpointing what is computed again is in it."""
    kept_bytes: Linear
    """What autograd keeps from forward to backward."""
    peak_bytes: Linear
    """Most bytes alive at once, kept ones among them; parameters and their finished gradients are not."""


@dataclass(frozen=True)
class Profile:
    """A model, its loss and its data, in numbers. Parameters are counted in elements."""

    parameters: int
    """Trained ones."""
    frozen_parameters: int
    largest_layer: int
    """Most parameters that one module owns by itself."""
    small_parameters: int
    """Trained ones in tensors that ZeRO stage 3 keeps whole."""
    tensors: int
    """How many trained tensors there are."""
    buffer_bytes: int
    sample_bytes: int
    """One sample's columns."""
    precision: str
    plain: Pass
    checkpointed: Pass | None
    """With activation checkpointing; None where the model has no repeated blocks."""
    not_checkpointed: str = ""
    """Why ``checkpointed`` is None."""
    untraced: str = ""
    """Why it had to be measured with real numbers; empty where it was traced."""
    convolutions: int = 0
    """Two-dimensional ones in the model."""

    def of(self, checkpointing: bool) -> Pass:
        """The pass with or without activation checkpointing."""
        if not checkpointing:
            return self.plain
        assert self.checkpointed is not None, "asked for where the model has no repeated blocks"
        return self.checkpointed

    @property
    def flops_per_sample(self) -> float:
        """Forward and backward of a sample, nothing counted twice: what MFU is taken of (Chowdhery et al. 2022)."""
        return self.plain.forward_flops.per_sample + self.plain.backward_flops.per_sample
