"""One trained model in every format and precision: written, run, compared with torch and measured."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from orchestrator.compression.exporting import (
    refusing,
    to_executorch,
    to_executorch_int8,
    to_onnx,
    to_onnx_int8,
    to_torch,
)
from orchestrator.compression.measuring import Inputs, evaluate_model, largest_difference, model_inputs, time_calls
from orchestrator.compression.pruning import plain
from orchestrator.compression.quantizing import METHODS, quantized, without_fake_quantization
from orchestrator.compression.report import Entry
from orchestrator.compression.tensorrt import is_available, to_tensorrt
from orchestrator.compression.trained import Trained
from orchestrator.compression.variants import QuantizationAware
from orchestrator.errors import DataError, ExportError, did_you_mean
from orchestrator.job import Dataset, Task
from orchestrator.training.data import open_dataset

__all__ = ["PATHS", "Source", "make", "make_one", "possible_paths", "source_of"]

BATCH = 64
COMPARED = 4
"""Batches of real inputs that a file's outputs are compared with torch's on."""


@dataclass(frozen=True)
class Source:
    """A model to be written: its weights as ordinary layers, and real inputs for it."""

    name: str
    task: Task
    model: nn.Module
    held_out: Dataset
    inputs: Sequence[Inputs]
    """Of the held-out set: what outputs are compared on, and calls timed with."""
    calibration: Sequence[Inputs]
    """Of the training set: what int8 finds its ranges on."""


def source_of(trained: Trained, name: str, *, calibrate: int = 256) -> Source:
    """Prepare what a run has trained for writing; ``calibrate`` samples of the training set find int8's ranges.

    Raises:
        DataError: the job has no held-out data to measure with.
        JobError: its metrics do not call the model as export needs it.
    """
    datasets = trained.task.datasets()
    if datasets.evaluation is None:
        raise DataError("the job has no evaluation data: without it nothing says what compression costs")
    held_out, training = (open_dataset(each, trained.config) for each in (datasets.evaluation, datasets.train))
    model = plain(copy.deepcopy(trained.model))
    if isinstance(trained.task, QuantizationAware):
        model = without_fake_quantization(model)
    model.eval()
    return Source(
        name=name,
        task=trained.task,
        model=model,
        held_out=held_out,
        inputs=model_inputs(trained.task, model, _Head(held_out, BATCH * COMPARED), batch=BATCH),
        calibration=model_inputs(trained.task, model, _Head(training, calibrate), batch=BATCH) if calibrate else (),
    )


def make(source: Source, paths: Sequence[str], folder: Path) -> list[Entry]:
    """Write ``source`` by each of ``paths``; one that fails says why in its entry, and the others go on."""
    entries = []
    for path in paths:
        try:
            entries.append(make_one(source, path, folder))
        except ExportError as error:
            entries.append(Entry(source.name, path, problem=str(error)))
    return entries


def make_one(source: Source, path: str, folder: Path) -> Entry:
    """Write ``source`` by one of ``PATHS`` into ``folder``, run what was written, and measure it.

    Raises:
        ExportError: an unknown path, or the model cannot take it, or what was written does not run.
    """
    if path not in PATHS:
        raise ExportError(f"{path!r} is no way to write a model; {did_you_mean(path, PATHS)}")
    suffix, write = PATHS[path]
    file = folder / f"{source.name}-{path}{suffix}"
    runnable = write(source, file)
    with refusing(f"{file.name} was written and does not run"):
        return Entry(
            model=source.name,
            path=path,
            file=str(file),
            size_bytes=file.stat().st_size,
            packed_bytes=len(zlib.compress(file.read_bytes(), 6)),
            metrics=evaluate_model(source.task, runnable, source.held_out, batch=BATCH),
            latency=time_calls(runnable, source.inputs[0]),
            difference=largest_difference(runnable, source.model, source.inputs),
        )


class _Head:
    """The first samples of a data set."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self._dataset = dataset
        self._count = min(count, len(dataset))
        self.take = dataset.take

    def __len__(self) -> int:
        return self._count


def _onnx_int8(source: Source, file: Path) -> nn.Module:
    whole = file.with_suffix(".fp32")
    to_onnx(source.model, source.inputs, whole)
    try:
        return to_onnx_int8(whole, source.calibration, file)
    finally:
        whole.unlink()


def _torchao(method: str) -> Callable[[Source, Path], nn.Module]:
    return lambda source, file: to_torch(quantized(source.model, method), source.inputs, file)


PATHS: dict[str, tuple[str, Callable[[Source, Path], nn.Module]]] = {
    "torch": (".pt2", lambda source, file: to_torch(source.model, source.inputs, file)),
    "onnx": (".onnx", lambda source, file: to_onnx(source.model, source.inputs, file)),
    "executorch": (".pte", lambda source, file: to_executorch(source.model, source.inputs, file)),
    "onnx-int8": (".onnx", _onnx_int8),
    "executorch-int8": (".pte", lambda source, file: to_executorch_int8(source.model, source.calibration, file)),
    **{f"torch-{method}": (".pt2", _torchao(method)) for method in METHODS},
    "tensorrt": (".engine", lambda source, file: to_tensorrt(source.model, source.inputs, file)),
}
"""How a model can be written: suffix and writer, by name. fp32 first, so that all else is measured against it."""


def possible_paths() -> tuple[str, ...]:
    """All of ``PATHS`` but for what takes a GPU, where there is none."""
    return tuple(path for path in PATHS if path != "tensorrt" or is_available())
