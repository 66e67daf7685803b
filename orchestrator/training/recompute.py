"""Activation checkpointing: recompute the insides of repeated blocks in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from orchestrator.errors import ConfigError
from orchestrator.training.buffers import load_local_buffers, local_buffers

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(model: nn.Module) -> int:
    """Wrap the model's repeated blocks in place; returns how many.

    A block is a module with parameters and children whose class occurs at least twice in one ``ModuleList``
    or ``Sequential``. Parameter names do not change.

    Raises:
        ConfigError: the model has no repeated blocks.
    """
    blocks = set(_repeated(model))
    if not blocks:
        raise ConfigError(
            f"layout.activation_checkpointing=true: {type(model).__name__} has no repeated blocks in a ModuleList or "
            "Sequential to recompute; set it to false"
        )
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=_wrap, check_fn=lambda module: module in blocks)
    return len(blocks)


def _repeated(model: nn.Module) -> Iterator[nn.Module]:
    inside: set[nn.Module] = set()
    for container in model.modules():  # parents come before their children
        if container in inside or not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        counts = Counter(type(child) for child in container)
        for child in container:
            if (
                counts[type(child)] > 1
                and any(True for _ in child.children())
                and any(True for _ in child.parameters())
            ):
                inside.update(child.modules())
                yield child


def _wrap(block: nn.Module) -> nn.Module:
    # Without buffers no contexts: torch.compile takes a wrapped block as it is, and none with contexts of ours.
    contexts = {"context_fn": functools.partial(_contexts, block)} if any(True for _ in block.buffers()) else {}
    return checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **contexts)


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """First pass and second pass: the second must not count in batch-norm statistics again."""
    return contextlib.nullcontext(), _keep_buffers(block)


@contextlib.contextmanager
def _keep_buffers(block: nn.Module) -> Iterator[None]:
    with torch.no_grad():
        before = local_buffers(block)
    try:
        yield
    finally:
        load_local_buffers(block, before)
