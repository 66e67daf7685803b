"""What the processes of a ``GlooGroup`` run: small tasks on made-up data, the engine step by step, and the loop.

Everything here is named in messages to spawned processes, so it stays importable and its values picklable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config import SGD, Fixed, LayoutConfig, Recipe, RunConfig, ScaleConfig, Stop
from orchestrator.errors import OrchestratorError
from orchestrator.job import Dataset, Datasets, Task
from orchestrator.launching.places import Stored, StoredPlace
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import BUCKET_ELEMENTS
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.scheduling.learning_rate import Scaling
from orchestrator.scheduling.policy import make_policy
from orchestrator.storage.fence import DriverLock, Fence
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.hub import Board
from orchestrator.telemetry.meter import Meter, Snapshot
from orchestrator.telemetry.metrics import PARTS
from orchestrator.telemetry.observing import observe_parts
from orchestrator.telemetry.publisher import Publisher
from orchestrator.training.buffers import averaged, local_buffers
from orchestrator.training.checkpoint import Checkpoints
from orchestrator.training.data import Stream, open_dataset
from orchestrator.training.engine import Engine
from orchestrator.training.evaluation import evaluate
from orchestrator.training.loop import Training, train
from orchestrator.training.memory import MemoryGauge
from orchestrator.training.recorder import Recorder
from orchestrator.training.scheduler import Scheduler
from orchestrator.training.state import StepStats, TrainState
from orchestrator.training.tracing import Tracer

FEATURES, CLASSES = 8, 4

# -- data and tasks ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """A data set in memory: ``x`` [n, 8] and ``y`` [n]."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def made_up(cls, count: int, seed: int = 0) -> Rows:
        """Samples whose label is a noisy function of their features, so that there is something to learn."""
        draw = np.random.default_rng(seed)
        x = draw.standard_normal((count, FEATURES)).astype(np.float32)
        score = x @ draw.standard_normal((FEATURES, CLASSES)) + draw.standard_normal((count, CLASSES))
        return cls(x, score.argmax(axis=1))

    def __len__(self) -> int:
        return len(self.y)

    def take(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"x": self.x[positions], "y": self.y[positions]}


@dataclasses.dataclass(frozen=True)
class Toy:
    """Classify ``Rows`` with what ``build`` returns."""

    build: Callable[[], nn.Module]
    train: Rows = dataclasses.field(default_factory=lambda: Rows.made_up(96))
    evaluation: Rows | None = None

    def datasets(self) -> Datasets:
        return Datasets(self.train, self.evaluation)

    def model(self) -> nn.Module:
        return self.build()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        scores = model(batch["x"])
        right = scores.argmax(dim=1) == batch["y"]
        return {"accuracy": right.float(), "loss": F.cross_entropy(scores, batch["y"], reduction="none")}


@dataclasses.dataclass(frozen=True)
class Noisy(Toy):
    """The same with noise on its input from each generator that a user may draw from."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        noise = torch.as_tensor(np.random.standard_normal(batch["x"].shape), dtype=torch.float32)  # noqa: NPY002
        shifted = batch["x"] + 0.1 * noise + 0.1 * random.random() + 0.1 * torch.rand(())
        return super().loss(model, {**batch, "x": shifted})


@dataclasses.dataclass(frozen=True)
class Regression:
    """Linear regression whose gradient noise is known: x ~ N(0, diag(h)), y = w* x + N(0, s^2), and d = w - w* held.

    G = H d and Sigma = (d'Hd + s^2) H + G G'. With h_i = i^-1/2, s = 1, D = 256 and the d below: |G|^2 = 0.10981,
    tr(Sigma) = 45.377 and a noise scale of 413.23 samples.
    """

    DIMENSION = 256
    NOISE_SCALE = 413.23

    def __len__(self) -> int:
        return 1_000_000

    def take(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        # Drawn anew for each call, from the positions alone.
        generator = np.random.Generator(np.random.Philox(key=[7, int(positions[0])]))
        x = generator.standard_normal((len(positions), self.DIMENSION)) * np.sqrt(self.spectrum())
        return {"x": x.astype(np.float32), "y": generator.standard_normal(len(positions)).astype(np.float32)}

    @property
    def train(self) -> Regression:
        return self

    @classmethod
    def spectrum(cls) -> np.ndarray:
        return np.arange(1, cls.DIMENSION + 1) ** -0.5

    @classmethod
    def offset(cls) -> np.ndarray:
        """d along all axes alike, scaled in two parts so that |G|^2 and tr(Sigma) are as above."""
        h = cls.spectrum()
        trace = h.sum()
        # tr(Sigma) = (d'Hd + 1) tr(H) + |G|^2 fixes d'Hd; a first axis and the rest share it so that |Hd|^2 fits.
        energy = (45.377 - 0.10981) / trace - 1.0
        first = (0.10981 - energy * (h[1:] ** 2).sum() / h[1:].sum()) / (1.0 - (h[1:] ** 2).sum() / h[1:].sum())
        d = np.full(cls.DIMENSION, np.sqrt((energy - first) / h[1:].sum()))
        d[0] = np.sqrt(first)
        return d

    def datasets(self) -> Datasets:
        return Datasets(self, None)

    def model(self) -> nn.Module:
        model = nn.Linear(self.DIMENSION, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(self.offset()).float())
        return model

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        # The model holds d itself: its error on x is d x less the noise of the label.
        return 0.5 * (model(batch["x"]).squeeze(1) - batch["y"]).square().mean()

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Steep(Toy):
    """The same with a loss so large that fp16 must first search for its scale."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return 1000.0 * super().loss(model, batch)


@dataclasses.dataclass(frozen=True)
class Measuring(Toy):
    """The same with whatever ``answer`` says for metrics."""

    answer: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.answer


def mlp() -> nn.Module:
    """Two hidden layers: nothing in it couples the samples of a batch."""
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, CLASSES))


def frozen() -> nn.Module:
    """An MLP whose middle layer is not trained."""
    model = mlp()
    model.get_submodule("2").requires_grad_(False)
    return model


def tied() -> nn.Module:
    """An MLP whose first two layers share their weight."""
    first, second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
    second.weight = first.weight
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(FEATURES, CLASSES))


class Attention(nn.Module):
    """One pre-norm transformer block over eight tokens of one feature each."""

    def __init__(self) -> None:
        super().__init__()
        width = 12
        self.embed = nn.Linear(1, width)
        self.place = nn.Parameter(0.1 * torch.randn(FEATURES, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # Without biases: the key's has no gradient but rounding, which Adam would blow up to whole steps.
        self.mix = nn.MultiheadAttention(width, 2, bias=False, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unsqueeze(-1)) + self.place
        normed = self.norm1(x)
        x = x + self.mix(normed, normed, normed, need_weights=False)[0]
        x = x + self.feed(self.norm2(x))
        return self.head(x.mean(dim=1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual block with real batch norm and, where asked for, dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.linear(x))))


def blocks(dropout: float = 0.0) -> nn.Module:
    """Three blocks with batch norm in a ``Sequential``: what activation checkpointing recomputes."""
    body = nn.Sequential(*[Block(16, dropout) for _ in range(3)])
    return nn.Sequential(nn.Linear(FEATURES, 16), body, nn.Linear(16, CLASSES))


def plain_blocks() -> nn.Module:
    """Three blocks without batch norm, so without buffers."""
    body = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)])
    return nn.Sequential(nn.Linear(FEATURES, 16), body, nn.Linear(16, CLASSES))


def dropped_blocks() -> nn.Module:
    """The same with dropout: what it computes depends on the random state."""
    return blocks(dropout=0.2)


# -- configs and plans -------------------------------------------------------------------------


def toy_config(
    workers: int = 2, *, recipe: dict[str, Any] | None = None, layout: dict[str, Any] | None = None, **fields: Any
) -> RunConfig:
    """A config of batch 16, with fields of the recipe and the layout replaced."""
    base = {"batch": 16, "optimizer": SGD(learning_rate=0.1), "stop": Stop(steps=20)}
    fields = {"policy": Fixed(), **fields}
    return RunConfig(
        name="toy",
        recipe=Recipe(**{**base, **(recipe or {})}),
        layout=LayoutConfig(**{"zero_stage": 1, "precision": "fp32", **(layout or {})}),
        scale=ScaleConfig(workers=workers),
        **fields,
    )


def data_of(task: Task) -> tuple[Dataset, Dataset | None]:
    """The opened training and evaluation set."""
    sets = task.datasets()
    return open_dataset(sets.train), None if sets.evaluation is None else open_dataset(sets.evaluation)


def plan_for(config: RunConfig, task: Task) -> Plan:
    """The plan of ``config`` on a cluster of CPUs that just holds it."""
    assert isinstance(config.scale.workers, int)
    train_set, evaluation_set = data_of(task)
    shape = ClusterShape(nodes=1, cpus=config.scale.workers)
    return make_plan(config, shape, train_samples=len(train_set), evaluation_samples=len(evaluation_set or ()))


def make_engine(config: RunConfig, task: Task) -> Engine:
    """A new engine in this process."""
    if config.layout.precision == "fp16":
        _emulate_fp16()
    return Engine(task, config, plan_for(config, task), device=torch.device("cpu"))


def _emulate_fp16() -> None:
    """Say that this CPU computes in fp16: torch does it in software where the hardware cannot."""
    import deepspeed.accelerator.cpu_accelerator as cpu

    from orchestrator.training import engine

    cpu.CPU_Accelerator.is_fp16_supported = lambda _: True
    cpu.CPU_Accelerator.supported_dtypes = lambda _: [torch.float32, torch.bfloat16, torch.float16]
    engine.require_precision = lambda _: None


# -- the engine, step by step ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps:
    """What some steps gave: the same numbers on every rank, and each rank's own buffers."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


def take_steps(
    config: RunConfig, task: Toy, layouts: Sequence[Layout], rates: Sequence[float], leave_out: int | None = None
) -> Steps:
    """A new engine's steps along the stream, each in its own layout and at its own rate, but for one left out."""
    engine = make_engine(config, task)
    stats, cursor = [], 0
    for index, (layout, rate) in enumerate(zip(layouts, rates, strict=True)):
        if index != leave_out:
            stats.append(step_at(engine, config, task, cursor, layout, rate))
        cursor += layout.global_batch
    return Steps(
        losses=[s.loss for s in stats],
        norms=[s.grad_norm for s in stats],
        applied=[s.applied for s in stats],
        weights=weights_of(engine),
        buffers=local_buffers(engine.module),
    )


def step_at(engine: Engine, config: RunConfig, task: Toy, cursor: int, layout: Layout, rate: float) -> StepStats:
    """One step on this rank's part of the global batch at ``cursor``."""
    positions = Stream(len(task.train), config.seed).micro_batches(cursor, layout, dist.get_rank())
    return engine.step([task.train.take(p) for p in positions], learning_rate=rate)


def job_steps(config: RunConfig, task: Task, layout: Layout, rates: Sequence[float]) -> Steps:
    """A new engine's steps over a job's own data set, opened and shuffled as a worker does."""
    engine, data = make_engine(config, task), data_of(task)[0]
    stream = Stream.over(data, config.seed)
    stats = []
    for index, rate in enumerate(rates):
        positions = stream.micro_batches(index * layout.global_batch, layout, dist.get_rank())
        stats.append(engine.step([data.take(p) for p in positions], learning_rate=rate))
    return Steps(
        losses=[s.loss for s in stats],
        norms=[s.grad_norm for s in stats],
        applied=[s.applied for s in stats],
        weights=weights_of(engine),
        buffers=local_buffers(engine.module),
    )


def measured_steps(
    config: RunConfig,
    task: Toy,
    layouts: Sequence[Layout],
    rate: float,
    measured: Sequence[bool] | None = None,
    scale_window: int | None = None,
) -> list[StepStats]:
    """A new engine's steps, each in its own layout, with the gradient noise measured in all of them or in some.

    ``scale_window``: good steps after which fp16's loss scale doubles, instead of a thousand.
    """
    engine, stats, cursor = make_engine(config, task), [], 0
    if scale_window is not None:
        engine._engine.optimizer.loss_scaler.scale_window = scale_window
    for index, layout in enumerate(layouts):
        positions = Stream(len(task.train), config.seed).micro_batches(cursor, layout, dist.get_rank())
        columns = [task.train.take(p) for p in positions]
        wanted = measured is None or measured[index]
        stats.append(engine.step(columns, learning_rate=rate, measure_noise=wanted))
        cursor += layout.global_batch
    return stats


def optimizer_after(config: RunConfig, task: Toy, scalings: Sequence[Scaling], steps: int = 0) -> dict[str, list[Any]]:
    """Some steps, then each scaling in mid-run: settings of the groups, and this rank's second moments."""
    engine = make_engine(config, task)
    layout = Layout(dist.get_world_size(), 8, 1)
    for step in range(steps):
        step_at(engine, config, task, step * layout.global_batch, layout, 0.01)
    for scaling in scalings:
        engine.rescale(scaling, carry=True)
    optimizer = engine._engine.optimizer
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    second = [state["exp_avg_sq"].clone() for state in optimizer.state.values() if "exp_avg_sq" in state]
    return {"groups": groups, "second": second}


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Whole parameters in fp32, by name; in 16 bit what the model computes with, not the masters."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {_plain(name): p.detach().float().clone() for name, p in parameters.items()}


def state_bytes(config: RunConfig, task: Toy, bucket: int = BUCKET_ELEMENTS) -> tuple[int, int]:
    """Parameters, and the most bytes this rank's tensors take in a later step but for DeepSpeed's buckets.

    Looked at when the backward pass has ended and, in stages 2 and 3, gradients are reduced: before that those of the
    last bucket are still whole, as bucket. Activations are gone by then. A shared gradient is a view of the bucket it
    was reduced in and keeps all of that alive, so with one ``bucket`` for the whole model nothing would be shared.
    """
    gc.collect()
    # Held, so that no later tensor comes to lie where one of these was.
    before = [t.untyped_storage() for t in gc.get_objects() if isinstance(t, Tensor)]
    known = {storage.data_ptr() for storage in before}
    with mock.patch("orchestrator.training.engine.BUCKET_ELEMENTS", bucket):
        engine = make_engine(config, task)
    inner, peaks = engine._engine, list[int]()

    def looked_at(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **kwargs: Any) -> Any:
            peaks.append(_bytes_alive(known, bucket))
            return function(*args, **kwargs)

        return look

    layout = Layout(dist.get_world_size(), 8, 2)
    step_at(engine, config, task, 0, layout, 0.01)
    if config.layout.zero_stage in (0, 1):
        inner.allreduce_gradients = looked_at(inner.allreduce_gradients)
    inner.step = looked_at(inner.step)
    found = []
    for step in (1, 2, 3):  # gloo's thread may hold what it has just sent a little longer: the least is the truth
        step_at(engine, config, task, step * layout.global_batch, layout, 0.01)
        found.append(max(peaks))
        peaks.clear()
    count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    return count, min(found)


def _bytes_alive(known: set[int], bucket: int) -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    buckets = {bucket * size for size in (2, 4)}
    return sum(size for place, size in storages.items() if place not in known and size not in buckets)


def deep() -> nn.Module:
    """As many parameters in a hundred and more small layers, so that a bucket holds few of them."""
    inner = [nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(128)]
    return nn.Sequential(nn.Linear(FEATURES, 128), *inner, nn.Linear(128, CLASSES))


def wide() -> nn.Module:
    """Two million parameters, against which batches, norms and scalars are nothing."""
    inner = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(FEATURES, 1024), *inner, nn.Linear(1024, CLASSES))


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


# -- buffers and evaluation --------------------------------------------------------------------


def average_buffers() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Buffers that differ between the ranks: before, inside and after ``averaged``."""
    model = nn.BatchNorm1d(3)
    rank = dist.get_rank()
    model.running_mean = torch.tensor([1.0, 2.0, 3.0]) * (1 + rank)
    model.running_var = torch.tensor([0.25, 0.5, 1.0]) + rank
    model.num_batches_tracked = torch.tensor(5 + rank)
    model.register_buffer("coarse", torch.tensor([1.0, 3.0], dtype=torch.bfloat16) * (1 + rank))
    model.register_buffer("mask", torch.tensor([rank == 0, True]))
    before = local_buffers(model)
    with averaged(model):
        inside = local_buffers(model)
    return before, inside, local_buffers(model)


def averaged_is_left_by_an_error() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Buffers before ``averaged`` and after an error inside it."""
    model = nn.BatchNorm1d(3)
    model.running_mean += dist.get_rank()
    before = local_buffers(model)
    with contextlib.suppress(ZeroDivisionError), averaged(model):
        raise ZeroDivisionError
    return before, local_buffers(model)


def evaluate_new(config: RunConfig, task: Toy, batch: int) -> dict[str, float]:
    """Evaluate an untrained model."""
    assert task.evaluation is not None
    return evaluate(make_engine(config, task), task, task.evaluation, batch=batch)


def evaluation_error(config: RunConfig, task: Toy) -> str:
    """What evaluating an untrained model says of the task's metrics."""
    try:
        evaluate_new(config, task, 4)
    except ValueError as error:
        return str(error)
    return ""


# -- the loop ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the loop ended on one rank: an outcome, or an error's class name and message."""

    reason: str = ""
    stopped: bool = False
    state: TrainState | None = None
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    error: str = ""
    message: str = ""


def run_loop(
    config: RunConfig,
    task: Task,
    root: Path,
    driver: str,
    stop_in: int | None = None,
    pause_at: float = math.inf,
) -> Ended:
    """``train`` as a worker runs it, in the run folder ``root``; a stop is asked for in its step ``stop_in``."""
    run = dataclasses.replace(_training(config, task, RunFolder(root), driver, stop_in), pause_at=pause_at)
    try:
        outcome = train(run)
    except OrchestratorError as error:
        return Ended(error=type(error).__name__, message=str(error), weights=weights_of(run.engine))
    finally:
        run.checkpoints.fence.release()
    weights, buffers = weights_of(run.engine), local_buffers(run.engine.module)
    return Ended(outcome.reason, outcome.stopped, outcome.state, weights, buffers)


@dataclasses.dataclass(frozen=True)
class Slow(Toy):
    """Holds one rank up in each step, or each checkpoint: where is one of "data", "loss", "store"."""

    where: str = ""
    rank: int = 0
    SLEEP_S = 0.1

    def take(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        self.sleep("data")
        return self.train.take(positions)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.sleep("loss")
        return super().loss(model, batch)

    def sleep(self, where: str) -> None:
        if where == self.where and dist.get_rank() == self.rank:
            time.sleep(self.SLEEP_S)


@dataclasses.dataclass(frozen=True)
class Held(Toy):
    """Waits, at the loss of each number, until the file that goes with it is there."""

    until: Mapping[int, Path] = dataclasses.field(default_factory=dict)
    calls: list[int] = dataclasses.field(default_factory=list)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(1)
        time.sleep(0.02)
        if (file := self.until.get(len(self.calls))) is not None:
            ends_at = time.monotonic() + 240.0
            while not file.exists():
                assert time.monotonic() < ends_at, file
                time.sleep(0.02)
        return super().loss(model, batch)


class SlowCheckpoints(Checkpoints):
    """A store that takes its time."""

    def save(self, engine: Engine, state: TrainState) -> Path:
        time.sleep(10 * Slow.SLEEP_S)
        return super().save(engine, state)


@dataclasses.dataclass(frozen=True)
class Looking(Toy):
    """Notes at each loss whether ``file`` is there."""

    file: Path = Path()
    seen: list[bool] = dataclasses.field(default_factory=list)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.seen.append(self.file.exists())
        return super().loss(model, batch)


class SlowRecorder(Recorder):
    """A folder that takes its time, on rank 0, which alone writes there."""

    def begin(self, state: TrainState, parts: Mapping[str, float] | None = None) -> None:
        if dist.get_rank() == 0:
            time.sleep(0.5)
        super().begin(state, parts)


def looking_loop(config: RunConfig, task: Looking, root: Path, driver: str) -> list[bool]:
    """Train beside a slow folder, whose records are kept in another file; returns what the task saw there."""
    run = _training(config, task, RunFolder(root), driver, None)
    keep = functools.partial(shutil.copy, root / "attempts.jsonl", root / "kept.jsonl")
    slow = SlowRecorder(RunFolder(root), run.checkpoints.fence, run.plan, rank=run.rank, attempt=1, keep=keep)
    try:
        train(dataclasses.replace(run, recorder=slow))
    finally:
        run.checkpoints.fence.release()
    return task.seen


class KeepingRecorder(Recorder):
    """Remembers the seconds by part of each step, and of what came after the last."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.laps: list[Mapping[str, float]] = []
        self.rests: list[Mapping[str, float]] = []

    def step(self, state: TrainState, stats: StepStats, parts: Mapping[str, float] | None = None, *more: Any) -> None:
        self.laps.append(parts or {})
        super().step(state, stats, parts, *more)

    def rest(self, parts: Mapping[str, float] | None) -> None:
        self.rests.append(parts or {})
        super().rest(parts)


class Observed(NamedTuple):
    """What one rank's telemetry said of the loop: its seconds by part, its wall time, and what is usual.

    A busy machine may hold up any single step for seconds. So ``usual`` is what the telemetry would have said if all
    steps had been as the median is, in each part but checkpoints, which few steps have.
    """

    parts: dict[str, float]
    wall_s: float
    usual: Snapshot


def observed_loop(config: RunConfig, task: Slow, root: Path, driver: str) -> Observed:
    """Train, published to a board."""
    board = Board(ttl_s=60.0)
    run = _training(config, task, RunFolder(root), driver, None)
    # One snapshot is told of, the farewell, and it is waited for.
    publisher = Publisher(board.take, run=config.name, source=str(dist.get_rank()), attempt=1, interval_s=3600.0)
    recorder = KeepingRecorder(
        RunFolder(root), run.checkpoints.fence, run.plan, rank=dist.get_rank(), attempt=1, publisher=publisher
    )
    changes: dict[str, Any] = {"recorder": recorder}
    if task.where == "data":
        changes["train_set"] = _Taking(task)
    if task.where == "store":
        changes["checkpoints"] = SlowCheckpoints(**vars(run.checkpoints))
    clock = run.engine.clock
    clock.lap()
    # From the clock's own first mark to its last: between a mark and another look at the time this process may rest.
    started = clock._since
    try:
        train(dataclasses.replace(run, **changes))
    finally:
        with mock.patch("orchestrator.telemetry.publisher.FAREWELL_S", 300.0):
            publisher.close()
        run.checkpoints.fence.release()
    last = next(iter(board._held.values())).snapshot
    return Observed(parts_of(last), clock._since - started, _usual(recorder, last))


def parts_of(snapshot: Snapshot) -> dict[str, float]:
    """The rank's seconds by part."""
    seconds = snapshot.own.counters.items()
    return {labels[0]: s for (name, labels), s in seconds if name == "orchestrator_rank_seconds_total"}


def _usual(recorder: KeepingRecorder, last: Snapshot) -> Snapshot:
    laps, meter = recorder.laps, Meter()
    usual = {part: statistics.median(lap.get(part, 0.0) for lap in laps) for part in PARTS}
    usual["checkpoint"] = sum(lap.get("checkpoint", 0.0) for lap in [*laps, *recorder.rests]) / len(laps)
    for _ in laps:
        observe_parts(meter, usual)
    return dataclasses.replace(last, own=meter.counted(), gauges=meter.gauges(), leaving=False)


@dataclasses.dataclass(frozen=True)
class _Taking:
    """The training set of a task that takes part in it."""

    task: Slow

    def __len__(self) -> int:
        return len(self.task.train)

    def take(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.task.take(positions)


def stored_loop(
    config: RunConfig, task: Task, stored: Stored, variables: Mapping[str, str], stop_in: int | None = None
) -> Ended:
    """``train`` as a worker runs it beside a store; ``variables`` of the environment say how that is reached.

    ``{rank}`` in one of them stands for the rank's own number.
    """
    os.environ.update({name: value.replace("{rank}", str(dist.get_rank())) for name, value in variables.items()})
    place = StoredPlace(stored, dist.get_rank())
    try:
        attempt: list[Any] = [place.begin() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(attempt, src=0)
        guard = place.guard(attempt[0].token)
        recorder = Recorder(
            place.folder, guard, plan_for(config, task), rank=dist.get_rank(), attempt=attempt[0].number
        )
        checkpoints = place.checkpoints(config, _layout_key(plan_for(config, task)), recorder)
        run = _training_of(config, task, place.folder, checkpoints, recorder, stop_in)
        outcome = train(run)
        recorder.end(outcome.state, outcome.reason)
        place.end({"last": outcome.state.to_dict()} if dist.get_rank() == 0 else None)
    except OrchestratorError as error:
        return Ended(error=type(error).__name__, message=str(error))
    finally:
        place.leave()
    weights, buffers = weights_of(run.engine), local_buffers(run.engine.module)
    return Ended(outcome.reason, outcome.stopped, outcome.state, weights, buffers)


def _training(config: RunConfig, task: Task, folder: RunFolder, driver: str, stop_in: int | None) -> Training:
    token = [Fence.begin(folder.control, driver=driver, patience_s=5.0) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(token, src=0)
    assert token[0] is not None
    fence = Fence(folder.control, token[0])
    plan = plan_for(config, task)
    checkpoints = Checkpoints(folder.checkpoints, fence, config.checkpoint.keep, _layout_key(plan))
    recorder = Recorder(folder, fence, plan, rank=dist.get_rank(), attempt=1)
    return _training_of(config, task, folder, checkpoints, recorder, stop_in)


def _layout_key(plan: Plan) -> dict[str, Any]:
    return {"workers": plan.layout.workers, "zero_stage": plan.zero_stage, "precision": plan.precision}


def _training_of(
    config: RunConfig, task: Task, folder: RunFolder, checkpoints: Any, recorder: Recorder, stop_in: int | None
) -> Training:
    plan = plan_for(config, task)
    train_set, evaluation_set = data_of(task)
    calls = itertools.count(1)
    return Training(
        config=config,
        plan=plan,
        task=task,
        engine=make_engine(config, task),
        train_set=train_set,
        evaluation_set=evaluation_set,
        checkpoints=checkpoints,
        recorder=recorder,
        scheduler=Scheduler(
            policy=make_policy(config),
            config=config,
            plan=plan,
            memory=MemoryGauge(torch.device("cpu"), 2**36),
            decides=dist.get_rank() == 0,
        ),
        tracer=Tracer(config.telemetry.profile if dist.get_rank() == 0 else None, folder.root / "traces", rank=0),
        rank=dist.get_rank(),
        stop_requested=lambda: dist.get_rank() == 0 and next(calls) == stop_in,
    )


def save_after(config: RunConfig, task: Toy, folder: Path, steps: int) -> None:
    """Take some steps and save what they left."""
    engine = make_engine(config, task)
    layout = plan_for(config, task).layout
    for step in range(steps):
        step_at(engine, config, task, step * layout.global_batch, layout, 0.01)
    engine.save(folder)


def reshape(config: RunConfig, task: Toy, before: Path, after: Path) -> None:
    """Take up what was saved anywhere, and save it from here."""
    engine = make_engine(config, task)
    engine.load_reshaped(before, local_buffers(engine.module))
    engine.save(after)


def optimizer_after_restore(config: RunConfig, task: Task, root: Path, driver: str) -> list[dict[str, Any]]:
    """Each parameter group's settings once the newest checkpoint is loaded."""
    run = _training(config, task, RunFolder(root), driver, None)
    try:
        assert run.checkpoints.restore(run.engine) is not None
    finally:
        run.checkpoints.fence.release()
    groups = run.engine._engine.optimizer.param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def new_run(root: Path) -> tuple[Path, str]:
    """Make the run folder ``root``, in the tests' own process, and return what ``run_loop`` needs of it."""
    folder = RunFolder(root)
    folder.create()
    lock = DriverLock(folder.control)
    lock.release()
    return root, lock.driver
