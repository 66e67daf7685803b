"""Which ZeRO stage, offload, checkpointing, micro batch and accumulation: all are costed, the best is taken.

1. A combination fits when what it needs for sure is within the device's memory, and has room when what is allowed for
   beside it (``memory.py``) is too. Of those that fit, nothing is offloaded where that is possible, and parameters only
   where moving the optimizer is not enough; then those with room go before tight ones, of which the one with the least
   memory is taken.
2. On accelerators the fastest is taken, and of those within ``TIE`` of it the one with the fewest micro batches, then
   without checkpointing, then of the lower stage, then with the least memory. The estimate is not finer than that.
3. On CPUs a step's time is a guess, so the order decides alone: fewest micro batches, no checkpointing, lowest stage.
4. Stage 0 is taken where it is asked for, for one worker, and for LAMB: in stage 1 the state is shared at next to no
   cost. Stage 1 comes before stage 2 by its time wherever there is accumulation (2 a + 1 volumes against 3).
5. Where a probe has run, its numbers correct memory and times (``probe.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

import numpy as np

from orchestrator.config import RunConfig
from orchestrator.planning.accelerators import Accelerator
from orchestrator.planning.costs import Profile
from orchestrator.planning.memory import (
    FRAGMENTATION,
    MemoryUse,
    Offload,
    activation_bytes,
    fixed_use,
    memory_use,
    optimizer_bytes,
)
from orchestrator.planning.probe import ACCUMULATION, Correction, Probe
from orchestrator.planning.roofline import StepParts, step_parts

__all__ = ["Choice", "Setting", "Space", "best_of_each_stage", "choose", "smallest_changes", "space_of"]

Stage = Literal[0, 1, 2, 3]
TIE = 0.02
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")


@dataclass(frozen=True)
class Setting:
    """Where the run is to go: what a choice cannot change."""

    profile: Profile
    config: RunConfig
    accelerator: Accelerator
    workers: int
    nodes: int
    capacity_bytes: int
    """What a worker's device holds."""
    host_bytes: int | None
    """Host memory for each worker, where it is known: what is offloaded must go somewhere."""
    probe: Probe | None = None
    """What was measured of this model on these devices."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What torch calls it."""
        return "cpu" if self.accelerator.is_cpu else "cuda"

    @cached_property
    def correction(self) -> Correction | None:
        """What the probe does to predictions; None without one."""
        probe = self.probe
        if probe is None or not probe.peaks:
            return None
        if probe.activation_checkpointing and self.profile.checkpointed is None:
            return None
        stage, offload, checkpointing = probe.combination
        fixed = fixed_use(
            self.profile, self.config, zero_stage=stage, workers=probe.workers, offload=offload, device=self.device
        )
        # A process is measured with all that is in it, a device by its allocator, which the context is beside.
        beside = fixed["host"] + (0 if self.device == "cpu" else fixed["context"] + fixed["libraries"])
        return Correction.of(
            probe,
            fixed_bytes=sum(fixed.values()) - beside,
            peak_bytes=lambda size: float(activation_bytes(self.profile, checkpointing, size)[1]),
            step_time_s=lambda size: float(
                self.roofline(stage, offload, checkpointing, size, ACCUMULATION, probe.workers, probe.nodes).total
            ),
        )

    def roofline(
        self,
        stage: int,
        offload: Offload,
        checkpointing: bool,
        micro_batch: Any,
        accumulation: Any,
        workers: int,
        nodes: int,
    ) -> StepParts:
        """Predicted times, before any correction."""
        return step_parts(
            self.profile,
            self.accelerator,
            zero_stage=stage,
            workers=workers,
            nodes=nodes,
            offload=offload,
            checkpointing=checkpointing,
            micro_batch=micro_batch,
            accumulation=accumulation,
            optimizer_bytes=optimizer_bytes(self.config),
        )

    def steps(
        self, stage: int, offload: Offload, checkpointing: bool, micro_batch: Any, accumulation: Any
    ) -> StepParts:
        """Times of a step, corrected by what was measured."""
        parts = self.roofline(stage, offload, checkpointing, micro_batch, accumulation, self.workers, self.nodes)
        if self.correction is None:
            return parts
        model = self.correction.probe.model
        if model is None or not self._probed(stage, offload, checkpointing):
            return parts.scaled(self.correction.slowdown)
        measured = model.step_time_s(
            nodes=self.nodes, workers=self.workers, micro_batch=micro_batch, accumulation=accumulation
        )
        return parts.scaled(measured / parts.total)

    def ran_out(self, stage: int, offload: Offload, checkpointing: bool, micro_batch: Any) -> Any:
        """Whether a rank was seen to run out of memory at such a micro batch, or at a smaller one."""
        refused = None if self.probe is None else self.probe.refused
        if refused is None or not self._probed(stage, offload, checkpointing):
            return np.zeros(np.shape(micro_batch), dtype=bool)
        return np.asarray(micro_batch) >= refused

    def _probed(self, stage: int, offload: str, checkpointing: bool) -> bool:
        assert self.probe is not None
        same_workers = (self.probe.workers, self.probe.nodes) == (self.workers, self.nodes)
        return same_workers and self.probe.combination == (stage, offload, checkpointing)


@dataclass(frozen=True)
class Space:
    """What may be chosen from; a pinned choice has one value."""

    zero_stages: tuple[Stage, ...]
    offloads: tuple[Offload, ...]
    checkpointings: tuple[bool, ...]
    layouts: tuple[tuple[int, int], ...]
    """Micro batch and accumulation."""


@dataclass(frozen=True)
class Choice:
    """One combination, with what it costs."""

    zero_stage: Stage
    offload: Offload
    activation_checkpointing: bool
    micro_batch: int
    accumulation: int
    memory: MemoryUse
    step: StepParts
    fits: bool
    has_room: bool
    """Whether it fits with all that is allowed for beside what it needs."""

    @property
    def step_time_s(self) -> float:
        """Seconds of an optimizer step."""
        return float(self.step.total)

    def __str__(self) -> str:
        extras = [f"offload {self.offload}"] if self.offload != "none" else []
        extras += ["checkpointing"] if self.activation_checkpointing else []
        return ", ".join([f"stage {self.zero_stage}", *extras, f"micro batch {self.micro_batch} x {self.accumulation}"])


def space_of(config: RunConfig, profile: Profile, share: int, workers: int, *, on_accelerator: bool) -> Space:
    """All that the config leaves open. ``share`` is a worker's samples per step."""
    layout = config.layout
    return Space(
        zero_stages=_stages(config, workers) if layout.zero_stage == "auto" else (layout.zero_stage,),
        offloads=_offloads(on_accelerator) if layout.offload == "auto" else (layout.offload,),
        checkpointings=_checkpointings(profile)
        if layout.activation_checkpointing == "auto"
        else (layout.activation_checkpointing and profile.checkpointed is not None,),
        layouts=_layouts(share, layout.micro_batch, layout.accumulation),
    )


def _stages(config: RunConfig, workers: int) -> tuple[Stage, ...]:
    if config.recipe.optimizer.name == "lamb":
        return (0,)
    return (0, 1, 2, 3) if workers == 1 else (1, 2, 3)


def _offloads(on_accelerator: bool) -> tuple[Offload, ...]:
    return OFFLOADS if on_accelerator else ("none",)


def _checkpointings(profile: Profile) -> tuple[bool, ...]:
    return (False,) if profile.checkpointed is None else (False, True)


def _layouts(share: int, micro_batch: int | str, accumulation: int | str) -> tuple[tuple[int, int], ...]:
    if isinstance(micro_batch, int):
        return ((micro_batch, share // micro_batch),)
    if isinstance(accumulation, int):
        return ((share // accumulation, accumulation),)
    return tuple((size, share // size) for size in range(share, 0, -1) if share % size == 0)


def choose(setting: Setting, space: Space) -> Choice:
    """The best combination that fits; where none does, the one that needs least."""
    found = list(_costed(setting, space))
    assert found, "a space has at least one combination"
    fitting = [choice for choice in found if choice.fits]
    return _preferred(setting, fitting) if fitting else min(found, key=_total)


def _preferred(setting: Setting, fitting: list[Choice]) -> Choice:
    place = min(OFFLOADS.index(choice.offload) for choice in fitting)
    near = [choice for choice in fitting if OFFLOADS.index(choice.offload) == place]
    roomy = near = [choice for choice in near if choice.has_room] or [min(near, key=_total)]
    if setting.device == "cuda":
        fastest = min(choice.step_time_s for choice in near)
        near = [choice for choice in near if choice.step_time_s <= (1 + TIE) * fastest]
    best = min(near, key=_preference)
    return _in_stage_1(best, roomy) or best


def _total(choice: Choice) -> int:
    return choice.memory.total


def _in_stage_1(best: Choice, fitting: list[Choice]) -> Choice | None:
    """The same in stage 1, where the best is in stage 2 with accumulation and the other fits."""
    if best.zero_stage != 2 or best.accumulation == 1:
        return None
    same = (best.offload, best.activation_checkpointing, best.micro_batch)
    ones = [c for c in fitting if c.zero_stage == 1]
    return next((c for c in ones if (c.offload, c.activation_checkpointing, c.micro_batch) == same), None)


def best_of_each_stage(setting: Setting, space: Space) -> tuple[Choice, ...]:
    """The best combination in each ZeRO stage, fitting or not, whichever the config has pinned."""
    stages: tuple[Stage, ...] = (0, 1, 2, 3)
    if setting.config.recipe.optimizer.name == "lamb":
        stages = (0,)
    spaces = [replace(space, zero_stages=(stage,)) for stage in stages]
    return tuple(choose(setting, each) for each in spaces if any(_valid(*pair) for pair in _pairs(each)))


def smallest_changes(setting: Setting, space: Space, share: int, *, roomy: bool = False) -> list[str]:
    """Single changes to what the config pins, or to the cluster, with which it would fit, the mildest first.

    With ``roomy`` those with which it would have room as well.
    """
    wider = [
        ("layout.micro_batch", replace(space, layouts=_layouts(share, "auto", "auto")), "micro_batch"),
        ("layout.zero_stage", replace(space, zero_stages=_stages(setting.config, setting.workers)), "zero_stage"),
        (
            "layout.activation_checkpointing",
            replace(space, checkpointings=_checkpointings(setting.profile)),
            "activation_checkpointing",
        ),
        ("layout.offload", replace(space, offloads=_offloads(setting.device == "cuda")), "offload"),
    ]
    said = []
    for field, space_with, attribute in wider:
        best = _suited(setting, space_with, roomy) if space_with != space else None
        if best is not None:
            said.append(
                _layout_change(setting.config, best)
                if attribute == "micro_batch"
                else f"{field}={str(getattr(best, attribute)).lower()}"
            )
    if not said:
        every = wider[0][1]
        for _, each, attribute in wider[1:]:
            names = {
                "zero_stage": "zero_stages",
                "activation_checkpointing": "checkpointings",
                "offload": "offloads",
            }
            every = replace(every, **{names[attribute]: getattr(each, names[attribute])})
        best = _suited(setting, every, roomy)
        if best is not None:
            said.append(f"all of them open to choice, as in {best}")
    if (batch := _small_enough_batch(setting, space, share, roomy)) is not None:
        said.append(f"layout.global_batch={batch}")
    if (workers := _enough_workers(setting, space, roomy)) is not None:
        said.append(f"{workers} workers")
    return said


def _layout_change(config: RunConfig, best: Choice) -> str:
    """Those of micro batch and accumulation that are pinned, as in ``best``: one alone would contradict the other."""
    pins = {"micro_batch": config.layout.micro_batch, "accumulation": config.layout.accumulation}
    return " and ".join(f"layout.{name}={getattr(best, name)}" for name, pin in pins.items() if pin != "auto")


def _suited(setting: Setting, space: Space, roomy: bool) -> Choice | None:
    """The best that fits, or with ``roomy`` the best that has room; None where there is none."""
    suited = [choice for choice in _costed(setting, space) if (choice.has_room if roomy else choice.fits)]
    return _preferred(setting, suited) if suited else None


def _enough_workers(setting: Setting, space: Space, roomy: bool) -> int | None:
    """The fewest workers, doubling, with which it fits at the same micro batches; None where no number helps."""
    for doublings in range(1, 11):
        workers: int = setting.workers << doublings
        larger = replace(setting, workers=workers, nodes=setting.nodes << doublings)
        if _suited(larger, space, roomy) is not None:
            return workers
    return None


def _small_enough_batch(setting: Setting, space: Space, share: int, roomy: bool) -> int | None:
    """The largest global batch, halving, with which it fits; only a pinned accumulation makes the batch matter."""
    accumulation = setting.config.layout.accumulation
    if accumulation == "auto" or setting.config.layout.micro_batch != "auto":
        return None
    micro_batch = share // accumulation // 2
    while micro_batch:
        if _suited(setting, replace(space, layouts=((micro_batch, accumulation),)), roomy) is not None:
            return setting.workers * micro_batch * accumulation
        micro_batch //= 2
    return None


def _pairs(space: Space) -> Iterator[tuple[Stage, Offload]]:
    yield from product(space.zero_stages, space.offloads)


def _valid(stage: Stage, offload: Offload) -> bool:
    return offload == "none" or (stage == 3 if offload == "all" else stage > 0)


def _costed(setting: Setting, space: Space) -> Iterator[Choice]:
    """Every combination with its cost: arrays over the layouts, a loop over the rest."""
    micro = np.array([size for size, _ in space.layouts])
    times = np.array([count for _, count in space.layouts])
    shape: dict[str, Any] = {"workers": setting.workers}
    for stage, offload in _pairs(space):
        if not _valid(stage, offload):
            continue
        if setting.workers == 1 and stage > 0 and offload == "none" and len(space.zero_stages) > 1:
            continue  # one worker has nothing to share
        fixed = fixed_use(
            setting.profile, setting.config, zero_stage=stage, offload=offload, device=setting.device, **shape
        )
        on_device = sum(fixed.values()) - fixed["host"]
        has_host = setting.host_bytes is None or fixed["host"] <= setting.host_bytes
        for checkpointing in space.checkpointings:
            correction = setting.correction
            _, peak = activation_bytes(setting.profile, checkpointing, micro, correction)
            totals = on_device + (1 + FRAGMENTATION) * peak + (0.0 if correction is None else correction.extra_bytes)
            totals = np.where(setting.ran_out(stage, offload, checkpointing, micro), np.inf, totals)
            allowed = fixed["libraries"] + FRAGMENTATION * peak
            steps = setting.steps(stage, offload, checkpointing, micro, times)
            for index in _worth_a_look(totals, steps.total, setting.capacity_bytes):
                size = int(micro[index])
                yield Choice(
                    zero_stage=stage,
                    offload=offload,
                    activation_checkpointing=checkpointing,
                    micro_batch=size,
                    accumulation=int(times[index]),
                    memory=memory_use(
                        setting.profile,
                        setting.config,
                        zero_stage=stage,
                        offload=offload,
                        checkpointing=checkpointing,
                        micro_batch=size,
                        device=setting.device,
                        correction=correction,
                        **shape,
                    ),
                    step=steps.at(index),
                    fits=bool(totals[index] - allowed[index] <= setting.capacity_bytes) and has_host,
                    has_room=bool(totals[index] <= setting.capacity_bytes) and has_host,
                )


def _worth_a_look(totals: Any, seconds: Any, capacity: int) -> list[int]:
    """Of all layouts the largest micro batch with room and the fastest with room; the smallest where none has."""
    fitting = np.flatnonzero(totals <= capacity)
    if len(fitting) == 0:
        return [int(np.argmin(totals))]
    fastest = seconds[fitting].min()
    near = [int(i) for i in fitting if seconds[i] <= (1 + TIE) * fastest]
    return sorted({int(fitting[0]), *near})


def _preference(choice: Choice) -> tuple[int, bool, int, int]:
    return choice.accumulation, choice.activation_checkpointing, choice.zero_stage, choice.memory.total
