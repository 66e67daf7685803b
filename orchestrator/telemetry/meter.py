"""What one process has measured, in memory, and the snapshot of it that goes to the hub."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator.telemetry.metrics import KNOWN, SECONDS, Kind

__all__ = ["Counted", "Key", "Meter", "Snapshot"]

Key: TypeAlias = tuple[str, tuple[str, ...]]
"""A metric's name and the values of the labels that its reporter gives."""
Buckets: TypeAlias = tuple[float, ...]
"""Observations per bucket of ``SECONDS``, those above its last bound, and their sum."""


@dataclass(frozen=True)
class Counted:
    """What only ever rises: counters and the buckets of histograms."""

    counters: Mapping[Key, float] = field(default_factory=dict)
    histograms: Mapping[Key, Buckets] = field(default_factory=dict)

    def plus(self, other: Counted) -> Counted:
        """The sum of both."""
        return Counted(
            {key: self.counters.get(key, 0.0) + other.counters.get(key, 0.0) for key in self._keys(other)},
            {
                key: tuple(
                    map(sum, zip(self.histograms.get(key, EMPTY), other.histograms.get(key, EMPTY), strict=True))
                )
                for key in {**self.histograms, **other.histograms}
            },
        )

    def _keys(self, other: Counted) -> Mapping[Key, float]:
        return {**self.counters, **other.counters}


EMPTY: Buckets = (0.0,) * (len(SECONDS) + 2)


@dataclass(frozen=True)
class Snapshot:
    """All that one process has to say, at once.

    ``source`` is "driver" or a rank; ``attempt`` and ``started`` (unix time) tell one incarnation of it from another;
    ``before`` is what the hub said that earlier incarnations had counted, None until it has; ``own`` is counted since
    this process began, and ``totals`` since the run did, whoever counted it. ``leaving`` is the last word.
    """

    run: str
    source: str
    attempt: int
    started: float
    own: Counted
    totals: Mapping[Key, float]
    gauges: Mapping[Key, float]
    before: Counted | None = None
    leaving: bool = False


class Meter:
    """Counts and remembers, for one thread. A name that is not in the table, or other labels, are a mistake of ours."""

    def __init__(self) -> None:
        self._counters: dict[Key, float] = {}
        self._totals: dict[Key, float] = {}
        self._gauges: dict[Key, float] = {}
        self._means: dict[Key, tuple[float, int]] = {}
        self._histograms: dict[Key, list[float]] = {}

    def count(self, name: str, amount: float = 1.0, *labels: str) -> None:
        """Add ``amount`` to a counter; 0 makes it known."""
        key = _key(name, labels, "counter")
        self._counters[key] = self._counters.get(key, 0.0) + amount

    def reach(self, name: str, value: float, *labels: str) -> None:
        """Set a counter that another part of this process counts, since the process began."""
        self._counters[_key(name, labels, "counter")] = value

    def total(self, name: str, value: float, *labels: str) -> None:
        """Set a counter that was counted elsewhere, since the run began."""
        self._totals[_key(name, labels, "counter")] = value

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge; None leaves it as it is."""
        if value is not None:
            self._gauges[_key(name, labels, "gauge")] = float(value)

    def forget(self, name: str) -> None:
        """Forget all series of a gauge: what it was about is gone."""
        self._gauges = {key: value for key, value in self._gauges.items() if key[0] != name}

    def average(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge to the mean of what was given since the last snapshot."""
        key = _key(name, labels, "gauge")
        total, count = self._means.get(key, (0.0, 0))
        self._means[key] = (total + value, count + 1)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """File a time in its bucket."""
        buckets = self._histograms.setdefault(_key(name, labels, "histogram"), list(EMPTY))
        buckets[bisect_left(SECONDS, seconds)] += 1.0
        buckets[-1] += seconds

    def counted(self) -> Counted:
        """What has been counted in this process."""
        return Counted(dict(self._counters), {key: tuple(buckets) for key, buckets in self._histograms.items()})

    def totals(self) -> dict[Key, float]:
        """Counters that were counted since the run began."""
        return dict(self._totals)

    def gauges(self) -> dict[Key, float]:
        """The gauges; the means begin anew."""
        for key, (total, count) in self._means.items():
            self._gauges[key] = total / count
        self._means.clear()
        return dict(self._gauges)


def _key(name: str, labels: tuple[str, ...], kind: Kind) -> Key:
    metric = KNOWN[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}"
    assert len(labels) == len(metric.labels), f"{name} has the labels {metric.labels}"
    return name, labels
