"""Runs that make a trained model smaller: pruned, quantisation-aware and distilled variants of an earlier run.

Each is a job like any other, ``orchestrator run orchestrator.compression.variants:pruned --arg run=digits``, so it is
planned, trained by the same loop, saved and continued like any other. Its task is the earlier run's with another model
or loss.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.compression.measuring import model_inputs
from orchestrator.compression.pruning import Pattern, mask_weights
from orchestrator.compression.quantizing import fake_quantized
from orchestrator.compression.trained import Trained, load_trained
from orchestrator.config import Fixed, RunConfig, Stop, apply_overrides
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.job import Datasets, Job, Task, load
from orchestrator.storage.folder import find_run, read_json
from orchestrator.storage.stored_run import MANIFEST
from orchestrator.training.data import open_dataset

__all__ = ["Distilled", "Pruned", "QuantizationAware", "distilled", "pruned", "quantization_aware", "shown_name"]

FINE_TUNING = 0.3
"""Share of the recipe's learning rate that a trained model is trained on with."""


# -- the runs ----------------------------------------------------------------------------------


def pruned(run: str, sparsity: float = 0.8, pattern: Pattern = "global", epochs: float = 0.0) -> Job:
    """Train ``run``'s model on while its smallest weights go, gradually over the first half.

    Args:
        run: A run's folder, or its name below runs.
        sparsity: Share of linear and convolutional weights that becomes zero; 0.5 for 2:4.
        pattern: global (single weights), 2:4 (two of four, all at once) or channels (whole output channels).
        epochs: Passes over the training set; 0: as many as the run's own recipe.

    Raises:
        RequestError: there is no such run, or what it trained cannot be pruned like this.
    """
    trained, job = load_trained(run), _called(run, ())
    shares = {"global": _percent(sparsity), "2:4": "2-4"}
    suffix = f"pruned-{shares.get(pattern, f'{_percent(sparsity)}-{pattern}')}"
    # At the recipe's full rate: what is left has to find its place anew (Renda et al. 2020, arXiv:2003.02389).
    name = _named(trained, suffix, epochs, (sparsity, pattern))
    config = _continued(trained.config, name, epochs, rate=1.0)
    passes = _passes(config, job.task)
    task = Pruned(job.task, str(find_run(run).root), sparsity, pattern, passes)
    task.model()  # refused here, not in a worker
    return Job(config, task, job.prepare)


def quantization_aware(run: str, epochs: float = 0.0) -> Job:
    """Train ``run``'s model on with linear and embedding layers that round as int8 does (torchao).

    Args:
        run: A run's folder, or its name below runs.
        epochs: Passes over the training set; 0: as many as the run's own recipe.

    Raises:
        RequestError: there is no such run, or nothing in its model can be quantised.
    """
    trained, job = load_trained(run), _called(run, ())
    task = QuantizationAware(job.task, str(find_run(run).root))
    task.model()
    return Job(_continued(trained.config, _named(trained, "int8-aware", epochs, ()), epochs), task, job.prepare)


def distilled(
    run: str, student: tuple[str, ...], temperature: float = 2.0, share: float = 0.5, epochs: float = 0.0
) -> Job:
    """Train a smaller model of ``run``'s job to answer as its trained one does (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        run: The teacher: a run's folder, or its name below runs.
        student: Arguments of the job that make the student, as in width=16.
        temperature: Both answers are softened by it.
        share: Of the loss that comes from the teacher; the rest is the job's own.
        epochs: Passes over the training set; 0: as many as the run's own recipe.

    Raises:
        RequestError: there is no such run, or student and teacher do not fit each other.
    """
    if not (0.0 <= share <= 1.0 and temperature > 0):
        raise ConfigError(
            f"share={share:g}, temperature={temperature:g}: give a share of 0 to 1 and a temperature above 0"
        )
    trained, small = load_trained(run), _called(run, student)
    name = _named(trained, "student", epochs, (sorted(student), temperature, share))
    config = _continued(trained.config, name, epochs, rate=1.0)
    task = Distilled(small.task, str(find_run(run).root), temperature, share)
    return Job(config, task, functools.partial(_prepared, small, task))


def _called(run: str, args: tuple[str, ...]) -> Job:
    """The run's job with some arguments replaced."""
    job = read_json(find_run(run).job)
    if job is None:
        raise RunFolderError(f"{run}: job.json is missing: it was never started")
    merged = dict(arg.split("=", 1) for arg in job["args"]) | dict(arg.partition("=")[::2] for arg in args)
    return load(job["job"], [f"{name}={value}" for name, value in merged.items()])


def shown_name(name: str) -> str:
    """Return a variant's name without the digest of what it was made from, as in digits-pruned-80."""
    return name.rpartition("-")[0]


def _named(trained: Trained, suffix: str, epochs: float, arguments: tuple[Any, ...]) -> str:
    """The variant's name. Another request, or another checkpoint to start from, makes another: a run of its own."""
    made_of = json.dumps([epochs, arguments]).encode() + (trained.checkpoint / MANIFEST).read_bytes()
    return f"{trained.config.name}-{suffix}-{hashlib.sha256(made_of).hexdigest()[:6]}"


def _continued(origin: RunConfig, name: str, epochs: float, *, rate: float = FINE_TUNING) -> RunConfig:
    """The run's config under another name, at a part of its learning rate, for so many epochs, at a fixed batch."""
    if epochs < 0:
        raise ConfigError(f"epochs={epochs:g}: give a number above 0, or 0 for the recipe's own length")
    recipe = origin.recipe
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": recipe.optimizer.learning_rate * rate})
    stop = Stop(epochs=epochs) if epochs else recipe.stop
    recipe = recipe.model_copy(update={"optimizer": optimizer, "stop": stop})
    changed = origin.model_copy(update={"name": name, "recipe": recipe, "policy": Fixed()})
    return apply_overrides(changed, ())  # checked anew: the name may have grown too long


def _passes(config: RunConfig, task: Task) -> int:
    """Forward passes of one worker in the first half of the run, at one micro batch a step; at least 1."""
    stop, batch = config.recipe.stop, config.recipe.batch
    if stop.steps is not None:
        return max(1, stop.steps // 2)
    if stop.samples is not None:
        return max(1, stop.samples // batch // 2)
    if stop.epochs is None:
        raise ConfigError("the run's recipe has no length to prune over: give epochs, as in --arg epochs=4")
    return max(1, math.floor(stop.epochs * len(open_dataset(task.datasets().train, config)) / batch / 2))


def _percent(share: float) -> str:
    return f"{100 * share:g}".replace(".", "-")


# -- the tasks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A task that does as ``base`` does; what differs, a subclass says."""

    base: Task
    run: str
    """Absolute folder of the run that has been trained."""

    def __getattr__(self, name: str) -> Any:
        # What a task may add, such as ``summarize``; looked up only where the class has nothing of the name.
        if name.startswith("__") or name in ("base", "run"):
            raise AttributeError(name)
        return getattr(self.base, name)

    def datasets(self) -> Datasets:
        """Return the base task's data."""
        return self.base.datasets()

    def model(self) -> nn.Module:
        """Return the base task's new model."""
        return self.base.model()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the base task's loss."""
        return self.base.loss(model, batch)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the base task's metrics."""
        return self.base.metrics(model, batch)


@dataclasses.dataclass(frozen=True)
class Pruned(Variant):
    """The trained model, whose smallest weights go in the course of ``passes`` forward passes."""

    sparsity: float = 0.8
    pattern: Pattern = "global"
    passes: int = 0

    def model(self) -> nn.Module:
        """Return the trained model under masks."""
        model = load_trained(self.run).model.train()
        return mask_weights(model, pattern=self.pattern, sparsity=self.sparsity, passes=self.passes)


@dataclasses.dataclass(frozen=True)
class QuantizationAware(Variant):
    """The trained model, whose linear and embedding layers round as int8 does."""

    def model(self) -> nn.Module:
        """Return the trained model with fake quantisation."""
        return fake_quantized(load_trained(self.run).model.train())


@dataclasses.dataclass(frozen=True)
class Distilled(Variant):
    """``base``, a smaller model of the same job, which learns from the one that ``run`` has trained."""

    temperature: float = 2.0
    share: float = 0.5

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return ``share`` of the distance from the teacher's softened answer, and the rest of the base's loss.

        The teacher sees the very inputs of the student, augmented alike (Beyer et al. 2022, arXiv:2106.05237). A model
        that is given what is wanted and takes the loss itself is asked once more, as the metrics ask it.
        """
        with _heard(model) as calls:
            own = self.base.loss(model, batch)
            if calls[-1][1].ndim == 0:
                self.base.metrics(model, batch)
        inputs, answer = calls[-1]
        with torch.no_grad():
            wanted = _teacher(self.run, str(answer.device))(*inputs).float()
        return (1 - self.share) * own + self.share * softened_distance(answer.float(), wanted, self.temperature)


@contextmanager
def _heard(model: nn.Module) -> Iterator[list[tuple[tuple[Tensor, ...], Tensor]]]:
    """What ``model`` is called with inside the context, and what it answers."""
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = model.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    try:
        yield calls
    finally:
        handle.remove()


def softened_distance(answer: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(wanted / T) | softmax(answer / T))`` over the last axis, averaged over the others.

    The factor keeps the gradient's size as T grows (Hinton et al. 2015, section 2). A single logit per sample, of
    shape [samples], is one of two classes.
    """
    if answer.ndim == 1:
        answer, wanted = (torch.stack((torch.zeros_like(x), x), dim=1) for x in (answer, wanted))
    expected = F.log_softmax(wanted / temperature, dim=-1).flatten(0, -2)
    found = F.log_softmax(answer / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * F.kl_div(found, expected, reduction="batchmean", log_target=True)


@functools.lru_cache(maxsize=1)
def _teacher(run: str, device: str) -> nn.Module:
    """The trained model, loaded once in each worker; it is no part of what is trained or saved."""
    return load_trained(run).model.to(device).requires_grad_(False)


def _prepared(small: Job, task: Distilled) -> None:
    """Prepare the student's data, then refuse a teacher whose answers have another shape."""
    if small.prepare is not None:
        small.prepare()
    teacher, student = load_trained(task.run), small.task.model().eval()
    data = small.task.datasets()
    first = _First(open_dataset(data.evaluation or data.train, small.config))
    try:
        inputs = model_inputs(small.task, student, first, batch=1)[0]
        with torch.no_grad():
            shapes = [tuple(model(*inputs).shape) for model in (student, teacher.model)]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ConfigError(f"{task.run} cannot teach this student: it does not take its inputs: {error}") from None
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{task.run} cannot teach this student: it answers {list(shapes[1])} where the student answers "
            f"{list(shapes[0])}; give a run of the same task"
        )


class _First:
    """The first sample of a data set, by itself."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return 1

    def take(self, positions: Any) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self._dataset.take(positions))
