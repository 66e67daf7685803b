"""How much memory a worker's device needs, and on what.

1. **States**, in bytes per parameter, as DeepSpeed 0.19.8 was measured to allocate them per rank (two gloo ranks, at
   the end of the backward pass, when they are most). b is 2 in 16 bit and 4 in fp32, s the optimizer's own (Adam 8,
   momentum 4, plain SGD 0), c a gradient's (4 where 16-bit gradients are summed in fp32, else b), N the workers:

   stage 0: b + b + 4 (masters, 16 bit only) + s
   stage 1: b + b + (4 + s)/N, and 4 more where gradients are summed in fp32 beside the 16-bit ones
   stage 2: b + (c + 4 + s)/N
   stage 3: (b + b + 4 + s)/N

   In 16 bit with Adam and plain sums: 16, 4 + 12/N, 2 + 14/N and 16/N (Rajbhandari et al. 2020, arXiv:1910.02054,
   figure 1). In fp32 the sharded stages hold a master copy although parameters are fp32 themselves.
2. **Gathered layers** in stage 3: what is whole at a time, ``LIVE_ELEMENTS`` or the largest layer and the next, and
   the small tensors that stay whole.
3. **Buckets** of ``BUCKET_ELEMENTS``: one in stages 1 to 3, two where stage 2 overlaps reduction with the backward
   pass. Summing 16-bit gradients in fp32 in stage 1 goes through DeepSpeed's BF16_Optimizer, which flattens up to 5e8
   elements at a time whatever is set.
4. **Activations**: what autograd keeps, and the peak over it (the loss, temporaries, a recomputed block), both linear
   in the micro batch, traced. The batch itself is in the former.
5. **Fragmentation**: ``FRAGMENTATION`` of 4. Assumption, from one published run (8 B parameters, 8 ranks, compiled:
   12 % above what was predicted without temporaries; here these are traced, so half of it).
6. **Measured**: what a probe found beside the lines above, which may be less than nothing (``probe.py``).
7. **Context**: CUDA's own, 0.5 GiB; on a CPU torch, DeepSpeed and Ray in a worker.
8. **Libraries**: buffers of NCCL's channels, workspaces and code of cuBLAS, up to 1 GiB. Assumption: their number
   depends on the machine's links and on what is called.

Fragmentation and libraries are allowances: the allocator may do better, and published runs have. They are in
``MemoryUse.total``, and not in ``MemoryUse.needed``: a run whose total is above the device's memory is tight, and one
whose needed part is does not fit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from orchestrator.config import SGD, RunConfig
from orchestrator.planning.costs import Profile
from orchestrator.planning.probe import Correction

__all__ = ["ALLOWANCES", "BUCKET_ELEMENTS", "LIVE_ELEMENTS", "MemoryUse", "States", "memory_use", "model_state_bytes"]

Offload = Literal["none", "optimizer", "all"]

BUCKET_ELEMENTS = 50_000_000
"""Elements per communication bucket. DeepSpeed's default of 5e8 would reserve gigabytes on each device."""
LIVE_ELEMENTS = 300_000_000
"""Parameters that stage 3 keeps whole at a time beyond the layer in use; DeepSpeed's default is 1e9."""
FLATTENED_ELEMENTS = 500_000_000
FRAGMENTATION = 0.06
CONTEXT_BYTES = {"cuda": int(0.5 * 2**30), "cpu": int(0.75 * 2**30)}
LIBRARY_BYTES = {"cuda": 2**30, "cpu": 0}
ALLOWANCES = ("fragmentation", "libraries")
"""Parts that are allowed for and may turn out smaller."""


@dataclass(frozen=True)
class States:
    """Bytes on a worker's device at the end of the backward pass, and what was moved to its host."""

    parameters: float
    gradients: float
    masters: float
    optimizer: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """All that is on the device."""
        return self.parameters + self.gradients + self.masters + self.optimizer


@dataclass(frozen=True)
class StateTerm:
    """One state's formula: bytes per parameter, and over how many workers they are shared."""

    per_parameter: float
    shared_by: int


def state_terms(
    zero_stage: int, workers: int, *, precision: str, optimizer_bytes: int, fp32_sums: bool
) -> dict[str, StateTerm]:
    """The formulas above by state, in the order of ``States``, before anything is offloaded."""
    b = 4 if precision == "fp32" else 2
    summed = fp32_sums and b == 2
    gradient = {0: b, 1: b + (4 if summed else 0), 2: 4 if summed else b, 3: b}[zero_stage]
    shared = 1 if zero_stage == 0 else workers
    return {
        "parameters": StateTerm(b, workers if zero_stage == 3 else 1),
        "gradients": StateTerm(gradient, workers if zero_stage >= 2 else 1),
        "masters": StateTerm(0 if zero_stage == 0 and precision == "fp32" else 4, shared),
        "optimizer": StateTerm(optimizer_bytes, shared),
    }


def model_state_bytes(
    parameters: float,
    zero_stage: int,
    workers: int,
    *,
    precision: str = "bf16",
    optimizer_bytes: int = 8,
    fp32_sums: bool = False,
    offload: Offload = "none",
) -> float:
    """Bytes of parameters, gradients, masters and optimizer state on each worker's device.

    Args:
        parameters: trained parameters of the whole model.
        zero_stage: 0 to 3.
        workers: over which ZeRO shares.
        precision: "bf16", "fp16" or "fp32".
        optimizer_bytes: of state per parameter: Adam 8, momentum 4, plain SGD 0.
        fp32_sums: whether 16-bit gradients are summed in fp32 (stages 1 and 2).
        offload: what is in host memory instead.
    """
    return states(
        parameters,
        zero_stage,
        workers,
        precision=precision,
        optimizer_bytes=optimizer_bytes,
        fp32_sums=fp32_sums,
        offload=offload,
    ).device


def states(
    parameters: float,
    zero_stage: int,
    workers: int,
    *,
    precision: str,
    optimizer_bytes: int,
    fp32_sums: bool,
    offload: Offload,
) -> States:
    """The parts of ``model_state_bytes``."""
    terms = state_terms(zero_stage, workers, precision=precision, optimizer_bytes=optimizer_bytes, fp32_sums=fp32_sums)
    whole = States(*(parameters * term.per_parameter / term.shared_by for term in terms.values()))
    if offload == "none":
        return whole
    host = whole.masters + whole.optimizer + 4.0 * parameters / (1 if zero_stage == 0 else workers)
    if offload == "optimizer":
        return States(whole.parameters, whole.gradients, 0.0, 0.0, host)
    return States(0.0, 0.0, 0.0, 0.0, host + whole.parameters + whole.gradients)


def optimizer_bytes(config: RunConfig) -> int:
    """Bytes of optimizer state per parameter."""
    optimizer = config.recipe.optimizer
    if isinstance(optimizer, SGD):
        return 4 if optimizer.momentum else 0
    return 8


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one worker's device, by what they are for; ``host`` is in its host's memory."""

    parameters: int
    gradients: int
    masters: int
    optimizer: int
    gathered: int
    buckets: int
    activations: int
    temporaries: int
    fragmentation: int
    context: int
    libraries: int = 0
    measured: int = 0
    """Found by a probe beside the rest; negative where the rest is too much."""
    host: int = 0

    @property
    def total(self) -> int:
        """All on the device."""
        return sum(value for name, value in asdict(self).items() if name != "host")

    @property
    def allowed(self) -> int:
        """What is allowed for and may turn out smaller."""
        return sum(getattr(self, name) for name in ALLOWANCES)

    @property
    def needed(self) -> int:
        """What no luck with the allocator makes smaller."""
        return self.total - self.allowed

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``total``, what of it is ``needed``, and ``breakdown``."""
        return {"total": self.total, "needed": self.needed, "breakdown": asdict(self)}


def memory_use(
    profile: Profile,
    config: RunConfig,
    *,
    zero_stage: int,
    workers: int,
    offload: Offload,
    checkpointing: bool,
    micro_batch: int,
    device: Literal["cpu", "cuda"],
    correction: Correction | None = None,
) -> MemoryUse:
    """The whole breakdown of one choice."""
    fixed = fixed_use(profile, config, zero_stage=zero_stage, workers=workers, offload=offload, device=device)
    kept, peak = activation_bytes(profile, checkpointing, micro_batch, correction)
    return MemoryUse(
        **fixed,
        activations=int(kept),
        temporaries=int(peak - kept),
        fragmentation=int(FRAGMENTATION * peak),
        measured=0 if correction is None else int(correction.extra_bytes),
    )


def activation_bytes(
    profile: Profile, checkpointing: bool, micro_batch: ArrayLike, correction: Correction | None = None
) -> tuple[Any, Any]:
    """What is kept for the backward pass with the batch itself, and the peak; floats or arrays like ``micro_batch``."""
    work, factor = profile.of(checkpointing), 1.0 if correction is None else correction.factor
    kept = work.kept_bytes.at(micro_batch) + profile.sample_bytes * np.asarray(micro_batch, dtype=float)
    return factor * kept, factor * np.maximum(kept, work.peak_bytes.at(micro_batch))


def fixed_use(
    profile: Profile,
    config: RunConfig,
    *,
    zero_stage: int,
    workers: int,
    offload: Offload,
    device: Literal["cpu", "cuda"],
) -> dict[str, int]:
    """What does not depend on the micro batch, by name."""
    fp32_sums = sums_in_fp32(profile, zero_stage)
    parts = states(
        profile.parameters,
        zero_stage,
        workers,
        precision=profile.precision,
        optimizer_bytes=optimizer_bytes(config),
        fp32_sums=fp32_sums,
        offload=offload,
    )
    element = 4 if profile.precision == "fp32" else 2
    frozen = profile.frozen_parameters * element / (workers if zero_stage == 3 else 1)
    return {
        "parameters": int(parts.parameters + frozen + profile.buffer_bytes),
        "gradients": int(parts.gradients),
        "masters": int(parts.masters),
        "optimizer": int(parts.optimizer),
        "gathered": _gathered(profile, element) if zero_stage == 3 else 0,
        "buckets": _buckets(profile, zero_stage, element, overlapped=device == "cuda", flattened=fp32_sums),
        "context": CONTEXT_BYTES[device],
        "libraries": LIBRARY_BYTES[device],
        "host": int(parts.host),
    }


def sums_in_fp32(profile: Profile, zero_stage: int) -> bool:
    """Whether gradients are summed in fp32 although they are computed in 16 bit."""
    return profile.precision == "bf16" and zero_stage in (1, 2)


def _gathered(profile: Profile, element: int) -> int:
    whole = profile.parameters + profile.frozen_parameters
    return element * (min(whole, LIVE_ELEMENTS + profile.largest_layer) + profile.small_parameters)


def _buckets(profile: Profile, zero_stage: int, element: int, *, overlapped: bool, flattened: bool) -> int:
    if zero_stage == 0:  # one flattened copy at a time, of at most so many elements
        return element * min(profile.parameters, FLATTENED_ELEMENTS)
    if zero_stage == 1 and flattened:
        return 4 * min(profile.parameters, FLATTENED_ELEMENTS)
    return element * BUCKET_ELEMENTS * (2 if zero_stage == 2 and overlapped else 1)
