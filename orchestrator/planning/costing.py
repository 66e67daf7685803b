"""What a run costs: the choice that is made for it, what it takes of memory, time and money, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.accelerators import Accelerator, accelerator_named, recognise
from orchestrator.planning.choice import (
    Choice,
    Setting,
    Space,
    best_of_each_stage,
    choose,
    smallest_changes,
    space_of,
)
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Linear, Profile
from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import ALLOWANCES, MemoryUse, StateTerm, optimizer_bytes, state_terms, sums_in_fp32
from orchestrator.planning.probe import Probe
from orchestrator.planning.roofline import StepParts, StepTerms, step_terms

__all__ = ["Alternative", "Costed", "Costing", "cost", "setting_of"]


@dataclass(frozen=True)
class Alternative:
    """The best of another ZeRO stage."""

    zero_stage: int
    offload: str
    activation_checkpointing: bool
    micro_batch: int
    accumulation: int
    memory_bytes: int
    step_time_s: float
    fits: bool
    tight: bool


@dataclass(frozen=True)
class Terms:
    """What the numbers of a costing are made of, for ``--explain``."""

    states: dict[str, StateTerm]
    frozen_and_buffer_bytes: float
    element_bytes: int
    largest_layer: int
    small_parameters: int
    kept_bytes: Linear
    """Base and per sample, as traced; the batch itself is in it."""
    peak_bytes: Linear
    factor: float
    """On both, from a probe; 1 without one."""
    step: StepTerms


@dataclass(frozen=True)
class Costing:
    """What the plan expects of memory, time and money, as far as it is known before the run."""

    fits: bool
    memory: MemoryUse
    device_memory_bytes: int
    accelerator: str
    step: StepParts
    step_time_s: float
    samples_per_s: float
    mfu: float
    """Model FLOPs, each counted once, as a share of the peak (Chowdhery et al. 2022, arXiv:2204.02311)."""
    parameters: int
    flops_per_sample: float
    terms: Terms
    alternatives: tuple[Alternative, ...]
    changes: tuple[str, ...]
    """Single changes with which it would fit, or where it is tight with which it would have room, the mildest first."""
    confidence: str
    tight: bool = False
    """Whether it fits only if less is lost to fragmentation and libraries than is allowed for."""
    timed: bool = False
    """Whether times rest on steps of this model on these devices."""
    run_time_s: float | None = None
    """To the end of the run's length, or of ``recipe.stop.wall_time_s`` where that comes first."""
    run_time_bound: Literal["exact", "at least", "at most"] = "exact"
    """A batch above the reference's makes less progress a sample, by how much is not known yet; one below makes more.
    Time that ends a run ends it at the latest."""
    cost: float | None = None
    """Of the run, where the config has a price and the run a length."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as it stands in the plan's own dictionary."""
        data = asdict(self)
        data.pop("memory")
        return {"memory_bytes": self.memory.to_dict(), **data}

    @classmethod
    def not_costed(cls) -> dict[str, Any]:
        """The keys of ``to_dict`` where nothing could be costed, all null: scripts find them whatever the plan."""
        return dict.fromkeys(["memory_bytes", *(field.name for field in fields(cls) if field.name != "memory")])


class Costed(NamedTuple):
    """The best choice for a layout's global batch, what it costs, and why it is made."""

    choice: Choice
    costing: Costing
    why_stage: str
    """Empty where the stage is what the rules had chosen already."""
    reasons: tuple[str, ...]


def setting_of(
    config: RunConfig,
    shape: ClusterShape,
    *,
    workers: int,
    nodes: int,
    device: str,
    precision: str,
    profile: Profile,
    probe: Probe | None,
) -> Setting | str:
    """Where the run is to go, or why too little is known of it."""
    workers_per_node = math.ceil(workers / nodes)
    host = shape.memory_bytes // workers_per_node if shape.memory_bytes else None
    if device == "cpu":
        accelerator: Accelerator | None = accelerator_named("cpu", config.planning.accelerator)
    else:
        accelerator = recognise(shape.accelerator, config.planning.accelerator)
    if accelerator is None:
        return f"accelerator {shape.accelerator!r} is not in the table: describe it in the section planning.accelerator"
    if not accelerator.flops(precision):  # type: ignore[arg-type]
        return f"{accelerator.name} has no known rate in {precision}: set layout.precision to another type"
    if config.layout.tf32 is True:  # on tensor cores, at half the rate of 16 bit, as every maker's data sheet has it
        accelerator = replace(accelerator, fp32_flops=max(accelerator.fp32_flops, accelerator.bf16_flops / 2))
    if shape.network_gbit_per_s:
        network = shape.network_gbit_per_s / 8 * 1e9 / workers_per_node
        accelerator = replace(accelerator, network_bytes_per_s=network)
    own = host if accelerator.is_cpu else shape.device_memory_bytes
    capacity = own or accelerator.memory_bytes
    return Setting(
        profile=profile,
        config=config,
        accelerator=accelerator,
        workers=workers,
        nodes=nodes,
        capacity_bytes=int(config.planning.memory_share * capacity),
        host_bytes=host,
        probe=probe,
    )


def cost(setting: Setting, layout: Layout, *, zero_stage: int, length: float | None, refuse: bool) -> Costed:
    """Choose what the config leaves open for ``layout``'s global batch, and cost it.

    ``zero_stage`` is what rules without costs would take; ``length`` the run's in reference samples. With ``refuse`` a
    run that does not fit is an error.

    Raises:
        ConfigError: checkpointing that the model cannot have, or a run that does not fit, with the remedy.
    """
    config, profile = setting.config, setting.profile
    if config.layout.activation_checkpointing is True and profile.checkpointed is None:
        raise ConfigError(profile.not_checkpointed)
    space = space_of(config, profile, layout.worker_batch, setting.workers, on_accelerator=setting.device == "cuda")
    best = choose(setting, space)
    changes: tuple[str, ...] = ()
    if not best.has_room:
        changes = tuple(smallest_changes(setting, space, layout.worker_batch, roomy=best.fits))
    if refuse and not best.fits:
        raise ConfigError(_does_not_fit(best, setting, changes))
    return Costed(
        choice=best,
        costing=_costing(best, layout, length, setting, space, changes),
        why_stage="" if best.zero_stage == zero_stage else _why_stage(best, setting),
        reasons=(*_why_memory(best, layout, setting, space), *_why_tight(best, setting, changes)),
    )


def _costing(
    best: Choice, layout: Layout, length: float | None, setting: Setting, space: Space, changes: tuple[str, ...]
) -> Costing:
    batch, seconds = layout.global_batch, best.step_time_s
    peak = setting.accelerator.flops(setting.profile.precision) * setting.workers  # type: ignore[arg-type]
    run_time_s, bound = _run_time(setting.config, batch, length, seconds)
    price = setting.config.planning.price_per_hour
    return Costing(
        fits=best.fits,
        memory=best.memory,
        device_memory_bytes=setting.capacity_bytes,
        accelerator=setting.accelerator.name,
        step=best.step,
        step_time_s=seconds,
        samples_per_s=batch / seconds,
        mfu=setting.profile.flops_per_sample * batch / seconds / peak,
        parameters=setting.profile.parameters,
        flops_per_sample=setting.profile.flops_per_sample,
        terms=_terms(best, setting),
        alternatives=tuple(_alternative(choice) for choice in best_of_each_stage(setting, space)),
        changes=changes,
        confidence=_confidence(setting),
        tight=best.fits and not best.has_room,
        timed=setting.correction is not None,
        run_time_s=run_time_s,
        run_time_bound=bound,
        cost=None if price is None or run_time_s is None else price * setting.workers * run_time_s / 3600,
    )


def _terms(best: Choice, setting: Setting) -> Terms:
    profile, work = setting.profile, setting.profile.of(best.activation_checkpointing)
    stage, element = best.zero_stage, 4 if profile.precision == "fp32" else 2
    frozen = profile.frozen_parameters * element / (setting.workers if stage == 3 else 1)
    return Terms(
        states=state_terms(
            stage,
            setting.workers,
            precision=profile.precision,
            optimizer_bytes=optimizer_bytes(setting.config),
            fp32_sums=sums_in_fp32(profile, stage),
        ),
        frozen_and_buffer_bytes=frozen + profile.buffer_bytes,
        element_bytes=element,
        largest_layer=profile.largest_layer,
        small_parameters=profile.small_parameters,
        kept_bytes=work.kept_bytes._replace(per_sample=work.kept_bytes.per_sample + profile.sample_bytes),
        peak_bytes=work.peak_bytes,
        factor=1.0 if setting.correction is None else setting.correction.factor,
        step=step_terms(
            profile,
            setting.accelerator,
            zero_stage=stage,
            workers=setting.workers,
            nodes=setting.nodes,
            offload=best.offload,
            checkpointing=best.activation_checkpointing,
            micro_batch=best.micro_batch,
            accumulation=best.accumulation,
            optimizer_bytes=optimizer_bytes(setting.config),
        ),
    )


def _run_time(
    config: RunConfig, batch: int, length: float | None, step_time_s: float
) -> tuple[float | None, Literal["exact", "at least", "at most"]]:
    """How long the run takes at this batch, and whether that is a bound."""
    reference, wall_time_s = config.recipe.batch, config.recipe.stop.wall_time_s
    run_time_s = None if not length else length / batch * step_time_s
    if wall_time_s is not None and (run_time_s is None or run_time_s >= wall_time_s):
        return wall_time_s, "at most"
    return run_time_s, "exact" if batch == reference else "at least" if batch > reference else "at most"


def _alternative(choice: Choice) -> Alternative:
    return Alternative(
        zero_stage=choice.zero_stage,
        offload=choice.offload,
        activation_checkpointing=choice.activation_checkpointing,
        micro_batch=choice.micro_batch,
        accumulation=choice.accumulation,
        memory_bytes=choice.memory.total,
        step_time_s=choice.step_time_s,
        fits=choice.fits,
        tight=choice.fits and not choice.has_room,
    )


def _confidence(setting: Setting) -> str:
    if setting.correction is not None:
        probe = setting.correction.probe
        return f"good: {len(probe.peaks)} micro batches timed on {probe.device}"
    if setting.accelerator.is_cpu:
        return "low: a guess at one core of a server, nothing has been timed"
    if setting.profile.untraced:
        return f"fair: a roofline from one step on the CPU, not traced ({setting.profile.untraced})"
    return "fair: a roofline, nothing has been timed"


def _why_stage(best: Choice, setting: Setting) -> str:
    return (
        f"ZeRO stage {best.zero_stage}: "
        f"{'the best of what fits' if best.fits else 'what needs least of'} {_gib(setting.capacity_bytes)} on a device"
    )


def _why_memory(best: Choice, layout: Layout, setting: Setting, space: Space) -> list[str]:
    untraced = setting.profile.untraced
    reasons = [f"measured by a step on the CPU, since it cannot be traced: {untraced}"] if untraced else []
    reasons += [
        f"memory {_gib(best.memory.total)} of {_gib(setting.capacity_bytes)} on each {setting.accelerator.name}"
    ]
    if best.accumulation > 1 and len(space.layouts) > 1:
        reasons.append(
            f"micro batch {best.micro_batch} x {best.accumulation}: "
            f"{layout.worker_batch} samples at once do not fit, or are no faster"
        )
    if best.activation_checkpointing and len(space.checkpointings) > 1:
        reasons.append("activation checkpointing: without it no faster layout fits")
    if best.offload != "none" and len(space.offloads) > 1:
        reasons.append(f"offload {best.offload}: nothing fits without it")
    return reasons


def _why_tight(best: Choice, setting: Setting, changes: tuple[str, ...]) -> list[str]:
    """The warning where it fits without the allowances alone."""
    if not best.fits or best.has_room:
        return []
    remedy = f": there is room with {', or '.join(changes)}" if changes else ""
    warning = (
        f"memory is tight: {_gib(best.memory.needed)} are needed, and {_gib(best.memory.allowed)} allowed for "
        f"fragmentation and libraries do not fit beside them in {_gib(setting.capacity_bytes)}{remedy}"
    )
    return [warning]


def _does_not_fit(best: Choice, setting: Setting, changes: tuple[str, ...]) -> str:
    parts = {name: value for name, value in vars(best.memory).items() if name not in ("host", *ALLOWANCES)}
    largest = sorted(parts, key=lambda name: parts[name], reverse=True)[:3]
    remedy = "it would fit with " + ", or ".join(changes) if changes else "no change of layout or workers would fit it"
    return (
        f"the run does not fit: {best} needs {_gib(best.memory.needed)} on each of {setting.workers} "
        f"{setting.accelerator.name}, which hold {_gib(setting.capacity_bytes)} "
        f"({', '.join(f'{name} {_gib(parts[name])}' for name in largest)}): {remedy}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
