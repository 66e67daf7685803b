"""Pruning by magnitude: which weights go, and a model that trains without them."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from orchestrator.errors import ExportError

__all__ = ["PATTERNS", "Mask", "Pattern", "choose", "mask_weights", "plain"]

Pattern = Literal["global", "2:4", "channels"]
PATTERNS: tuple[Pattern, ...] = ("global", "2:4", "channels")
HALF = 0.5
"""The share that goes by 2:4."""
INTERVAL = 10
"""Forward passes between two choices of weights while the sparsity rises."""


class Mask(nn.Module):
    """Zeroes the smallest of a weight's entries; how many of them rises from none to ``sparsity`` in ``passes``.

    The share follows Zhu & Gupta (2017, arXiv:1710.01878): ``sparsity (1 - (1 - t)^3)``, t the part of the passes that
    is done. By 2:4 there is nothing between none and half: half goes at the first choice, and which half is chosen anew
    until the passes are over. Each choice looks at the whole weight, which every rank holds in a forward pass, in ZeRO
    stage 3 too, so that all ranks choose the same. Mask and count are buffers: they are saved with a run and go on
    with it.
    """

    def __init__(self, weight: Tensor, *, pattern: Pattern, sparsity: float, passes: int) -> None:
        super().__init__()
        self.pattern: Pattern = pattern
        self.sparsity = sparsity
        self.passes = passes
        self._due = False
        self.handle: RemovableHandle | None = None
        """Takes the counting of passes off the layer."""
        self.register_buffer("kept", choose(weight, pattern, 0.0 if passes else sparsity))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with zeros in it."""
        kept = cast("Tensor", self.kept)
        if self._due:
            self._due = False
            done = min(int(cast("Tensor", self.count)) / self.passes, 1.0)
            kept.copy_(choose(weight.detach(), self.pattern, self.sparsity * (1 - (1 - done) ** 3)))
        return weight * kept.to(weight.dtype)

    def note_pass(self, layer: nn.Module, _: Any) -> None:
        """Count a forward pass of the layer, before it; its weight alone may be read more often than that."""
        if not (layer.training and torch.is_grad_enabled() and self.passes):
            return
        count = cast("Tensor", self.count)
        count += 1
        now = int(count)
        self._due = now == self.passes or (now < self.passes and now % INTERVAL == 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is trained: the weight itself."""
        return weight


def mask_weights(model: nn.Module, *, pattern: Pattern, sparsity: float, passes: int = 0) -> nn.Module:
    """Let the linear and convolutional weights of ``model`` become sparse over ``passes`` forward passes, in place.

    ``global`` compares all weights with each other, as they are now, for how much each layer loses; ``channels`` takes
    whole output channels, by their norm, of all but the last such layer, whose outputs are what the model returns;
    ``2:4`` takes two of every four neighbouring inputs, of a convolution at each position of its kernel, as sparse
    kernels want them. It is half or nothing: ``sparsity`` has to be 0.5. Layers whose inputs are no multiple of four
    stay whole.

    Raises:
        ExportError: an unknown pattern, a sparsity that is none, or nothing to prune.
    """
    if pattern not in PATTERNS:
        raise ExportError(f"pattern={pattern!r}: should be {', '.join(PATTERNS)}")
    if not 0.0 < sparsity < 1.0:
        raise ExportError(f"sparsity={sparsity:g}: should lie between 0 and 1, as in 0.8")
    if pattern == "2:4" and sparsity != HALF:
        raise ExportError(f"sparsity={sparsity:g}: 2:4 takes half of the weights; give 0.5, or another pattern")
    layers = _layers(model)
    if pattern == "channels":
        layers.pop()
    if pattern == "2:4":
        layers = [layer for layer in layers if _weight(layer).shape[1] % 4 == 0]
    if not layers:
        raise ExportError(f"{type(model).__name__} has no linear or convolutional weights that {pattern} can prune")
    shares = _global_shares(layers, sparsity) if pattern == "global" else [sparsity] * len(layers)
    for layer, share in zip(layers, shares, strict=True):
        mask = Mask(_weight(layer).detach(), pattern=pattern, sparsity=share, passes=passes)
        mask.handle = layer.register_forward_pre_hook(mask.note_pass)
        parametrize.register_parametrization(layer, "weight", mask)
    return model


def choose(weight: Tensor, pattern: Pattern, share: float) -> Tensor:
    """Return which entries of ``weight`` stay, in its shape, when ``share`` of them goes by ``pattern``."""
    size = weight.abs()
    if pattern == "2:4":
        if share == 0.0:
            return torch.ones_like(weight, dtype=torch.bool)
        inputs_last = size.movedim(1, -1)  # [out, *kernel, in]: four in a row are inputs at one position
        groups = inputs_last.reshape(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)
        return kept.reshape(inputs_last.shape).movedim(-1, 1).contiguous()
    if pattern == "channels":
        size = size.flatten(1).norm(dim=1)
        return _largest(size, share).reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight).clone()
    return _largest(size, share)


def plain(model: nn.Module) -> nn.Module:
    """Put the zeros into the weights of ``model`` and take the masks off, in place."""
    for module in list(model.modules()):
        if isinstance(module, Mask) and module.handle is not None:
            module.handle.remove()
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(cast("Any", module), "weight", leave_parametrized=True)
    return model


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]


def _weight(layer: nn.Module) -> Tensor:
    return cast("Tensor", layer.weight)


def _largest(size: Tensor, share: float) -> Tensor:
    """True at the largest entries; ``share`` of all is False."""
    kept = torch.ones(size.numel(), dtype=torch.bool, device=size.device)
    gone = min(math.floor(share * size.numel() + 1e-6), size.numel() - 1)  # a layer keeps one weight at least
    kept[size.flatten().argsort()[:gone]] = False
    return kept.reshape(size.shape)


def _global_shares(layers: list[nn.Module], sparsity: float) -> list[float]:
    """What share of each layer lies below the threshold that all have in common."""
    sizes = [_weight(layer).detach().abs().flatten() for layer in layers]
    everything = torch.cat(sizes)
    threshold = everything.sort().values[math.floor(sparsity * len(everything))]
    return [float((size < threshold).double().mean()) for size in sizes]
