"""How long a step takes before anything has been timed: kernels against a roofline, volumes against links.

1. **A kernel** takes the longest of: its FLOPs at the rate it can reach, its bytes at the memory's bandwidth
   (Williams, Waterman & Patterson 2009), and the launch of the next. A matrix product of inner dimension K reaches
   ``matmul * K / (K + K0)`` of the peak: each tile of the result costs a start and an end (loading the first
   operands, writing the tile) worth ``K0`` = 128 steps of the inner loop. Assumption, from the shape of published
   cuBLAS curves. Fractions by accelerator: ``accelerators.py``.
2. **Activation checkpointing** needs no rule: the recomputed kernels are in the trace.
3. **Volume** per optimizer step in DeepSpeed 0.19.8, in elements of the P parameters, times (N - 1)/N, as measured on
   two ranks (it differs from the ZeRO paper): stage 0: 2; stage 1: 3; stage 2: 2a + 1; stage 3: 3a, of which 2a
   gathers. In 16 bit an element has 2 bytes, and 4 where gradients are summed in fp32 in stage 1.
4. **A ring** moves its volume at the slowest link it crosses: inside a node the device's link, across nodes all NICs
   of a node together, since its rings leave through different ones, both at ``LINK`` = 75 % of the published rate
   (nccl-tests' bus bandwidth for large messages), plus a latency for each of the messages.
5. **Overlap.** Stages 2 and 3 communicate while they compute; what hides is at most ``OVERLAP`` = 80 % of the
   computation (assumption), and communication takes that from the computation's own kernels: ``CONTENTION`` = 10 % of
   the hidden time (assumption: NCCL holds some of the multiprocessors and of the memory's bandwidth). Stage 1 reduces
   at the end, in one lump.
6. **The optimizer** reads and writes its states, masters, gradients and parameters once, at the memory's bandwidth;
   on a CPU at the host's. Offloaded, gradients go down and parameters come up over PCIe, and the update runs at
   ``HOST_UPDATE`` bytes/s.

How far to trust it: without a timing, the median error of six published runs is in ``docs/decisions``; on CPUs it is
a guess at one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.planning.accelerators import Accelerator
from orchestrator.planning.costs import Kernel, Pass, Profile

__all__ = ["KernelTerm", "StepParts", "StepTerms", "Traffic", "step_parts", "step_terms"]

Array = NDArray[np.float64]

K0 = 128.0
LINK = 0.75
OVERLAP = 0.8
CONTENTION = 0.1
MESSAGE_S = {"inside": 15e-6, "across": 40e-6}
BUCKET_ELEMENTS_PER_MESSAGE = 50_000_000
HOST_UPDATE = 20e9
UNSEEN = 0.03
"""Share of a step that no model of kernels and links sees: data, waiting for the slowest rank, Python. Assumption."""


@dataclass(frozen=True)
class StepParts:
    """Seconds of one optimizer step, or arrays of them."""

    compute: Any
    """Forward and backward of all micro batches."""
    exposed_communication: Any
    """What the computation does not hide, and what hiding costs it."""
    optimizer: Any
    offload: Any
    unseen: Any

    @property
    def total(self) -> Any:
        """The whole step."""
        return self.compute + self.exposed_communication + self.optimizer + self.offload + self.unseen

    def scaled(self, factor: Any) -> StepParts:
        """Every part so much longer."""
        return StepParts(*(factor * part for part in vars(self).values()))

    def at(self, index: int) -> StepParts:
        """One of several."""
        return StepParts(*(float(np.atleast_1d(part)[index if np.ndim(part) else 0]) for part in vars(self).values()))


@dataclass(frozen=True)
class Traffic:
    """What a worker's link carries in a step."""

    bytes_by_operation: dict[str, Any]
    bytes_per_s: float
    """Of the slowest link of the ring, as far as it is reached."""
    messages: Any
    message_s: float

    @property
    def seconds(self) -> Any:
        """By itself, nothing hidden."""
        return sum(self.bytes_by_operation.values()) / self.bytes_per_s + self.message_s * self.messages


@dataclass(frozen=True)
class KernelTerm:
    """All kernels of a kind in one micro batch."""

    kind: str
    flops: float
    moved_bytes: float
    seconds: float


@dataclass(frozen=True)
class StepTerms:
    """The numbers that ``step_parts`` computes a choice's times from, for ``--explain``; none of them is measured."""

    kernels: tuple[KernelTerm, ...]
    peak_flops_per_s: float
    memory_bytes_per_s: float
    """As far as it is reached."""
    traffic: Traffic | None
    """None for one worker."""
    hidden_s: float
    update_bytes: float
    update_bytes_per_s: float
    offload_bytes: float
    offload_bytes_per_s: float


def step_terms(
    profile: Profile,
    accelerator: Accelerator,
    *,
    zero_stage: int,
    workers: int,
    nodes: int,
    offload: str,
    checkpointing: bool,
    micro_batch: int,
    accumulation: int,
    optimizer_bytes: int,
) -> StepTerms:
    """The terms of one optimizer step."""
    micro, times = np.asarray(micro_batch, dtype=float), np.asarray(accumulation, dtype=float)
    work, peak = profile.of(checkpointing), accelerator.flops(profile.precision)  # type: ignore[arg-type]
    found = None if workers == 1 else traffic(profile, accelerator, zero_stage, workers, nodes, times)
    if found is not None:
        by_operation = {name: float(value) for name, value in found.bytes_by_operation.items()}
        found = replace(found, bytes_by_operation=by_operation, messages=float(found.messages))
    compute = times * micro_batch_s(work, accelerator, profile.precision, micro)
    own = profile.parameters / (1 if zero_stage == 0 else workers)
    return StepTerms(
        kernels=_kernel_terms(work, accelerator, peak, micro),
        peak_flops_per_s=peak,
        memory_bytes_per_s=accelerator.bandwidth * accelerator.memory_bytes_per_s,
        traffic=found,
        hidden_s=0.0 if found is None else float(_hidden(zero_stage, found.seconds, compute)),
        update_bytes=own * _touched(optimizer_bytes),
        update_bytes_per_s=_update_rate(accelerator, offload),
        offload_bytes=0.0 if offload == "none" else own * (4 + 2) * (1 if offload != "all" else 1 + 2 * accumulation),
        offload_bytes_per_s=accelerator.host_bytes_per_s,
    )


def _kernel_terms(work: Pass, accelerator: Accelerator, peak: float, micro_batch: Array) -> tuple[KernelTerm, ...]:
    sums: dict[str, NDArray[np.float64]] = {}
    for kernel in work.kernels:
        once = (kernel.flops.at(micro_batch), kernel.moved_bytes.at(micro_batch))
        numbers = kernel.count * np.array([*once, _kernel_s(kernel, accelerator, peak, micro_batch)], dtype=float)
        sums[kernel.kind] = sums.get(kernel.kind, np.zeros(3)) + numbers
    return tuple(KernelTerm(kind, *map(float, numbers)) for kind, numbers in sums.items())


def step_parts(
    profile: Profile,
    accelerator: Accelerator,
    *,
    zero_stage: int,
    workers: int,
    nodes: int,
    offload: str,
    checkpointing: bool,
    micro_batch: ArrayLike,
    accumulation: ArrayLike,
    optimizer_bytes: int,
) -> StepParts:
    """One optimizer step; numbers, or arrays where ``micro_batch`` and ``accumulation`` are."""
    micro = np.asarray(micro_batch, dtype=float)
    times = np.asarray(accumulation, dtype=float)
    compute = times * micro_batch_s(profile.of(checkpointing), accelerator, profile.precision, micro)
    communication = communication_s(profile, accelerator, zero_stage, workers, nodes, times)
    hidden = _hidden(zero_stage, communication, compute)
    shared = 1 if zero_stage == 0 else workers
    update, moved = _update_s(profile, accelerator, shared, offload, optimizer_bytes)
    parts = (
        compute,
        communication - hidden + CONTENTION * hidden,
        update + 0.0 * compute,
        moved * (1.0 if offload != "all" else 1.0 + 2.0 * times),
    )
    return StepParts(*parts, UNSEEN * (parts[0] + parts[1] + parts[2] + parts[3]))


def _hidden(zero_stage: int, communication: Any, compute: Any) -> Any:
    return np.minimum(communication, OVERLAP * compute) if zero_stage >= 2 else np.zeros_like(compute)


def micro_batch_s(work: Pass, accelerator: Accelerator, precision: str, micro_batch: Array) -> Array:
    """Seconds of forward and backward of one micro batch."""
    peak = accelerator.flops(precision)  # type: ignore[arg-type]
    seconds = np.zeros_like(micro_batch)
    for kernel in work.kernels:
        seconds = seconds + kernel.count * _kernel_s(kernel, accelerator, peak, micro_batch)
    return seconds


def _kernel_s(kernel: Kernel, accelerator: Accelerator, peak: float, micro_batch: Array) -> Array:
    moving = kernel.moved_bytes.at(micro_batch) / (accelerator.bandwidth * accelerator.memory_bytes_per_s)
    longest = np.maximum(moving, accelerator.launch_s)
    if kernel.kind == "memory":
        return np.asarray(longest)
    reached = accelerator.attention * np.ones_like(micro_batch)
    if kernel.kind == "matmul":
        inner = np.maximum(1.0, kernel.inner.at(micro_batch))
        reached = accelerator.matmul * inner / (inner + K0)
    return np.asarray(np.maximum(longest, kernel.flops.at(micro_batch) / (reached * peak)))


def communication_s(
    profile: Profile, accelerator: Accelerator, zero_stage: int, workers: int, nodes: int, accumulation: Array
) -> Array:
    """Seconds that a step's collectives take by themselves."""
    if workers == 1:
        return np.zeros_like(accumulation)
    return np.asarray(traffic(profile, accelerator, zero_stage, workers, nodes, accumulation).seconds)


def traffic(
    profile: Profile, accelerator: Accelerator, zero_stage: int, workers: int, nodes: int, accumulation: Array
) -> Traffic:
    """What a step sends, by operation."""
    element = 4.0 if profile.precision == "fp32" else 2.0
    doubled = 2.0 if zero_stage == 1 and profile.precision == "bf16" else 1.0
    once = 1.0 + 0 * accumulation
    volumes = {
        0: {"all-reduce of gradients": 2.0 * once},
        1: {"all-reduce of gradients": 2.0 * doubled * once, "all-gather of parameters": once},
        2: {"all-reduce of gradients": 2.0 * accumulation, "all-gather of parameters": once},
        3: {"all-gather of parameters": 2.0 * accumulation, "reduce-scatter of gradients": accumulation},
    }[zero_stage]
    scale = element * profile.parameters * (workers - 1) / workers
    # A node's rings leave it through different NICs: together they have its whole network.
    network = accelerator.network_bytes_per_s * math.ceil(workers / nodes)
    link = accelerator.link_bytes_per_s if nodes == 1 else min(accelerator.link_bytes_per_s, network)
    per_message = MESSAGE_S["inside" if nodes == 1 else "across"] * np.log2(workers)
    # Stage 3 gathers tensor by tensor, a bucket ahead; the others send whole buckets.
    units = profile.tensors / 8 if zero_stage == 3 else profile.parameters / BUCKET_ELEMENTS_PER_MESSAGE
    return Traffic(
        bytes_by_operation={name: scale * volume for name, volume in volumes.items()},
        bytes_per_s=LINK * link,
        messages=np.maximum(1.0, units) * sum(volumes.values()),
        message_s=float(per_message),
    )


def _update_s(
    profile: Profile, accelerator: Accelerator, shared: int, offload: str, optimizer_bytes: int
) -> tuple[float, float]:
    """Seconds of the update, and of moving what is offloaded."""
    own = profile.parameters / shared
    seconds = own * _touched(optimizer_bytes) / _update_rate(accelerator, offload)
    return seconds, 0.0 if offload == "none" else own * (4 + 2) / accelerator.host_bytes_per_s


def _touched(optimizer_bytes: int) -> int:
    """Bytes per parameter: states and masters are read and written, the gradient read, the parameter written."""
    return 2 * optimizer_bytes + 8 + 4 + 2


def _update_rate(accelerator: Accelerator, offload: str) -> float:
    return accelerator.bandwidth * accelerator.memory_bytes_per_s if offload == "none" else HOST_UPDATE
