"""Text classification: which package of the standard library a piece of source is from, or which folder of yours."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.language import VOCABULARY, Block, Shape, linear, norm, rotations
from jobs.parquet import are_written, write_whole
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
    TelemetryConfig,
)
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import Datasets, Job, Parquet

__all__ = ["ClassifierTask", "TextClassifier", "classify", "write_labelled_text"]

PACKAGES = ("asyncio", "ctypes", "email", "encodings", "idlelib", "multiprocessing", "tkinter", "unittest")
"""Of the standard library: each is a class, for its files share what they are about."""
HELD_OUT = 5
"""One file in so many is held out whole."""


def classify(
    data: str = "data/labelled-text",
    text: str = "",
    workers: int = 2,
    epochs: float = 6.0,
    batch: int = 32,
    context: int = 256,
    width: int = 64,
    layers: int = 2,
) -> Job:
    """Return the job: two blocks that read 256 bytes of source and say which of eight packages they are from.

    Held out are whole files, so that nothing but style and vocabulary tells.

    Args:
        data: Folder for ``train.parquet`` and ``test.parquet``, written unless they are there.
        text: A folder with a folder of text files per class; without it, packages of the standard library.
        workers: Data-parallel workers.
        epochs: Passes over the training rows.
        batch: Reference batch; the learning rate belongs to 32.
        context: Bytes of a row.
        width: Features of each byte between the blocks.
        layers: Blocks.

    Raises:
        ConfigError: the sizes do not go together.
    """
    if context < 8:
        raise ConfigError(f"context={context}: give at least 8 bytes, as in context=256")
    folder = str(Path(data).absolute())  # workers may run in another folder
    source = str(Path(text).absolute()) if text else ""
    config = RunConfig(
        name="text-classifier",
        recipe=Recipe(
            batch=batch,
            optimizer=AdamW(learning_rate=2e-3, beta2=0.99),
            schedule=Cosine(warmup=0.1),
            penalties=Penalties(weight_decay=0.1),
            clip_norm=1.0,
            stop=Stop(epochs=epochs),
        ),
        layout=LayoutConfig(zero_stage=1),
        scale=ScaleConfig(workers=workers),
        evaluation=EvaluationConfig(every_epochs=max(0.5, epochs / 6)),
        telemetry=TelemetryConfig(tokens_per_sample=context),
    )
    task = ClassifierTask(folder, Shape(width, layers))
    return Job(config, task, prepare=functools.partial(write_labelled_text, folder, source, context=context))


@dataclasses.dataclass(frozen=True)
class ClassifierTask:
    """Say which class a text is of: ``text`` [samples, context] of bytes, ``label`` [samples]."""

    data: str
    """Absolute path of the folder that ``write_labelled_text`` wrote."""
    shape: Shape = dataclasses.field(default_factory=lambda: Shape(layers=2))
    """Size of the model."""

    def datasets(self) -> Datasets:
        """Return the two Parquet files."""
        return Datasets(*(Parquet(f"{self.data}/{name}.parquet") for name in ("train", "test")))

    def model(self) -> nn.Module:
        """Return a new classifier for as many classes as the data has."""
        metadata = pq.read_schema(Path(self.data) / "train.parquet").metadata
        return TextClassifier(self.shape, len(json.loads(metadata[b"classes"])))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy, averaged over the micro batch."""
        return F.cross_entropy(_logits(model, batch), batch["label"].long())

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return accuracy (0 or 1) and cross-entropy of each sample."""
        logits, label = _logits(model, batch), batch["label"].long()
        return {
            "accuracy": (logits.argmax(dim=1) == label).float(),
            "loss": F.cross_entropy(logits, label, reduction="none"),
        }


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return cast("Tensor", model(batch["text"].long())).float()


class TextClassifier(nn.Module):
    """The GPT's blocks, and a head that reads the mean over the positions."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = norm(shape.width)
        self.head = linear(shape.width, classes, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [samples, classes] of ``tokens`` [samples, length]."""
        x = self.embedding(tokens)
        turns = rotations(tokens.shape[1], self.head_width, tokens.device)
        for block in self.blocks:
            x = block(x, turns)
        return cast("Tensor", self.head(self.norm(x).mean(dim=1)))


# -- the data ----------------------------------------------------------------------------------


def write_labelled_text(folder: str, text: str = "", *, context: int = 256) -> None:
    """Write rows of ``context`` bytes with the class of the file that they are from, unless they are there.

    Raises:
        DataError: fewer than two classes with files to train on and to hold out, or ``folder`` holds another text.
        OSError: the folder cannot be written.
    """
    made_of = {"text": text or "the standard library", "context": str(context)}
    files = [Path(folder) / name for name in ("train.parquet", "test.parquet")]
    if are_written(files, made_of):
        return
    classes = dict(_classes(text))
    parts: list[list[tuple[bytes, int]]] = [[], []]
    for label, paths in enumerate(classes.values()):
        for path in paths:
            held_out = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4]) % HELD_OUT == 0
            content = path.read_bytes()
            rows = [content[start : start + context] for start in range(0, len(content) - context + 1, context)]
            parts[held_out] += [(row, label) for row in rows]
    for part in parts:
        if len({label for _, label in part}) < max(2, len(classes)):
            raise DataError(f"{text or 'the standard library'}: needs two classes, and in each several files of text")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, path in zip(parts, files, strict=True):
        values = np.frombuffer(b"".join(row for row, _ in part), dtype=np.uint8)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), context)
        table = pa.table({"text": column, "label": pa.array([label for _, label in part], pa.int64())})
        described = table.replace_schema_metadata({**made_of, "classes": json.dumps(list(classes))})
        write_whole(described, path, row_group_size=8192)


def _classes(text: str) -> Iterator[tuple[str, list[Path]]]:
    root = Path(text or sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(f"text={text}: no such folder; correct it, or leave it out for the standard library")
    names = (
        sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".") if text else PACKAGES
    )
    for name in names:
        paths = sorted((root / name).rglob("*" if text else "*.py"))
        found = [path for path in paths if path.is_file() and not {"test", "tests"} & set(path.parts[-2:-1])]
        if found:
            yield name, found
