"""Where a worker's time goes: every moment belongs to one part, so the parts of a lap are its wall time.

On a CPU moments are read from the host's clock. On a GPU the host runs ahead of the device, so a moment is an event in
the device's queue: its time is read once the device has passed it, a step or two later, and nothing ever waits for it.
What the device waits for, data or a checkpoint, then lies between two of its events, and what it does not wait for,
because it was busy, does not count.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any, Protocol

import torch

from orchestrator.telemetry.metrics import PARTS

__all__ = ["HostTicker", "StepClock", "Ticker", "ticker_for"]


class Ticker(Protocol):
    """Marks moments. Three verbs, because on a GPU a moment is marked now and read later."""

    def mark(self) -> Any: ...
    def passed(self, mark: Any) -> bool: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class HostTicker:
    """The host's own clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:  # noqa: ARG002 - a moment of this clock is known at once
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaTicker:
    """Events in the queue of the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3


class StepClock:
    """Charges every moment since it was made to the part that the worker was in; without a ticker it does nothing."""

    def __init__(self, ticker: Ticker | None) -> None:
        self._ticker = ticker
        self._part = "other"
        self._since = None if ticker is None else ticker.mark()
        self._spans: deque[tuple[str, Any, Any]] = deque()

    def part(self, name: str) -> _Part:
        """A context in which time belongs to ``name``; parts may lie in parts."""
        return _Part(self, name)

    def switch(self, name: str) -> str:
        """From now on time belongs to ``name``; returns where it belonged until now."""
        before, self._part = self._part, name
        if self._ticker is not None:
            now = self._ticker.mark()
            self._spans.append((before, self._since, now))
            self._since = now
        return before

    def lap(self) -> dict[str, float] | None:
        """Seconds by part that have become known since the last lap; None where none have."""
        if self._ticker is None:
            return None
        self.switch(self._part)
        found: dict[str, float] = {}
        while self._spans and self._ticker.passed(self._spans[0][2]):
            part, start, end = self._spans.popleft()
            found[part] = found.get(part, 0.0) + self._ticker.seconds(start, end)
        return {part: found[part] for part in PARTS if part in found} or None


class _Part:
    """Not a generator: a step enters a dozen of these."""

    __slots__ = ("_before", "_clock", "_name")

    def __init__(self, clock: StepClock, name: str) -> None:
        assert name in PARTS, name
        self._clock = clock
        self._name = name

    def __enter__(self) -> None:
        self._before = self._clock.switch(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._clock.switch(self._before)


def ticker_for(device: torch.device) -> Ticker:
    """The clock that tells when ``device`` has done something."""
    return CudaTicker() if device.type == "cuda" else HostTicker()
