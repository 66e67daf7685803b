"""Which layouts can be had: what the config pins, what divides, and what memory allows."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import LayoutConfig
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.observation import Observation

__all__ = ["Reach"]

MOST_ACCUMULATION = 64


@dataclass(frozen=True)
class Reach:
    """The micro batches and accumulations that may be chosen; the user's pins hold."""

    pinned_micro_batch: int | None = None
    pinned_accumulation: int | None = None

    @classmethod
    def of(cls, config: LayoutConfig) -> Reach:
        """What ``layout.micro_batch`` and ``layout.accumulation`` leave open."""
        micro_batch = None if config.micro_batch == "auto" else config.micro_batch
        return cls(micro_batch, None if config.accumulation == "auto" else config.accumulation)

    def micro_batches(self, seen: Observation) -> list[int]:
        """Micro batches worth considering: a worker's share of the reference batch and of the batch in use, times 2^i.

        Goodput is flat between factors of two near its top, and hardware likes few distinct, even sizes.
        """
        if self.pinned_micro_batch is not None:
            return [self.pinned_micro_batch]
        limit = self._limit(seen)
        found = {seen.layout.micro_batch}
        for share in (max(1, seen.reference_batch // seen.layout.workers), seen.layout.worker_batch):
            size = share
            while size % 2 == 0:
                size //= 2
            while size <= limit:
                found.add(size)
                size *= 2
        return sorted(size for size in found if size <= limit)

    def layouts(self, seen: Observation, low: int, high: int) -> list[Layout]:
        """Every layout with a global batch in ``low``..``high``."""
        workers = seen.layout.workers
        return [
            Layout(workers, micro_batch, accumulation)
            for micro_batch in self.micro_batches(seen)
            for accumulation in self.accumulations(workers * micro_batch, low, high)
        ]

    def accumulations(self, unit: int, low: int, high: int) -> range:
        """Accumulations that bring ``unit`` samples into ``low``..``high``."""
        first, last = -(-low // unit), min(high // unit, MOST_ACCUMULATION)
        if self.pinned_accumulation is not None:
            first, last = max(first, self.pinned_accumulation), min(last, self.pinned_accumulation)
        return range(max(first, 1), last + 1)

    def nearest(self, batch: int, seen: Observation) -> Layout:
        """The layout nearest to ``batch``: any micro batch that memory allows, fewest micro batches first."""
        workers = seen.layout.workers
        if self.pinned_micro_batch is not None:
            return Layout(workers, self.pinned_micro_batch, max(1, round(batch / workers / self.pinned_micro_batch)))
        share = batch / workers
        accumulation = self.pinned_accumulation or max(1, -(-int(share) // self._limit(seen)))
        return Layout(workers, max(1, min(round(share / accumulation), self._limit(seen))), accumulation)

    @staticmethod
    def _limit(seen: Observation) -> int:
        known = seen.micro_batch_limit
        # Never more than four times what has run: memory and time are known from there.
        trusted = 4 * max(seen.layout.micro_batch, seen.reference_batch // seen.layout.workers, 1)
        return trusted if known is None else max(1, min(known, trusted))
