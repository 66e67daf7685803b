"""From a config and the size of cluster and data to a Plan: everything decided before launch, with its reasons."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from orchestrator.config import Fixed, Ramp, RunConfig, Stop
from orchestrator.errors import ClusterError, ConfigError, DataError
from orchestrator.planning.choice import Setting
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.computing import EAGER, Computing, Place, choose_computing
from orchestrator.planning.costing import Costing, cost, setting_of
from orchestrator.planning.costs import Profile
from orchestrator.planning.layout import Layout, lay_out, sharing_workers
from orchestrator.planning.memory import MemoryUse
from orchestrator.planning.probe import Probe

__all__ = ["Plan", "Standing", "make_plan", "planned_precision"]

Precision = Literal["fp32", "bf16", "fp16"]
# Compute capability below 8.0 (Ampere) has no bf16 units: NVIDIA's CUDA programming guide, table of arithmetic.
WITHOUT_BF16 = ("V100", "P100", "T4", "P4", "K80", "RTX-2080")


class Standing(Protocol):
    """Where a run stands: the few numbers that decide whether it is finished."""

    @property
    def progress(self) -> float: ...
    @property
    def train_time_s(self) -> float: ...
    @property
    def evaluation(self) -> dict[str, float] | None: ...


@dataclass(frozen=True)
class Plan:
    """Everything decided before launch.

    ``train_samples`` and ``evaluation_samples`` are data-set sizes; ``length`` is the run's length in
    reference samples, or None where only time or a target ends it; ``evaluate_every`` is in reference samples.
    """

    name: str
    layout: Layout
    reference_batch: int
    zero_stage: Literal[0, 1, 2, 3]
    offload: Literal["none", "optimizer", "all"]
    activation_checkpointing: bool
    precision: Precision
    device: Literal["cpu", "cuda"]
    nodes: int
    train_samples: int
    evaluation_samples: int
    length: float | None
    evaluate_every: float
    stop: Stop
    reasons: tuple[str, ...]
    computing: Computing = EAGER
    costing: Costing | None = None
    """None where the model could not be traced or the accelerator is not known."""

    @property
    def layout_key(self) -> dict[str, Any]:
        """What the shards of a checkpoint depend on: it is read as it is where this is the same."""
        return {"workers": self.layout.workers, "zero_stage": self.zero_stage, "precision": self.precision}

    @property
    def memory(self) -> MemoryUse | None:
        """The breakdown of a worker's device memory."""
        return None if self.costing is None else self.costing.memory

    def finished(self, standing: Standing) -> str | None:
        """Why the run is finished, or None while it is not."""
        if self.length is not None and standing.progress >= self.length:
            return "length reached"
        stop = self.stop
        if stop.wall_time_s is not None and standing.train_time_s >= stop.wall_time_s:
            return f"wall time of {stop.wall_time_s:g} s reached"
        value = (standing.evaluation or {}).get(stop.metric) if stop.metric is not None else None
        if value is not None and stop.at_least is not None and value >= stop.at_least:
            return f"target reached: {stop.metric} {value:.4g} >= {stop.at_least:g}"
        if value is not None and stop.at_most is not None and value <= stop.at_most:
            return f"target reached: {stop.metric} {value:.4g} <= {stop.at_most:g}"
        return None

    def shares(self, progress: float, step: float) -> tuple[float, float]:
        """Shares of the length at start and end of a step worth ``step`` reference samples; 0 and 1 without one."""
        if self.length is None:
            return 0.0, 1.0
        return min(1.0, progress / self.length), min(1.0, (progress + step) / self.length)

    def to_dict(self) -> dict[str, Any]:
        """A flat, JSON-ready view, as written to ``plan.json``."""
        data = asdict(self)
        data["stop"] = self.stop.model_dump(exclude_none=True)
        layout = data.pop("layout")
        data.pop("costing")
        costing = Costing.not_costed() if self.costing is None else self.costing.to_dict()
        return {"name": data.pop("name"), "global_batch": self.layout.global_batch, **layout, **data, **costing}


def make_plan(
    config: RunConfig,
    shape: ClusterShape,
    *,
    train_samples: int,
    evaluation_samples: int,
    profile: Profile | None = None,
    probe: Probe | None = None,
    refuse: bool = True,
) -> Plan:
    """Decide everything that is still on "auto", and check that the whole fits together.

    With a ``profile`` of the model memory and time are costed, and what is on "auto" is chosen by them, with a
    ``probe`` by what it measured; without a profile by rules. With ``refuse`` a run that does not fit its devices is an
    error; otherwise the plan says so. ``train_samples`` of 0 on an imagined cluster says that the data are not there.

    Raises:
        ConfigError: a value that cannot work here, or a run that does not fit, with the remedy.
        ClusterError: the cluster is too small.
        DataError: there is nothing to train on.
    """
    asked, config = config.scale.workers, _at_its_smallest(config)
    sized: list[str] = []
    workers = _workers(config, shape, sized)
    on_gpu = shape.accelerators_per_worker(config.scale) > 0
    reasons: list[str] = []
    layout = _layout(config, workers, train_samples, reasons, imagined=shape.imagined)
    reasons += sized
    if asked != config.scale.workers:
        reasons.append(f"planned for the fewest workers of scale.workers={asked}: the fleet says how many it gets")
    stage = len(reasons)
    zero_stage = _zero_stage(config, workers, reasons)
    offload = _offload(config, on_gpu, zero_stage)
    precision = _precision(config, shape, on_gpu, reasons)
    checkpointing = config.layout.activation_checkpointing
    _check_ramp(config, train_samples, imagined=shape.imagined)
    plan = Plan(
        name=config.name,
        layout=layout,
        reference_batch=config.recipe.batch,
        zero_stage=zero_stage,
        offload=offload,
        activation_checkpointing=False if checkpointing == "auto" else checkpointing,
        precision=precision,
        device="cuda" if on_gpu else "cpu",
        nodes=min(shape.nodes, workers),
        train_samples=train_samples,
        evaluation_samples=evaluation_samples,
        length=_length(config, train_samples),
        evaluate_every=config.evaluation.every_epochs * train_samples,
        stop=config.recipe.stop,
        reasons=tuple(reasons),
    )
    setting: Setting | str | None = None
    if profile is not None:
        setting = setting_of(
            config,
            shape,
            workers=workers,
            nodes=plan.nodes,
            device=plan.device,
            precision=precision,
            profile=profile,
            probe=probe,
        )
    if isinstance(setting, str):
        plan = replace(plan, reasons=(*plan.reasons, f"memory and time not known: {setting}"))
    if isinstance(setting, Setting):
        plan = _costed(plan, setting, stage, refuse=refuse)
    elif (
        probe is not None and probe.matches(plan) and "auto" == config.layout.micro_batch == config.layout.accumulation
    ):
        plan = _within(plan, probe)
    plan = _computed(plan, config, shape, profile)
    _check_combination(config, on_gpu, plan.zero_stage, evaluation_samples, imagined=shape.imagined)
    _check_preconditioning(config, plan.zero_stage, plan.precision)
    return plan


def _within(plan: Plan, probe: Probe) -> Plan:
    """The plan with the largest micro batch below one that ran out of memory; without costs nothing else is known."""
    share, refused = plan.layout.worker_batch, probe.refused
    if refused is None or plan.layout.micro_batch < refused or refused == 1:
        return plan
    size = max(size for size in range(1, refused) if share % size == 0)
    reason = f"micro batch {size}: the probe ran out of memory at {refused}"
    return replace(plan, layout=Layout(plan.layout.workers, size, share // size), reasons=(*plan.reasons, reason))


def _computed(plan: Plan, config: RunConfig, shape: ClusterShape, profile: Profile | None) -> Plan:
    """The plan with how its device computes: decided last, since stage and checkpointing bear on it."""
    if shape.accelerator.lower().startswith("tpu"):
        why_not = "a TPU is planned for in memory and time alone: DeepSpeed has no device for it, and `run` refuses it"
        return replace(plan, reasons=(*plan.reasons, why_not))
    place = Place(
        device=plan.device,
        accelerator=shape.accelerator,
        modern=plan.device == "cuda" and not _is_old(shape),
        precision=plan.precision,
        zero_stage=plan.zero_stage,
        activation_checkpointing=plan.activation_checkpointing,
    )
    computing, why = choose_computing(config, place, profile)
    return replace(plan, computing=computing, reasons=(*plan.reasons, *why))


def planned_precision(config: RunConfig, shape: ClusterShape) -> Precision:
    """The precision that ``make_plan`` will decide on: what the model is to be traced in."""
    return _precision(config, shape, shape.accelerators_per_worker(config.scale) > 0, [])


def _costed(plan: Plan, setting: Setting, stage_at: int, *, refuse: bool) -> Plan:
    """The plan with what the costs decide, and the costs themselves; ``stage_at``: where its reasons name the stage."""
    best, costing, why_stage, why = cost(
        setting, plan.layout, zero_stage=plan.zero_stage, length=plan.length, refuse=refuse
    )
    reasons = list(plan.reasons)
    if why_stage:
        reasons[stage_at] = why_stage
    return replace(
        plan,
        layout=Layout(setting.workers, best.micro_batch, best.accumulation),
        zero_stage=best.zero_stage,
        offload=best.offload,
        activation_checkpointing=best.activation_checkpointing,
        reasons=(*reasons, *why),
        costing=costing,
    )


def _at_its_smallest(config: RunConfig) -> RunConfig:
    """A run in a queue is planned for the fewest workers it takes, until the fleet says how many it gets."""
    workers = config.scale.workers
    if config.fleet.queue is None or not isinstance(workers, tuple):
        return config
    return config.model_copy(update={"scale": config.scale.model_copy(update={"workers": workers[0]})})


def _layout(
    config: RunConfig, workers: int, train_samples: int, reasons: list[str], *, imagined: bool = False
) -> Layout:
    wanted = config.layout.global_batch
    batch = config.recipe.batch if wanted == "auto" else wanted
    if imagined and wanted == "auto":
        batch = _rounded(config, batch, workers, reasons)
    if train_samples == 0 and not imagined:
        raise DataError("the training set is empty: there is nothing to train on")
    if batch > train_samples and not imagined:
        raise ConfigError(
            f"{'recipe.batch' if wanted == 'auto' else 'layout.global_batch'}={batch} is larger than the training set "
            f"of {train_samples} samples: use at most {train_samples}"
        )
    layout = lay_out(batch, workers, micro_batch=config.layout.micro_batch, accumulation=config.layout.accumulation)
    if not reasons:
        source = "the reference batch" if wanted == "auto" else "as set"
        reasons.append(f"global batch {batch}: {source}")
    if batch != config.recipe.batch:
        reasons.append(
            f"learning rate tuned at batch {config.recipe.batch}: carried over by rule {config.policy.rule!r}"
        )
    reasons.append(_batch_policy(config))
    return layout


def _rounded(config: RunConfig, batch: int, workers: int, reasons: list[str]) -> int:
    """On a cluster that does not exist the reference batch is rounded up to what its workers can share."""
    fixed = [n for n in (config.layout.micro_batch, config.layout.accumulation) if n != "auto"]
    unit = workers * math.prod(fixed)
    whole = unit if len(fixed) == 2 else math.ceil(batch / unit) * unit
    if whole != batch:
        shared = " x ".join([f"{workers} workers", *map(str, fixed)])
        reasons.append(
            f"global batch {whole}: the reference batch of {batch} is no multiple of {shared}; "
            f"a run needs layout.global_batch={whole}"
        )
    return whole


def _batch_policy(config: RunConfig) -> str:
    match config.policy:
        case Fixed():
            return "policy fixed: the batch stays"
        case Ramp(at=at, batches=batches):
            steps = ", ".join(f"{batch} from {share:.0%}" for share, batch in zip(at, batches, strict=True))
            return f"policy ramp: batch {steps} of the run on"
        case _:
            return "policy goodput: the batch grows while that shortens the time to the end"


def elastic_workers(config: RunConfig) -> tuple[int, ...]:
    """The numbers of workers that a run with a range may have: those that share its batch. Empty without a range.

    Raises:
        ConfigError: there is no such number.
    """
    if not isinstance(config.scale.workers, tuple):
        return ()
    layout = config.layout
    batch = config.recipe.batch if layout.global_batch == "auto" else layout.global_batch
    return sharing_workers(
        batch, *config.scale.workers, micro_batch=layout.micro_batch, accumulation=layout.accumulation
    )


def _workers(config: RunConfig, shape: ClusterShape, reasons: list[str]) -> int:
    """As many as were asked for; of a range the most that there is room for and that share the batch."""
    room, asked = shape.workers(config.scale), config.scale.workers
    if not isinstance(asked, tuple) or shape.imagined:
        return room
    counts, (low, high) = elastic_workers(config), asked
    if room < counts[0]:
        raise ClusterError(
            f"scale.workers={low},{high} with this global batch needs {counts[0]} workers at least, and the cluster "
            f"has room for {room}: use a batch that {room} workers can share, or a larger cluster"
        )
    found = max(count for count in counts if count <= room)
    if len(counts) < high - low + 1:
        told = ", ".join(map(str, counts))
        reasons.append(f"{found} workers: of scale.workers={low},{high} the batch can be shared by {told}")
    return found


def _zero_stage(config: RunConfig, workers: int, reasons: list[str]) -> Literal[0, 1, 2, 3]:
    stage = config.layout.zero_stage
    if stage != "auto":
        return stage
    if (offload := config.layout.offload) in ("all", "optimizer") and config.recipe.optimizer.name != "lamb":
        reasons.append(f"ZeRO stage {3 if offload == 'all' else 1}: the lowest that offload {offload} works in")
        return 3 if offload == "all" else 1
    if config.recipe.optimizer.name == "lamb" or workers == 1:
        alone = workers == 1
        reasons.append(f"ZeRO stage 0: {'one worker has nothing to share' if alone else 'LAMB needs whole layers'}")
        return 0
    reasons.append("ZeRO stage 1: optimizer state shared over the workers, at no cost in communication")
    return 1


def _offload(config: RunConfig, on_gpu: bool, zero_stage: int) -> Literal["none", "optimizer", "all"]:
    offload = config.layout.offload
    if offload == "auto" or offload == "none":
        return "none"
    if not on_gpu:
        raise ConfigError(
            f"layout.offload={offload!r} moves state from accelerator to host memory, and these workers have no "
            "accelerator: set layout.offload=none"
        )
    if zero_stage == 0 or (offload == "all" and zero_stage < 3):
        needed = "3" if offload == "all" else "1, 2 or 3"
        raise ConfigError(f"layout.offload={offload!r} needs layout.zero_stage={needed}, and it is {zero_stage}")
    return offload


def _precision(config: RunConfig, shape: ClusterShape, on_gpu: bool, reasons: list[str]) -> Precision:
    wanted = config.layout.precision
    old = _is_old(shape)
    if wanted == "bf16" and on_gpu and old:
        raise ConfigError(f"layout.precision='bf16': {shape.accelerator} has no bf16 units: use fp16, fp32 or auto")
    if wanted != "auto":
        return wanted
    if not on_gpu:
        reasons.append("precision fp32: no accelerator")
        return "fp32"
    reasons.append(f"precision {'fp16' if old else 'bf16'}: what {shape.accelerator or 'the accelerator'} is fast at")
    return "fp16" if old else "bf16"


def _is_old(shape: ClusterShape) -> bool:
    return shape.accelerator.upper().removeprefix("NVIDIA-").removeprefix("TESLA-").startswith(WITHOUT_BF16)


def _check_ramp(config: RunConfig, train_samples: int, *, imagined: bool = False) -> None:
    """A ramp that could never be followed is refused: it would be a fixed batch that nobody asked for."""
    if not isinstance(config.policy, Ramp):
        return
    if not config.recipe.stop.has_length:
        raise ConfigError(
            "policy.name='ramp' is laid over the run's length, and recipe.stop gives none: set one of "
            "recipe.stop.steps, recipe.stop.epochs, recipe.stop.samples, or another policy"
        )
    if (largest := max(config.policy.batches)) > train_samples and not imagined:
        raise ConfigError(
            f"policy.batches holds {largest}, more than the training set of {train_samples} samples: use at most that"
        )
    if "auto" not in (config.layout.micro_batch, config.layout.accumulation):
        raise ConfigError(
            "policy.name='ramp' changes the batch, and layout.micro_batch and layout.accumulation are both set: "
            "set one of the two to auto"
        )


def _check_combination(
    config: RunConfig, on_gpu: bool, zero_stage: int, evaluation_samples: int, *, imagined: bool = False
) -> None:
    if config.recipe.optimizer.name == "lamb" and (zero_stage != 0 or not on_gpu):
        raise ConfigError(
            "recipe.optimizer.name='lamb' runs on DeepSpeed's fused GPU kernel, whose trust ratio needs whole layers: "
            "use accelerators and layout.zero_stage=0, or recipe.optimizer.name=adamw"
        )
    if config.layout.sync_batch_norm and not on_gpu:
        raise ConfigError("layout.sync_batch_norm=true needs accelerators (torch's SyncBatchNorm): set it to false")
    if config.recipe.stop.metric is not None and not evaluation_samples and not imagined:
        raise ConfigError(
            f"recipe.stop.metric={config.recipe.stop.metric!r} is measured on the evaluation set, and the job has none"
        )


def _check_preconditioning(config: RunConfig, zero_stage: int, precision: Precision) -> None:
    if not config.policy.noise_preconditioned:
        return
    if (name := config.recipe.optimizer.name) not in ("adam", "adamw"):
        raise ConfigError(
            f"policy.noise_preconditioned=true divides by Adam's second moment, and recipe.optimizer.name={name!r} has "
            "none to go by: set it to false, or use adam or adamw"
        )
    if zero_stage == 0 and precision != "fp32":
        raise ConfigError(
            f"policy.noise_preconditioned=true cannot see the optimizer's state in {precision} at layout.zero_stage=0: "
            "set layout.zero_stage=1"
        )


def _length(config: RunConfig, train_samples: int) -> float | None:
    """Length in reference samples: steps count at the reference batch, epochs in passes over the data."""
    stop = config.recipe.stop
    if stop.steps is not None:
        return float(stop.steps * config.recipe.batch)
    if stop.epochs is not None:
        return stop.epochs * train_samples or None  # data that are not there have no length
    return None if stop.samples is None else float(stop.samples)
