"""How much memory micro batches took in this worker, and the largest that would still fit."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

import psutil
import torch

from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.observing import observe_memory

__all__ = ["MemoryGauge", "largest_micro_batch"]

USABLE = 0.9
"""Share of the capacity that may be planned for: the rest goes to fragmentation and to what others allocate."""


@dataclass
class MemoryGauge:
    """Peaks by micro batch: of the device's allocator, or on a CPU of the process."""

    device: torch.device
    capacity: int
    """Bytes this worker may take: its device's, or its share of the container's or machine's."""
    peaks: dict[int, int] = field(default_factory=dict)
    """Most bytes in use while a micro batch of this size ran; a process never forgets its peak."""

    limit: int | None = None
    """The largest micro batch that may run, after a larger one ran out of memory."""
    running: int = 0
    """The micro batch of the step that is under way, or was last."""

    def forget(self) -> None:
        """Begin to look for a new peak; a process cannot forget its own."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def note(self, micro_batch: int) -> None:
        """File the peak since the last call under ``micro_batch``."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.peaks[micro_batch] = max(peak, self.peaks.get(micro_batch, 0))

    def observe(self, meter: Meter) -> None:
        """What is in use now, in the meter; cheap enough for once a second, from any thread."""
        if self.device.type == "cuda":
            used, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        else:
            used = reserved = int(psutil.Process().memory_info().rss)
        peak = max([used, *self.peaks.values()])
        observe_memory(meter, used=used, reserved=reserved, peak=peak, limit=self.capacity)

    @property
    def usable(self) -> int:
        """Bytes that may be planned for."""
        return int(USABLE * self.capacity)

    def largest_micro_batch(self) -> int | None:
        """The largest micro batch that fits as far as can be told; None before anything has run."""
        if not self.peaks:
            return self.limit
        found = largest_micro_batch(self.peaks, self.usable)
        return found if self.limit is None else min(found, self.limit)


def largest_micro_batch(peaks: dict[int, int], capacity: int) -> int:
    """The largest micro batch whose peak stays within ``capacity`` bytes, at least the largest that has run.

    Memory is a + b m. From one micro batch a cannot be told from b m, so all of it is taken to grow; from two, the
    smallest and the largest that ran give both.
    """
    small, large = min(peaks), max(peaks)
    if small == large or peaks[large] <= peaks[small]:
        return max(large, large * capacity // max(peaks[large], 1))
    per_sample = (peaks[large] - peaks[small]) / (large - small)
    return max(large, large + int((capacity - peaks[large]) / per_sample))
