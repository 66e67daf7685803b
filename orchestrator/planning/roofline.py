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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.planning.accelerators import Accelerator
from orchestrator.planning.costs import Kernel, Pass, Profile

__all__ = ["StepParts", "step_parts"]

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
    hidden = np.minimum(communication, OVERLAP * compute) if zero_stage >= 2 else np.zeros_like(compute)
    shared = 1 if zero_stage == 0 else workers
    update, moved = _update_s(profile, accelerator, shared, offload, optimizer_bytes)
    parts = (
        compute,
        communication - hidden + CONTENTION * hidden,
        update + 0.0 * compute,
        moved * (1.0 if offload != "all" else 1.0 + 2.0 * times),
    )
    return StepParts(*parts, UNSEEN * (parts[0] + parts[1] + parts[2] + parts[3]))


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
    element = 4.0 if profile.precision == "fp32" else 2.0
    doubled = 2.0 if zero_stage == 1 and profile.precision == "bf16" else 1.0
    volume = {
        0: 2.0 + 0 * accumulation,
        1: 2.0 * doubled + 1.0 + 0 * accumulation,
        2: 2.0 * accumulation + 1.0,
        3: 3.0 * accumulation,
    }[zero_stage]
    num_bytes = element * profile.parameters * volume * (workers - 1) / workers
    # A node's rings leave it through different NICs: together they have its whole network.
    network = accelerator.network_bytes_per_s * math.ceil(workers / nodes)
    link = accelerator.link_bytes_per_s if nodes == 1 else min(accelerator.link_bytes_per_s, network)
    per_message = MESSAGE_S["inside" if nodes == 1 else "across"] * np.log2(workers)
    # Stage 3 gathers tensor by tensor, a bucket ahead; the others send whole buckets.
    units = profile.tensors / 8 if zero_stage == 3 else profile.parameters / BUCKET_ELEMENTS_PER_MESSAGE
    return np.asarray(num_bytes / (LINK * link) + per_message * np.maximum(1.0, units) * volume)


def _update_s(
    profile: Profile, accelerator: Accelerator, shared: int, offload: str, optimizer_bytes: int
) -> tuple[float, float]:
    """Seconds of the update, and of moving what is offloaded."""
    own = profile.parameters / shared
    # States and masters are read and written, the gradient read, the parameter written.
    touched = own * (2 * optimizer_bytes + 8 + 4 + 2)
    if offload == "none":
        return touched / (accelerator.bandwidth * accelerator.memory_bytes_per_s), 0.0
    return touched / HOST_UPDATE, own * (4 + 2) / accelerator.host_bytes_per_s
