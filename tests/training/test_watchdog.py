"""A step that never ends is noticed; whatever else takes long is not."""

from __future__ import annotations

import threading
import time

from orchestrator.training.watchdog import Watchdog, stacks

FOREVER_S = 30.0


def test_silence_after_steps_is_told_once() -> None:
    heard, told = threading.Event(), []
    watchdog = Watchdog(lambda text: (told.append(text), heard.set()), factor=3.0, least_s=0.2)
    for _ in range(3):
        watchdog.beat()
        time.sleep(0.01)
    watchdog.beat()
    assert heard.wait(FOREVER_S)
    assert told[0].startswith("no step for 0 s, where 0.01")
    assert len(told) == 1


def test_a_slow_run_is_given_more_time() -> None:
    heard: list[str] = []
    watchdog = Watchdog(heard.append, factor=1000.0, least_s=0.05)
    for _ in range(3):
        watchdog.beat()
        time.sleep(0.02)
    watchdog.beat()
    time.sleep(0.3)
    assert heard == []
    watchdog.close()


def test_nothing_is_told_of_a_rest_nor_after_the_end() -> None:
    heard: list[str] = []
    watchdog = Watchdog(heard.append, factor=1.0, least_s=0.1)
    watchdog.beat()
    watchdog.rest()
    time.sleep(0.3)
    watchdog.beat()
    watchdog.close()
    time.sleep(0.3)
    assert heard == []


def test_without_somebody_to_tell_it_sleeps() -> None:
    watchdog = Watchdog()
    watchdog.beat()
    assert watchdog._thread is None


def test_stacks_name_every_thread() -> None:
    leave = threading.Event()

    def waiting_for_somebody() -> None:
        leave.wait(FOREVER_S)

    thread = threading.Thread(target=waiting_for_somebody)
    thread.start()
    try:
        found = stacks()
    finally:
        leave.set()
        thread.join()
    assert "waiting_for_somebody" in found
    assert "test_stacks_name_every_thread" in found
