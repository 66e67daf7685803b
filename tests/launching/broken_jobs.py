"""Jobs that go wrong while they run, or wait for a test; imported by name in the tests' own runs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.vision import DigitsTask, MlpTask, digits, mlp
from orchestrator.job import Datasets, Job
from orchestrator.storage.folder import RunFolder

WRONG_AT = 30
HUNG = Path("hung-once")


@dataclasses.dataclass(frozen=True)
class BuggyTask(MlpTask):
    """Divides by zero on rank 1, in the 30th step."""

    calls: ClassVar[list[int]] = []

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(1)
        if len(self.calls) == WRONG_AT and dist.get_rank() == 1:
            return super().loss(model, batch) * (1 / 0)  # the bug
        return super().loss(model, batch)


@dataclasses.dataclass(frozen=True)
class NanTask(MlpTask):
    """Loses its loss on rank 1, in the 30th step."""

    calls: ClassVar[list[int]] = []

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(1)
        loss = super().loss(model, batch)
        if len(self.calls) == WRONG_AT and dist.get_rank() == 1:
            return loss * torch.nan
        return loss


@dataclasses.dataclass(frozen=True)
class UnluckyTask(MlpTask):
    """Has no room for more than 16 samples at a time, and once, at its 30th loss, waits on rank 1 for ever."""

    calls: ClassVar[list[int]] = []

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if model.training and dist.is_initialized():
            self.calls.append(1)
            if len(next(iter(batch.values()))) > 16:
                torch.empty(2**50)
            if len(self.calls) == WRONG_AT and dist.get_rank() == 1 and not HUNG.exists():
                HUNG.touch()
                time.sleep(3600)
        return super().loss(model, batch)


def buggy() -> Job:
    return _with(BuggyTask, "buggy")


def unlucky() -> Job:
    return _with(UnluckyTask, "unlucky")


def nan() -> Job:
    return _with(NanTask, "nan")


HELD_AT = 70


@dataclasses.dataclass(frozen=True)
class HeldTask(DigitsTask):
    """The same, but while the file ``hold`` lies in ``place`` it ends by no speed of this machine.

    Its 70th step waits until ``run`` is asked to stop; or each of its micro batches takes ``wait_s``.
    """

    place: str = ""
    run: str = "digits"
    wait_s: float = 0.0
    calls: ClassVar[list[int]] = []

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        hold, stop = Path(self.place, "hold"), RunFolder(Path(self.place, "runs", self.run)).stop_request
        if model.training and dist.is_initialized() and hold.exists():
            self.calls.append(1)
            time.sleep(self.wait_s)
            while not self.wait_s and len(self.calls) == HELD_AT and hold.exists() and not stop.exists():
                time.sleep(0.02)
        return super().loss(model, batch)


@dataclasses.dataclass(frozen=True)
class HeldMlpTask(MlpTask, HeldTask):
    """The MLP, held in the same way."""


def held(place: str, wait_s: float = 0.0) -> Job:
    """The digits."""
    parent = digits()
    task = HeldTask(**vars(parent.task), place=place, wait_s=wait_s)
    return dataclasses.replace(parent, task=task)


def held_mlp(place: str, wait_s: float = 0.0) -> Job:
    """Their MLP."""
    parent = mlp()
    task = HeldMlpTask(**vars(parent.task), place=place, run=parent.config.name, wait_s=wait_s)
    return dataclasses.replace(parent, task=task)


# The kernel stops the process for nine tenths of its time, long at a time: whatever else runs here, it has one tenth.
BRAKE = """
import os, signal, time
process = os.getppid()
os.nice(-20)
while os.getppid() == process:
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.45)
    os.kill(process, signal.SIGCONT)
    time.sleep(0.05)
"""


@dataclasses.dataclass(frozen=True)
class BrakedTask(MlpTask):
    """Of two ranks one has a tenth of its time, from when it opens its data."""

    def datasets(self) -> Datasets:
        if dist.is_initialized() and dist.get_world_size() == 2 and dist.get_rank() == 1:
            subprocess.Popen([sys.executable, "-S", "-c", BRAKE])
        return super().datasets()


def braked() -> Job:
    return _with(BrakedTask, "braked")


def _with(kind: type[MlpTask], name: str) -> Job:
    parent = mlp()
    assert isinstance(parent.task, MlpTask)
    config = parent.config.model_copy(update={"name": name})
    return dataclasses.replace(parent, config=config, task=kind(**dataclasses.asdict(parent.task)))


@dataclasses.dataclass(frozen=True)
class SmallMemoryTask(MlpTask):
    """Runs out of memory on rank 1 alone, above 16 samples at once."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if dist.is_initialized() and dist.get_rank() == 1 and len(batch["label"]) > 16:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return super().loss(model, batch)


def small_memory() -> Job:
    return _with(SmallMemoryTask, "small-memory")
