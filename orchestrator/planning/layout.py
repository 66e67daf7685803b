"""Lay one global batch out as workers x micro batch x accumulation, or say exactly why it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import ConfigError

__all__ = ["Layout", "lay_out", "refactor", "sharing_workers"]

Choice = int | Literal["auto"]


@dataclass(frozen=True)
class Layout:
    """How one optimizer step is laid out: each worker runs ``accumulation`` times ``micro_batch`` samples."""

    workers: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all workers."""
        return self.workers * self.micro_batch * self.accumulation

    @property
    def worker_batch(self) -> int:
        """Samples per optimizer step on one worker."""
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        return f"{self.global_batch} = {self.workers} workers x {self.micro_batch} micro batch x {self.accumulation}"


def lay_out(global_batch: int, workers: int, *, micro_batch: Choice = "auto", accumulation: Choice = "auto") -> Layout:
    """Factor ``global_batch`` over ``workers``.

    With both choices on "auto" a worker takes its share in one micro batch.

    Raises:
        ConfigError: the factors do not divide the batch; the message names the nearest batches that do.
    """
    if global_batch % workers:
        raise ConfigError(
            f"layout.global_batch={global_batch} does not divide over scale.workers={workers}: "
            f"use {_nearest(global_batch, workers)}, or another number of workers"
        )
    share = global_batch // workers
    if micro_batch != "auto" and accumulation != "auto":
        if micro_batch * accumulation != share:
            raise ConfigError(
                f"layout.micro_batch={micro_batch} x layout.accumulation={accumulation} x {workers} workers = "
                f"{micro_batch * accumulation * workers}, but the global batch is {global_batch}: "
                "make them agree, or set one of the three to auto"
            )
        return Layout(workers, micro_batch, accumulation)
    if micro_batch != "auto":
        return Layout(workers, micro_batch, _factor(global_batch, workers, "micro_batch", micro_batch))
    if accumulation != "auto":
        return Layout(workers, _factor(global_batch, workers, "accumulation", accumulation), accumulation)
    return Layout(workers, share, 1)


def sharing_workers(
    global_batch: int, low: int, high: int, *, micro_batch: Choice = "auto", accumulation: Choice = "auto"
) -> tuple[int, ...]:
    """The numbers of workers from ``low`` to ``high`` that can each take an equal share of ``global_batch``.

    Raises:
        ConfigError: there is none, or both factors are fixed, which leaves one number of workers.
    """
    fixed = [n for n in (micro_batch, accumulation) if n != "auto"]
    if len(fixed) == 2:
        raise ConfigError(
            f"layout.micro_batch={micro_batch} and layout.accumulation={accumulation} leave one number of workers, and "
            f"scale.workers={low},{high} is a range: set one of the two to auto, or scale.workers to a number"
        )
    pinned = fixed[0] if fixed else 1
    found = tuple(n for n in range(low, high + 1) if global_batch % (n * pinned) == 0)
    if not found:
        raise ConfigError(
            f"layout.global_batch={global_batch} does not divide over any number of workers in "
            f"scale.workers={low},{high}: use {_nearest(global_batch, low * pinned)}, or another range"
        )
    return found


def refactor(
    before: Layout,
    workers: int,
    *,
    micro_batch: Choice = "auto",
    accumulation: Choice = "auto",
    at_most: int | None = None,
) -> Layout:
    """Lay ``before``'s global batch out over another number of workers.

    The micro batch is the largest that divides a worker's share and is no larger than the one that ran: it is known to
    fit. A batch that the workers do not divide goes to the nearest that they do.
    """
    if micro_batch != "auto" and accumulation != "auto":
        return Layout(workers, micro_batch, accumulation)
    pinned = next((n for n in (micro_batch, accumulation) if n != "auto"), 1)
    share = max(1, round(before.global_batch / workers / pinned)) * pinned
    if micro_batch != "auto":
        return Layout(workers, micro_batch, share // micro_batch)
    if accumulation != "auto":
        return Layout(workers, share // accumulation, accumulation)
    limit = min(share, before.micro_batch, at_most or share)
    largest = max(size for size in range(1, limit + 1) if share % size == 0)
    return Layout(workers, largest, share // largest)


def _factor(global_batch: int, workers: int, field: str, value: int) -> int:
    share = global_batch // workers
    if share % value:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - value))[:3])
        raise ConfigError(
            f"layout.{field}={value} x {workers} workers does not divide layout.global_batch={global_batch}: "
            f"each worker's share is {share} samples, so use {field} {' or '.join(map(str, nearest))}, "
            f"or a global batch of {_nearest(global_batch, value * workers)}"
        )
    return share // value


def _nearest(batch: int, multiple: int) -> str:
    below = batch // multiple * multiple
    choices = [b for b in (below, below + multiple) if b > 0]
    return " or ".join(map(str, choices))
