"""The publisher: what is noted arrives, and a hub that is slow, dead or away costs the one who notes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path, PosixPath

import pytest

from orchestrator.telemetry.hub import Board
from orchestrator.telemetry.meter import Counted, Key, Meter, Snapshot
from orchestrator.telemetry.observing import RunFacts, RunObserver
from orchestrator.telemetry.publisher import Publisher
from orchestrator.training.recorder import _observe_checkpoint

STEPS: Key = ("orchestrator_steps_total", ())


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word may take its time on a busy machine."""
    monkeypatch.setattr("orchestrator.telemetry.publisher.FAREWELL_S", 300.0)


def step(meter: Meter, steps: float = 1.0) -> None:
    meter.count("orchestrator_steps_total", steps)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def publisher(send: Callable[[Snapshot], Counted], attempt: int = 1) -> Publisher:
    return Publisher(send, run="a", source="0", attempt=attempt, interval_s=0.01)


def test_what_is_noted_arrives_and_the_last_word_says_so() -> None:
    sent: list[Snapshot] = []
    board = Board(ttl_s=10)

    def send(snapshot: Snapshot) -> Counted:
        sent.append(snapshot)
        return board.take(snapshot)

    first = publisher(send)
    for _ in range(5):
        first.note(step)
    first.close()
    assert sent[-1].leaving
    assert sent[-1].own.counters[STEPS] == 5
    second = publisher(send, attempt=2)
    second.note(step, steps=2.0)
    until(lambda: sent[-1].attempt == 2 and sent[-1].before is not None)
    second.close()
    assert sent[-1].before is not None
    assert sent[-1].before.counters[STEPS] == 5, "what the hub said of the attempt before, said again"


def test_a_dead_hub_is_tried_again_and_nothing_is_lost() -> None:
    dead = threading.Event()
    dead.set()
    sent: list[Snapshot] = []
    tries: list[int] = []

    def send(snapshot: Snapshot) -> Counted:
        tries.append(1)
        if dead.is_set():
            raise OSError("no hub")
        sent.append(snapshot)
        return Counted()

    under_test = publisher(send)
    under_test.note(step)
    until(lambda: len(tries) > 3)
    dead.clear()
    until(lambda: bool(sent))
    under_test.close()
    assert sent[0].own.counters[STEPS] == 1
    assert sent[0].own.counters["orchestrator_pushes_failed_total", ()] >= 3


def test_a_hub_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.telemetry.publisher.FAREWELL_S", 0.5)
    hang = threading.Event()

    def send(snapshot: Snapshot) -> Counted:
        hang.wait(500)
        return Counted()

    under_test = publisher(send)
    for _ in range(200_000):  # more than is kept
        under_test.note(step)
    under_test.close()
    assert under_test._thread.is_alive(), "it gives up by itself, not when the hub answers"
    hang.set()
    under_test._thread.join()


def test_a_sample_is_taken_for_each_snapshot() -> None:
    sent: list[Snapshot] = []

    def send(snapshot: Snapshot) -> Counted:
        sent.append(snapshot)
        return Counted()

    def sample(meter: Meter) -> None:
        meter.set("orchestrator_device_memory_used_bytes", 7.0)

    under_test = Publisher(send, run="a", source="0", attempt=1, sample=sample, interval_s=0.01)
    until(lambda: bool(sent))
    under_test.close()
    assert sent[0].gauges["orchestrator_device_memory_used_bytes", ()] == 7.0


def test_what_cannot_be_folded_costs_itself_alone_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Snapshot] = []

    def send(snapshot: Snapshot) -> Counted:
        sent.append(snapshot)
        return Counted()

    def broken(_: Meter) -> None:
        raise FileNotFoundError("a checkpoint that is gone")

    under_test = Publisher(send, run="a", source="0", attempt=1, sample=broken, interval_s=0.01)
    for observe in (step, broken, broken, step):
        under_test.note(observe)
    until(lambda: len(sent) > 3)
    under_test.note(step)
    under_test.close()
    assert sent[-1].leaving
    assert sent[-1].own.counters[STEPS] == 3
    (told,) = caplog.records
    assert "a checkpoint that is gone" in str(told.exc_text)


@pytest.mark.parametrize("left", [True, False], ids=["a file is gone", "all of it is gone"])
def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_counts_without_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    saved = tmp_path / "step-00000010"
    if left:
        saved.mkdir()
        monkeypatch.setattr(Path, "rglob", lambda *_: iter([Vanishing(saved / "state.pt")]))
    meter = Meter()
    _observe_checkpoint(meter, RunObserver(RunFacts(64)), saved, 2.0)
    assert meter.counted().counters["orchestrator_checkpoints_total", ()] == 1
    assert meter.gauges()["orchestrator_checkpoint_seconds", ()] == 2.0
    assert ("orchestrator_checkpoint_bytes", ()) not in meter.gauges()


class Vanishing(PosixPath):
    """A file that is deleted between the two looks at it."""

    def is_file(self) -> bool:
        return True
