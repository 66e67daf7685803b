"""The hub's books: snapshots in, one Prometheus registry out, served on one port.

A snapshot is all that a process has to say, so a lost one costs nothing. What only ever rises goes on across restarts
of its process, and of the hub: each process is told what came before it, and says it again with every snapshot. A
process that falls silent disappears after a time-to-live, as its numbers would be no news any more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from orchestrator.telemetry.meter import Buckets, Counted, Key, Snapshot
from orchestrator.telemetry.metrics import KNOWN, SECONDS, TABLE, Metric

__all__ = ["Board", "RefusedError", "serve"]

FAREWELL_KEPT_S = 300.0
"""For how long the last values of a run that ended can still be scraped."""
FORGOTTEN_S = 86_400.0
"""After which a silent process' counts are forgotten."""
MOST_SOURCES, MOST_SERIES, MOST_CHARACTERS = 10_000, 1_000, 200
LATE_S = 60.0

Labels: TypeAlias = tuple[str, ...]
NOTHING = Counted()
BOUNDS = [*(str(bound) for bound in SECONDS), "+Inf"]


class RefusedError(ValueError):
    """A snapshot that is malformed, or older than one that is here already."""


@dataclass(frozen=True)
class _Held:
    """The last word of one process, with what its earlier incarnations counted."""

    snapshot: Snapshot
    before: Counted
    totals: Mapping[Key, float]
    seen_at: float

    @property
    def counted(self) -> Counted:
        if not self.before.counters and not self.before.histograms:
            return self.snapshot.own
        return self.before.plus(self.snapshot.own)


class Board(Collector):
    """Holds the last snapshot of every process. Times are s on one clock that never goes back.

    ``take`` and ``collect`` may be called from different threads: what is held is replaced, never changed.
    """

    def __init__(self, *, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._held: dict[tuple[str, str], _Held] = {}
        self._taken = self._refused = 0
        self._started = time.time()
        self._checked: set[Key] = set()

    def take(self, snapshot: Snapshot) -> Counted:
        """Replace what this process said before; returns what its earlier incarnations have counted.

        Raises:
            RefusedError: an unknown metric, other labels, too much of it, or an incarnation that has been followed.
        """
        now, place = self._clock(), (snapshot.run, snapshot.source)
        held = self._held.get(place)
        try:
            self._check(snapshot)
            before, totals = self._history(snapshot, held, now)
        except RefusedError:
            self._refused += 1
            raise
        self._taken += 1
        self._held[place] = _Held(snapshot, before, totals, now)
        if self._taken % 1024 == 0:
            self._forget(now)
        return before

    def collect(self) -> Iterator[Family]:
        """Everything that is known now, as Prometheus' families, in the order of the table."""
        now = self._clock()
        held = list(self._held.values())
        alive = [each for each in held if now - each.seen_at <= self._ttl_s and not each.snapshot.leaving]
        said = [each for each in held if each.snapshot.leaving and now - each.seen_at <= FAREWELL_KEPT_S]
        values: dict[str, list[tuple[Labels, float | Buckets]]] = {}
        for each in itertools.chain(alive, said):
            for name, labels, value in _values(each):
                values.setdefault(name, []).append((labels, value))
        for name, labels, own in self._own(alive):
            values.setdefault(name, []).append((labels, own))
        for metric in TABLE:
            if found := values.get(metric.name):
                yield _family(metric, found)

    def _history(self, snapshot: Snapshot, held: _Held | None, now: float) -> tuple[Counted, Mapping[Key, float]]:
        """What came before this incarnation, and the totals that must not fall."""
        if held is None:
            return snapshot.before or NOTHING, snapshot.totals
        same = (held.snapshot.attempt, held.snapshot.started) == (snapshot.attempt, snapshot.started)
        gone = held.snapshot.leaving or now - held.seen_at > min(self._ttl_s, LATE_S)
        if not same and not gone and snapshot.started < held.snapshot.started:
            raise RefusedError("a newer incarnation of this process has reported")
        if not same and snapshot.attempt == 1:  # a new run of the same name
            return NOTHING, snapshot.totals
        kept = {key: max(value, held.totals.get(key, 0.0)) for key, value in snapshot.totals.items()}
        return held.before if same else held.counted, {**held.totals, **kept}

    def _check(self, snapshot: Snapshot) -> None:
        own = snapshot.own
        tables = (own.counters, own.histograms, snapshot.totals, snapshot.gauges)
        if sum(map(len, tables)) > MOST_SERIES:
            raise RefusedError(f"more than {MOST_SERIES} series of one process")
        if len(self._held) >= MOST_SOURCES and (snapshot.run, snapshot.source) not in self._held:
            raise RefusedError(f"more than {MOST_SOURCES} processes report")
        for key in itertools.chain.from_iterable(tables):
            if key not in self._checked:
                _check_key(key)
                if len(self._checked) < MOST_SOURCES:
                    self._checked.add(key)

    def _own(self, alive: Iterable[_Held]) -> Iterator[tuple[str, Labels, float]]:
        """What only the hub can say: about all ranks together, and about itself."""
        steps: dict[str, list[float]] = {}
        number = 0
        for each in alive:
            number += 1
            own = each.snapshot.gauges.get(("orchestrator_rank_step_seconds", ()))
            if own is not None:
                steps.setdefault(each.snapshot.run, []).append(own)
        for run, times in steps.items():
            # Of two ranks the faster is the measure: the mean of both would hide half of the slower one's lag.
            middle = sorted(times)[(len(times) - 1) // 2]
            if middle > 0:
                yield "orchestrator_straggler_ratio", (run,), max(times) / middle
        yield "orchestrator_hub_sources", (), number
        yield "orchestrator_hub_snapshots_total", (), self._taken
        yield "orchestrator_hub_refused_total", (), self._refused
        yield "orchestrator_hub_start_timestamp_seconds", (), self._started

    def _forget(self, now: float) -> None:
        for place in [place for place, each in self._held.items() if now - each.seen_at > FORGOTTEN_S]:
            del self._held[place]


def serve(board: Board, *, bind: str, port: int, ports: int) -> tuple[int, Callable[[], None]]:
    """Serve ``board`` on the first free of ``ports`` ports from ``port`` on; returns it, and what stops the server.

    Raises:
        OSError: none of them is free, or ``bind`` is no address of this machine.
    """
    registry = CollectorRegistry()
    registry.register(board)
    for candidate in range(port, port + ports):
        try:
            server, thread = start_http_server(candidate, addr=bind, registry=registry)
        except OSError:
            if candidate == port + ports - 1:
                raise
            continue
        break

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return candidate, stop


def _values(held: _Held) -> Iterator[tuple[str, Labels, float | Buckets]]:
    """Metric, labels and value of all that a process said; of one that left, only what is about the run."""
    snapshot, counted = held.snapshot, held.counted
    everything: Iterable[tuple[Key, float | Buckets]] = itertools.chain(
        counted.counters.items(), counted.histograms.items(), held.totals.items(), snapshot.gauges.items()
    )
    for (name, labels), value in everything:
        if KNOWN[name].source == "fleet":
            yield name, labels, value
        elif KNOWN[name].source != "every rank":
            yield name, (snapshot.run, *labels), value
        elif not snapshot.leaving:
            yield name, (snapshot.run, snapshot.source, *labels), value


def _family(metric: Metric, values: Iterable[tuple[Labels, float | Buckets]]) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.all_labels)
        for labels, buckets in values:
            assert isinstance(buckets, tuple)
            *counts, total = buckets
            histogram.add_metric(labels, list(zip(BOUNDS, itertools.accumulate(counts), strict=True)), total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.all_labels)
    for labels, value in values:
        assert not isinstance(value, tuple)
        family.add_metric(labels, value)
    return family


def _check_key(key: Key) -> None:
    name, labels = key
    metric = KNOWN.get(name)
    if metric is None or metric.source == "hub":
        raise RefusedError(f"no process reports a metric {name!r}")
    if len(labels) != len(metric.labels) or any(len(label) > MOST_CHARACTERS for label in labels):
        raise RefusedError(f"{name} has the labels {metric.labels}, each of at most {MOST_CHARACTERS} characters")
