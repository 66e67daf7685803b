"""A step that never ends is noticed; whatever else takes long is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from orchestrator.training import watchdog as module
from orchestrator.training.watchdog import Watchdog, stacks

FOREVER_S = 240.0


class Clock:
    """The watchdog's clock, turned by tests; ``looks`` counts how often it was read."""

    now, looks = 0.0, 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.now

    def wait_for_looks(self, more: int = 3) -> None:
        """Until the thread has looked again; the first of these looks may be of the time before."""
        wanted = self.looks + more
        until(lambda: self.looks >= wanted)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FOREVER_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def beats(watchdog: Watchdog, clock: Clock, every_s: float) -> None:
    for _ in range(3):
        watchdog.beat()
        clock.now += every_s
    watchdog.beat()


def test_silence_after_steps_is_told_once(clock: Clock) -> None:
    told: list[str] = []
    watchdog = Watchdog(told.append, factor=3.0, least_s=0.2)
    beats(watchdog, clock, 0.01)
    clock.now += 0.25
    assert watchdog._thread is not None
    watchdog._thread.join(FOREVER_S)
    assert told == ["no step for 0 s, where 0.01 s are usual"]


def test_a_slow_run_is_given_more_time(clock: Clock) -> None:
    heard: list[str] = []
    watchdog = Watchdog(heard.append, factor=1000.0, least_s=0.05)
    beats(watchdog, clock, 0.02)
    clock.now += 19.0
    clock.wait_for_looks()
    assert heard == []
    clock.now += 2.0
    until(lambda: bool(heard))


def test_nothing_is_told_of_a_rest_nor_after_the_end(clock: Clock) -> None:
    heard: list[str] = []
    watchdog = Watchdog(heard.append, factor=1.0, least_s=0.1)
    watchdog.beat()
    watchdog.rest()
    clock.now += 100.0
    time.sleep(0.3)  # it looks every 0.025 s; a busy machine makes that less often, and never false
    watchdog.beat()
    watchdog.close()
    assert watchdog._thread is not None
    watchdog._thread.join(FOREVER_S)
    assert not watchdog._thread.is_alive(), "nobody is left who could tell"
    assert heard == []


def test_without_somebody_to_tell_it_sleeps() -> None:
    watchdog = Watchdog()
    watchdog.beat()
    assert watchdog._thread is None


def test_stacks_name_every_thread() -> None:
    leave, there = threading.Event(), threading.Event()

    def waiting_for_somebody() -> None:
        there.set()
        leave.wait(FOREVER_S)

    thread = threading.Thread(target=waiting_for_somebody)
    thread.start()
    try:
        assert there.wait(FOREVER_S)
        found = stacks()
    finally:
        leave.set()
        thread.join()
    assert "waiting_for_somebody" in found
    assert "test_stacks_name_every_thread" in found
