"""The step clock: the parts of a lap are its wall time, on a clock that tells at once and on one that tells late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.metrics import PARTS
from orchestrator.training.clock import HostTicker, StepClock, ticker_for


class LateTicker:
    """A device that is behind its host: moments are marked now, and known once ``done`` has passed them."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, 0.0

    def mark(self) -> float:
        return self.now

    def passed(self, mark: Any) -> bool:
        return bool(mark <= self.done)

    def seconds(self, start: Any, end: Any) -> float:
        assert end <= self.done, "read before it was known"
        return float(end - start)


def test_time_belongs_to_the_innermost_part() -> None:
    ticker = LateTicker()
    clock = StepClock(ticker)
    ticker.now = 1.0
    with clock.part("checkpoint"):
        ticker.now = 3.0
        with clock.part("communication"):
            ticker.now = 7.0
        ticker.now = 8.0
    ticker.now = ticker.done = 8.5
    assert clock.lap() == {"communication": 4.0, "checkpoint": 3.0, "other": 1.5}
    assert clock.lap() == {"other": 0.0}


def test_a_part_may_hand_over_to_another_from_within() -> None:
    ticker = LateTicker()
    clock = StepClock(ticker)
    with clock.part("backward"):
        ticker.now = 2.0
        clock.switch("communication")
        ticker.now = 3.0
    ticker.now = ticker.done = 4.0
    assert clock.lap() == {"backward": 2.0, "communication": 1.0, "other": 1.0}


def test_an_error_ends_a_part_too() -> None:
    ticker = LateTicker()
    clock = StepClock(ticker)

    def fail() -> None:
        with clock.part("forward"):
            ticker.now = 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    ticker.now = ticker.done = 3.0
    assert clock.lap() == {"forward": 1.0, "other": 2.0}


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.floats(0, 5), st.floats(0, 1)), max_size=30))
def test_laps_are_the_wall_time_however_late_they_are_known(events: list[tuple[str, float, float]]) -> None:
    ticker = LateTicker()
    clock = StepClock(ticker)
    total = 0.0
    for part, seconds, behind in events:
        with clock.part(part):
            ticker.now += seconds
        ticker.done = max(ticker.done, ticker.now - behind)
        total += sum((clock.lap() or {}).values())
    ticker.done = ticker.now
    total += sum((clock.lap() or {}).values())
    assert total == pytest.approx(ticker.now)


def test_without_a_ticker_it_does_nothing() -> None:
    clock = StepClock(None)
    with clock.part("forward"):
        clock.switch("communication")
    assert clock.lap() is None


def test_a_cpu_is_timed_by_the_host() -> None:
    assert isinstance(ticker_for(torch.device("cpu")), HostTicker)
    clock = StepClock(HostTicker())
    with clock.part("forward"):
        pass
    lap = clock.lap()
    assert lap is not None
    assert set(lap) == {"forward", "other"}
