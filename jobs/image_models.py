"""Networks for images in plain torch: a plain CNN, ResNet-18, 34 and 50, and WideResNet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from jobs.vision import BasicBlock, conv

__all__ = ["NETWORKS", "Bottleneck", "PlainCNN", "ResNet", "WideBlock", "WideResNet"]


class PlainCNN(nn.Module):
    """Three pairs of 3x3 convolutions with batch norm, each pair halving the image, as in VGG, and a linear head.

    The smallest of these, and without shortcuts: what a residual network is compared with.
    """

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        stages = [_pair(a, b) for a, b in itertools.pairwise(widths)]
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [samples, classes] of ``images`` [samples, channels, height, width]."""
        features = self.body(images.to(self.head.weight.dtype))
        return cast("Tensor", self.head(features.mean(dim=(2, 3))))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, four times as wide outside (He et al. 2016, figure 5).

    The stride is in the 3x3 convolution, as in every later version of the paper's network ("v1.5").
    """

    EXPANSION = 4

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        inner = outputs // self.EXPANSION
        last = nn.BatchNorm2d(outputs)
        nn.init.zeros_(last.weight)
        self.branch = nn.Sequential(
            *_normed(conv(inputs, inner, 1, 1)),
            *_normed(conv(inner, inner, 3, stride)),
            conv(inner, outputs, 1, 1),
            last,
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(shortcut(x) + branch(x))``: [samples, outputs, height / stride, width / stride]."""
        return F.relu(self.shortcut(x) + self.branch(x))


class ResNet(nn.Module):
    """Four stages of 64, 128, 256 and 512 channels, times the block's expansion (He et al. 2016, arXiv:1512.03385).

    The stem is the paper's 7x7 convolution and pooling for ``side`` of 65 pixels and more, and one 3x3 convolution
    for smaller images, which four halvings would leave nothing of.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], channels: int, classes: int, *, side: int
    ) -> None:
        super().__init__()
        expansion = getattr(block, "EXPANSION", 1)
        large = side > 64
        self.stem = nn.Sequential(*_normed(conv(channels, 64, 7 if large else 3, 2 if large else 1)))
        if large:
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        layers: list[nn.Module] = []
        inputs = 64
        for stage, count in enumerate(blocks):
            outputs = 64 * 2**stage * expansion
            for index in range(count):
                layers.append(block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [samples, classes] of ``images`` [samples, channels, height, width]."""
        features = self.blocks(self.stem(images.to(self.head.weight.dtype)))
        return cast("Tensor", self.head(features.mean(dim=(2, 3))))


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions, with dropout between (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.first = conv(inputs, outputs, 3, stride)
        self.rest = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(dropout), conv(outputs, outputs, 3, 1))
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return [samples, outputs, height / stride, width / stride]; where the shape changes, all read the norm."""
        active = F.relu(self.norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return cast("Tensor", shortcut + self.rest(self.first(active)))


class WideResNet(nn.Module):
    """WRN-``depth``-``widen`` for small images: three stages of (depth - 4) / 6 blocks (arXiv:1605.07146, table 1)."""

    def __init__(self, depth: int, widen: int, channels: int, classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, "a WideResNet's depth is 6 n + 4"
        layers: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * 2**stage * widen
            for index in range((depth - 4) // 6):
                layers.append(WideBlock(inputs, outputs, 2 if stage and not index else 1, dropout))
                inputs = outputs
        self.stem = conv(channels, 16, 3, 1)
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [samples, classes] of ``images`` [samples, channels, height, width]."""
        features = F.relu(self.norm(self.blocks(self.stem(images.to(self.head.weight.dtype)))))
        return cast("Tensor", self.head(features.mean(dim=(2, 3))))


def _normed(layer: nn.Conv2d) -> tuple[nn.Module, ...]:
    return layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()


def _pair(inputs: int, outputs: int) -> nn.Module:
    layers = (*_normed(conv(inputs, outputs, 3, 1)), *_normed(conv(outputs, outputs, 3, 1)))
    return nn.Sequential(*layers, nn.MaxPool2d(2))


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn": lambda channels, classes, _: PlainCNN(channels, classes),
    "resnet18": lambda channels, classes, side: ResNet(BasicBlock, (2, 2, 2, 2), channels, classes, side=side),
    "resnet34": lambda channels, classes, side: ResNet(BasicBlock, (3, 4, 6, 3), channels, classes, side=side),
    "resnet50": lambda channels, classes, side: ResNet(Bottleneck, (3, 4, 6, 3), channels, classes, side=side),
    "wrn16-4": lambda channels, classes, _: WideResNet(16, 4, channels, classes),
    "wrn28-10": lambda channels, classes, _: WideResNet(28, 10, channels, classes, dropout=0.3),
}
"""By name: from channels, classes and the side of the images to a new network."""
