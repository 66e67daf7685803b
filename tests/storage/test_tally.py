"""What is told of storage's trouble: nothing before there is a store that has some, then also what did not happen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from orchestrator.storage.tally import OPERATIONS, Tally, Trouble


def test_a_process_without_such_a_store_tells_nothing() -> None:
    tally = Tally()
    assert tally.troubles() == {}
    tally.failed("read")
    assert tally.troubles() == {"read": Trouble(0, 1)}


def test_with_one_every_operation_starts_at_zero() -> None:
    tally = Tally()
    tally.open()
    tally.retried("write")
    assert tally.troubles() == {**dict.fromkeys(OPERATIONS, Trouble(0, 0)), "write": Trouble(1, 0)}


def test_no_count_is_lost_between_threads() -> None:
    tally = Tally()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(tally.retried, "read")
    assert tally.troubles()["read"].retries == 2000
