"""One optimizer step on DeepSpeed: the only module that spells a DeepSpeed key or calls its engine."""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from orchestrator.config import RunConfig
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.job import Task
from orchestrator.planning.memory import BUCKET_ELEMENTS, LIVE_ELEMENTS
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.learning_rate import Scaling
from orchestrator.scheduling.noise_scale import NoiseSample
from orchestrator.training.buffers import averaged, load_local_buffers, local_buffers
from orchestrator.training.clock import StepClock, ticker_for
from orchestrator.training.computing import attending, compile_model, in_channels_last, set_fp32_products
from orchestrator.training.gradient_noise import GradientNorms, Preconditioner
from orchestrator.training.optimizer import (
    add_penalties,
    build_optimizer,
    innermost,
    parameters_in_order,
    rescale,
    set_learning_rate,
)
from orchestrator.training.precision import DTYPES, compute_in
from orchestrator.training.recompute import checkpoint_blocks
from orchestrator.training.reshard import Shards, take_up
from orchestrator.training.shares import shares
from orchestrator.training.snapshot import Snapshot
from orchestrator.training.state import StepStats

Columns = Mapping[str, "NDArray[Any]"]

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Engine", "deepspeed_config", "require_precision"]

TAG = "state"


def deepspeed_config(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Render the one dict DeepSpeed reads. Everything it would decide by itself is decided here."""
    clip = config.recipe.clip_norm
    rendered: dict[str, Any] = {
        "train_batch_size": plan.layout.global_batch,
        "train_micro_batch_size_per_gpu": plan.layout.micro_batch,
        "gradient_accumulation_steps": plan.layout.accumulation,
        "gradient_clipping": 0.0 if clip is None else clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(plan),
    }
    if plan.precision == "bf16":
        rendered["bf16"] = {"enabled": True}
        # Sums of many bf16 gradients lose small terms; stage 0 and 3 offer no other accumulator.
        if plan.zero_stage in (1, 2):
            rendered["data_types"] = {"grad_accum_dtype": "fp32"}
    elif plan.precision == "fp16":
        rendered["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    return rendered


def _zero_section(plan: Plan) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage:
        section |= {
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": plan.device == "cuda" and plan.zero_stage > 1,
        }
    if plan.zero_stage == 3:
        section["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
        section["stage3_max_live_parameters"] = LIVE_ELEMENTS
        section["stage3_max_reuse_distance"] = LIVE_ELEMENTS
    if plan.offload != "none":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if plan.offload == "all":
        section["offload_param"] = {"device": "cpu", "pin_memory": True}
    return section


def require_precision(plan: Plan) -> None:
    """Refuse a precision that the CPU at hand cannot compute in.

    Raises:
        ConfigError: fp16 on a CPU without fp16 arithmetic.
    """
    on_cpu = plan.device == "cpu" and plan.precision == "fp16"
    # The same question DeepSpeed's CPU accelerator asks; torch has no public one.
    if on_cpu and not torch.ops.mkldnn._is_mkldnn_fp16_supported():  # noqa: SLF001
        raise ConfigError("layout.precision='fp16': this CPU has no fp16 arithmetic; use bf16, fp32 or auto")


class Engine:
    """A model, its optimizer and its place in the group of workers.

    Args:
        task: builds the model and computes its loss.
        config: the recipe and the seed; the model is initialised from the seed, the same on every rank.
        plan: layout, ZeRO stage and precision; ``plan.layout.workers`` is the world size.
        device: where this rank computes.
    """

    def __init__(self, task: Task, config: RunConfig, plan: Plan, *, device: torch.device) -> None:
        self.device = device
        self.clock = StepClock(ticker_for(device) if config.telemetry.enabled else None)
        self._task = task
        self._plan = plan
        self._recipe = config.recipe
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        assert self._world_size == plan.layout.workers, "the plan is made for another number of workers"
        _seed(config.seed)
        model = _fit_out(task.model(), plan, sync_batch_norm=config.layout.sync_batch_norm).to(device)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"the model {type(model).__name__} has no trainable parameter: nothing can be learnt")
        named = {p: name for name, p in model.named_parameters()}
        # Asked now: ZeRO stage 3 takes the shapes away that penalties go by.
        self._names_in_order = [named[p] for p in parameters_in_order(model, config.recipe.penalties)]
        self._engine = _initialize(model, config, plan)
        self._preconditioner = self._watch_adam() if config.policy.noise_preconditioned else None
        add_penalties(innermost(self._engine.optimizer))
        self._engine.train()
        self._update_s = 0.0
        # From here on each rank draws its own random numbers: dropout and augmentation differ between workers.
        _seed(config.seed * 1_000_003 + self._rank + 1)

    @property
    def model(self) -> nn.Module:
        """The model to call: hooks of every ZeRO stage are in place."""
        return self._engine  # type: ignore[no-any-return]

    @property
    def module(self) -> nn.Module:
        """The user's own module inside."""
        return self._engine.module  # type: ignore[no-any-return]

    def step(
        self,
        micro_batches: Sequence[Columns],
        *,
        learning_rate: float,
        rank_zero_says: Sequence[float] = (),
        measure_noise: bool = False,
    ) -> StepStats:
        """Accumulate the gradient of ``micro_batches`` over all workers and apply it once.

        ``rank_zero_says`` travels with the loss in the step's one small all-reduce, so that all ranks act on it
        at the same step; the other ranks' own values are ignored. With ``measure_noise`` the step tells a
        ``NoiseSample``; a single worker without accumulation then takes its micro batch in two halves.
        """
        started = time.perf_counter()
        set_learning_rate(self._engine.optimizer, learning_rate)
        norms = GradientNorms(self.module) if measure_noise else None
        weighing_s = 0.0
        if measure_noise and self._preconditioner is not None:
            weighing_s = self._preconditioner.cost_s  # of the last time, which is when it is known
            self._preconditioner.watch()
        if norms is not None and self._world_size * len(micro_batches) == 1:
            micro_batches = _halves(micro_batches[0])
        with attending(self._plan):
            loss, times = self._accumulate(micro_batches, norms)
        accumulated = time.perf_counter()
        own_small_sq = math.nan if norms is None else float(norms.sums.sum()) / max(norms.micro_batches, 1)
        # The small all-reduce travels while the update is computed, so it can only carry the time of the one before.
        step_s = self._update_s + accumulated - started
        cost_s = 0.0 if norms is None else norms.cost_s + weighing_s
        shared = self._share(loss, own_small_sq, [step_s, times.micro_batch_s(), cost_s, *rank_zero_says])
        loss_scale = self._loss_scale()
        with self.clock.part("optimizer"):
            grad_norm, applied = self._apply()
        # The two norms of a step belong together only under one loss scale.
        measured_norm = grad_norm if applied and self._loss_scale() == loss_scale else math.nan
        self._update_s = time.perf_counter() - accumulated
        with self.clock.part("communication"):
            mean_loss, small_sq, step_time_s, micro_batch_s, noise_cost_s, *said = shared()
        if norms is not None and self._preconditioner is not None:
            small_sums = norms.sums / max(norms.micro_batches, 1)
            small_sq, big_sq = self._preconditioner.weigh(small_sums, measured_norm)
            measured_norm = math.sqrt(big_sq) if big_sq >= 0.0 else math.nan
        return StepStats(
            loss=mean_loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            applied=applied,
            step_time_s=step_time_s,
            micro_batch_time_s=micro_batch_s if math.isfinite(micro_batch_s) else None,
            noise=_noise(small_sq, measured_norm, [_size(columns) for columns in micro_batches], self._world_size),
            noise_cost_s=noise_cost_s,
            rank_zero_says=tuple(said),
        )

    def rescale(self, scaling: Scaling, *, carry: bool) -> None:
        """Set what goes with the learning rate at another batch: beta2, eps, weight decay and momentum.

        With ``carry``, a change in mid-run, Adam's second moment is carried over: the bias correction of the new
        beta2 divides by another number than the moment was summed for, and while the run is young that would change
        the size of every step.
        """
        rescale(self._engine.optimizer, self._recipe, scaling, carry=carry)

    def to_device(self, batch: Columns) -> dict[str, torch.Tensor]:
        """Columns as tensors on this rank's device."""
        tensors = {name: torch.as_tensor(column) for name, column in batch.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """The model as it is evaluated: evaluation mode, no gradients, buffers averaged over the ranks."""
        self._engine.eval()
        with averaged(self.module), torch.no_grad(), attending(self._plan):
            yield self.model
        self._engine.train()

    def save(self, folder: Path, snapshot: Snapshot | None = None) -> dict[str, torch.Tensor]:
        """Write model, optimizer and this rank's shards below ``folder``; return this rank's own buffers.

        With a ``snapshot`` they are added to it instead, to be written by it later.

        The model's own file holds the averaged buffers: whoever exports it gets what was evaluated.
        """
        own = local_buffers(self.module)
        direct = self._engine.checkpoint_engine
        if snapshot is not None:
            self._engine.checkpoint_engine = _into(snapshot)
        try:
            with averaged(self.module):
                self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        finally:
            self._engine.checkpoint_engine = direct
        return own

    def load(self, folder: Path, own_buffers: dict[str, torch.Tensor]) -> None:
        """Take up what ``save`` wrote, at the same layout of workers and ZeRO stage."""
        groups = [_settings(group) for group in self._engine.optimizer.param_groups]
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:  # it only logs what it misses
            raise CheckpointError(f"checkpoint {folder}: DeepSpeed finds none of its files there")
        # The recipe decides betas and penalties, not the file: they differ after --force-config.
        for group, settings in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        load_local_buffers(self.module, own_buffers)

    def load_reshaped(self, folder: Path, buffers: dict[str, torch.Tensor]) -> None:
        """Take up what ``save`` wrote at another number of workers or another ZeRO stage; ``buffers`` for every rank.

        Raises:
            CheckpointError: weights or state are missing there, or one side is in 16 bit at stage 0.
        """
        trainable: dict[torch.Tensor, str] = {p: n for n, p in self.module.named_parameters() if p.requires_grad}
        groups = [_settings(group) for group in self._engine.optimizer.param_groups]
        take_up(self._engine.optimizer, trainable, Shards.open(folder / TAG, self._names_in_order))
        for group, settings in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        load_local_buffers(self.module, buffers)

    def _accumulate(
        self, micro_batches: Sequence[Columns], norms: GradientNorms | None
    ) -> tuple[torch.Tensor, _Stopwatch]:
        """Forward and backward of every micro batch; returns this rank's mean loss, detached, and the times."""
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        samples = sum(_size(columns) for columns in micro_batches)
        scale = self._missing_loss_scale()
        watch = _Stopwatch(self.device)
        with contextlib.nullcontext() if norms is None else norms.hooked(watch.note_gradient):
            for index, columns in enumerate(micro_batches):
                # DeepSpeed counts micro steps since the start of the run, which breaks when accumulation changes:
                # the boundary is therefore said, never counted, and the division is ours.
                self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                with self.clock.part("forward"):
                    loss = self._task.loss(self.model, self.to_device(columns))
                if loss.ndim != 0:
                    raise ValueError(f"Task.loss returned shape {tuple(loss.shape)}; return the mean over the samples")
                parts = samples / _size(columns)  # of equal parts, exactly their number
                self._backward(loss * (scale / parts))
                if norms is not None:
                    norms.take(self._loss_scale() / parts)
                total += loss.detach().double() / parts
                watch.end_micro_batch()
        return total, watch

    def _watch_adam(self) -> Preconditioner:
        """Before penalties are added: they are no part of the gradient's noise."""
        optimizer = self._engine.optimizer
        trainable: dict[torch.Tensor, str] = {p: n for n, p in self.module.named_parameters() if p.requires_grad}
        held = shares(optimizer, trainable)
        assert held is not None, "the plan lets no preconditioning pass in 16 bit at stage 0"
        sizes = {name: int(getattr(p, "ds_numel", p.numel())) for p, name in trainable.items()}
        return Preconditioner(innermost(optimizer), held, sizes, sharded=self._plan.zero_stage > 0)

    def _backward(self, loss: torch.Tensor) -> None:
        """Backward pass and, at the boundary, the reduction over the workers, told apart by when the graph is done.

        In stages 2 and 3 DeepSpeed reduces from within the backward pass as well, and that part stays in it.
        """
        if loss.requires_grad:
            loss.register_hook(lambda _: _when_backward_ends(self._reduction_begins))
        with self.clock.part("backward"):
            self._engine.backward(loss, scale_wrt_gas=False)

    def _reduction_begins(self) -> None:
        self.clock.switch("communication")

    def _apply(self) -> tuple[float, bool]:
        """Apply the accumulated gradient; returns its norm before clipping, and whether it was applied."""
        if self._plan.zero_stage == 0 and self._plan.precision == "fp32":
            # No wrapper of DeepSpeed's measures or guards this one case.
            norm = _norm([p.grad for p in self.module.parameters() if p.grad is not None])
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return norm, False
            self._engine.step()
            return norm, True
        scale = self._missing_loss_scale()  # before the step: it may change it
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = bool(self._engine.was_step_applied())
        return (float(norm) / scale if norm is not None else math.nan), applied

    def _missing_loss_scale(self) -> float:
        """What fp16 in stage 0 needs multiplied to its loss, and 1 elsewhere.

        That wrapper divides gradients by its loss scale, but DeepSpeed 0.19.8's ``backward`` never multiplied by it
        (its pull request 8393): updates would be 65,536 times too small.
        """
        if self._plan.precision == "fp16" and self._plan.zero_stage == 0:
            return float(self._engine.optimizer.loss_scale)
        return 1.0

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied by before its backward pass; 1 but in fp16."""
        return self._loss_scale()

    def _loss_scale(self) -> float:
        """What a loss is multiplied by before its backward pass, by DeepSpeed or for it."""
        return float(self._engine.optimizer.loss_scale) if self._plan.precision == "fp16" else 1.0

    def _share(self, loss: torch.Tensor, small_sq: float, said: Sequence[float]) -> Callable[[], list[float]]:
        """Start averaging ``loss`` and ``small_sq`` over the ranks and spreading what rank 0 says.

        The result waits for it.
        """
        mine = said if self._rank == 0 else [0.0] * len(said)
        rest = torch.tensor([small_sq / self._world_size, *mine], dtype=torch.float64)
        values = torch.cat([(loss / self._world_size).reshape(1), rest.to(loss.device)])
        work = dist.all_reduce(values, async_op=True) if self._world_size > 1 else None

        def result() -> list[float]:
            if work is not None:
                work.wait()
            return [float(value) for value in values.tolist()]

        return result


class _Stopwatch:
    """When the micro batches of a step ended, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks = [self._mark()]
        self._gradient: Any = None

    def end_micro_batch(self) -> None:
        self._marks.append(self._mark())

    def note_gradient(self) -> None:
        """A gradient has just been computed: the last one ends the backward pass, before anything is sent."""
        self._gradient = self._mark()

    def micro_batch_s(self) -> float:
        """Mean time of a micro batch without synchronisation, in s; NaN where it cannot be told apart.

        The last micro batch's backward pass ends with the reduction over the workers, so it counts only where its
        gradients were watched, and no other is there.
        """
        if len(self._marks) > 2:
            return self._between(self._marks[0], self._marks[-2]) / (len(self._marks) - 2)
        return math.nan if self._gradient is None else self._between(self._marks[0], self._gradient)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _when_backward_ends(call: Callable[[], None]) -> None:
    """Have ``call`` called once the backward pass under way has computed its last gradient."""
    # The one way to learn it without a hook per parameter; DeepSpeed and torch's own FSDP ask in the same way.
    torch.autograd.Variable._execution_engine.queue_callback(call)  # noqa: SLF001


def _size(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _halves(columns: Columns) -> list[Columns]:
    """A micro batch in two parts, or whole where it holds one sample."""
    middle = _size(columns) // 2
    if middle == 0:
        return [columns]
    return [{name: c[part] for name, c in columns.items()} for part in (slice(None, middle), slice(middle, None))]


def _noise(small_sq: float, grad_norm: float, sizes: Sequence[int], world_size: int) -> NoiseSample | None:
    """The step's sample of the noise scale; None where it was not measured, overflowed, or had one part only."""
    if not (math.isfinite(small_sq) and math.isfinite(grad_norm)) or world_size * len(sizes) < 2:
        return None
    small_batch = len(sizes) / sum(1.0 / size for size in sizes)
    return NoiseSample.from_norms(
        mean_small_sq=small_sq,
        big_sq=grad_norm * grad_norm,
        small_batch=small_batch,
        small_batches=world_size * sum(sizes) / small_batch,
    )


def _seed(seed: int) -> None:
    """Seed every generator that a job's code may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what users draw from
    torch.manual_seed(seed % 2**63)


def _fit_out(model: nn.Module, plan: Plan, *, sync_batch_norm: bool) -> nn.Module:
    if sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if plan.computing.channels_last:
        in_channels_last(model)
    if plan.activation_checkpointing:
        checkpoint_blocks(model)
    if plan.precision != "fp32":
        compute_in(model, DTYPES[plan.precision])
    return model


def _initialize(model: nn.Module, config: RunConfig, plan: Plan) -> Any:
    require_precision(plan)
    set_fp32_products(plan)
    if plan.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if plan.device == "cpu":
        # Its shared-memory op would be compiled at first use: over a minute, and for ever after a kill in that
        # minute, since the build leaves its lock behind. Gloo reduces instead.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if plan.device == "cuda" else "gloo", verbose=False)
    optimizer = build_optimizer(model, config.recipe, fused=plan.computing.fused_optimizer)
    # Some of its wrappers allocate their state by taking a step on zero gradients, in which LAMB's decay would act.
    set_learning_rate(optimizer, 0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, plan))
    if plan.zero_stage == 0 and plan.precision != "fp32":
        # The one of this case leaves that state behind, and Adam would count the step as its first.
        optimizer.state.clear()
    compile_model(engine, plan)
    return engine


def _into(snapshot: Snapshot) -> Any:
    """DeepSpeed's writer of files, with ``snapshot`` in place of the disk."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Into(TorchCheckpointEngine):  # type: ignore[misc, unused-ignore]
        def save(self, state_dict: Any, path: str) -> None:
            snapshot.add(state_dict, Path(path))

        def preserves_storage_sharing(self) -> bool:
            return False  # a snapshot copies what is shown of a tensor, not all of its storage

    return Into()


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(nn.utils.get_total_norm(tensors)) if tensors else 0.0


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, int | float | bool | tuple)}
