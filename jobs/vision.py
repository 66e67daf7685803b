"""Images: a small ResNet, and a smaller MLP, on scikit-learn's handwritten digits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.parquet import place_of, write_whole
from orchestrator.config import (
    AdamW,
    Cosine,
    EvaluationConfig,
    LayoutConfig,
    Penalties,
    Recipe,
    RunConfig,
    ScaleConfig,
    Stop,
)
from orchestrator.job import Datasets, Job, Parquet

__all__ = ["BasicBlock", "DigitsTask", "Mlp", "MlpTask", "ResNet", "digits", "mlp", "write_digits"]

SIDE = 8
CLASSES = 10
WHITE = 16.0
"""Largest pixel value in scikit-learn's digits."""
MEAN, STD = 0.305, 0.376
"""Of the training pixels, scaled to 0..1."""
HELD_OUT = 360
"""A fifth of 1,797."""


# -- the runs ----------------------------------------------------------------------------------


def digits(data: str = "data/digits", workers: int = 2, epochs: float = 12.0, batch: int = 64, width: int = 32) -> Job:
    """Return the main job: a ResNet that recognises 98.5 % and more of the held-out digits.

    Args:
        data: Folder for ``train.parquet`` and ``test.parquet``, written unless they are there, or s3://BUCKET/PREFIX
            where they are.
        workers: Data-parallel workers.
        epochs: Passes over the 1,437 training images.
        batch: Reference batch; the learning rate belongs to 64.
        width: Channels of the first stage; the others have twice and four times as many.
    """
    folder, ours = place_of(data)
    config = RunConfig(
        name="digits",
        recipe=Recipe(
            batch=batch,
            optimizer=AdamW(learning_rate=6e-3),
            schedule=Cosine(warmup=0.1),
            penalties=Penalties(weight_decay=0.05),
            stop=Stop(epochs=epochs),
        ),
        layout=LayoutConfig(zero_stage=1),
        scale=ScaleConfig(workers=workers),
        evaluation=EvaluationConfig(every_epochs=2.0),
    )
    prepare = functools.partial(write_digits, folder) if ours else None
    return Job(config, DigitsTask(folder, width=width), prepare=prepare)


def mlp(data: str = "data/digits", workers: int = 2, epochs: float = 12.0, batch: int = 64, width: int = 64) -> Job:
    """Return a variant of ``digits`` whose loss depends on parameters and samples alone.

    Without batch norm, dropout and augmentation, every layout of the same global batch computes the same step.
    """
    parent = digits(data, workers, epochs, batch)
    task = MlpTask(place_of(data)[0], width=width, augment=False)
    return dataclasses.replace(parent, config=parent.config.model_copy(update={"name": "digits-mlp"}), task=task)


# -- the tasks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DigitsTask:
    """Recognise handwritten digits: ``image`` [samples, 64] of 0..16, row by row, and ``label`` [samples]."""

    data: str
    """Absolute path of the folder that ``write_digits`` wrote, or s3://BUCKET/PREFIX."""
    width: int = 32
    """Channels of the first stage."""
    augment: bool = True
    """Shift each training image by up to one pixel."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""

    def datasets(self) -> Datasets:
        """Return the two Parquet files."""
        return Datasets(train=Parquet(f"{self.data}/train.parquet"), evaluation=Parquet(f"{self.data}/test.parquet"))

    def model(self) -> nn.Module:
        """Return a new ResNet."""
        return ResNet(self.width)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the smoothed cross-entropy, averaged over the micro batch."""
        images = pixels(batch["image"])
        if self.augment and model.training:
            images = shift(images)
        return F.cross_entropy(_logits(model, images), batch["label"], label_smoothing=self.label_smoothing)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return accuracy (0 or 1) and plain cross-entropy of each sample."""
        logits = _logits(model, pixels(batch["image"]))
        return {
            "accuracy": (logits.argmax(dim=1) == batch["label"]).float(),
            "loss": F.cross_entropy(logits, batch["label"], reduction="none"),
        }


@dataclasses.dataclass(frozen=True)
class MlpTask(DigitsTask):
    """The same with an MLP of ``width`` hidden units."""

    def model(self) -> nn.Module:
        """Return a new MLP."""
        return Mlp(self.width)


def pixels(images: Tensor) -> Tensor:
    """Return images [samples, 64] of 0..16 as [samples, 1, 8, 8] in fp32 with mean 0 and deviation 1."""
    return (images.float().view(-1, 1, SIDE, SIDE) / WHITE - MEAN) / STD


def shift(images: Tensor) -> Tensor:
    """Return each image [samples, 1, 8, 8] moved by -1, 0 or 1 pixel along both axes, drawn from torch's generator."""
    black = (0.0 - MEAN) / STD
    padded = F.pad(images, (1, 1, 1, 1), value=black).squeeze(1)
    corner = torch.randint(0, 3, (2, len(images), 1), device=images.device)
    rows, columns = corner + torch.arange(SIDE, device=images.device)
    sample = torch.arange(len(images), device=images.device)
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    # Losses are taken in fp32, whatever the model computes in.
    return cast("Tensor", model(images)).float()


# -- the models --------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (He et al. 2016, arXiv:1512.03385, figure 2 and option B).

    The shortcut is the identity, or a 1x1 projection where the shape changes. The last batch norm starts at gamma 0,
    so that a new block passes its input on unchanged (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        last = nn.BatchNorm2d(outputs)
        nn.init.zeros_(last.weight)
        self.branch = nn.Sequential(
            conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(), conv3x3(outputs, outputs), last
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(shortcut(x) + branch(x))``: [samples, outputs, height / stride, width / stride]."""
        return F.relu(self.shortcut(x) + self.branch(x))


class ResNet(nn.Module):
    """A 3x3 stem, one block per stage at 8x8, 4x4 and 2x2, global average pooling, and a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3x3(1, width), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            BasicBlock(width, width),
            BasicBlock(width, 2 * width, stride=2),
            BasicBlock(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [samples, 10] of images [samples, 1, 8, 8]."""
        features = self.blocks(self.stem(images.to(self.head.weight.dtype)))
        return cast("Tensor", self.head(features.mean(dim=(2, 3))))


class Mlp(nn.Module):
    """Two hidden layers with GELU; nothing in it couples the samples of a batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIDE * SIDE, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [samples, 10] of images [samples, 1, 8, 8]."""
        return cast("Tensor", self.head(self.body(images.flatten(1).to(self.head.weight.dtype))))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a padded 3x3 convolution without bias, for a batch norm follows."""
    return conv(inputs, outputs, 3, stride)


def conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    """Return a convolution padded to keep the size, started as in He et al. 2015 (arXiv:1502.01852)."""
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


# -- the data ----------------------------------------------------------------------------------


def write_digits(folder: str) -> None:
    """Write scikit-learn's digits as ``train.parquet`` (1,437) and ``test.parquet`` (360) unless both are there.

    The split is fixed and keeps the shares of the classes. Each file appears whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    train, test = Path(folder) / "train.parquet", Path(folder) / "test.parquet"
    if train.exists() and test.exists():
        return
    from sklearn.datasets import load_digits  # slow to import, and needed only once
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    table = pa.table(
        {
            "image": pa.FixedSizeListArray.from_arrays(pa.array(images.astype("uint8").ravel()), SIDE * SIDE),
            "label": pa.array(labels.astype("int64")),
        }
    )
    kept, held_out = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(table.take(kept), train, row_group_size=256)
    write_whole(table.take(held_out), test, row_group_size=256)
