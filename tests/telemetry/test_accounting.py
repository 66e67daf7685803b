"""The account of a run's wall time: useful and lost are the whole, live as well as from the files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.accounting import Account, account, time_by_part


def started(time: float, step: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event": "started", "time": time, "step": step, **fields}


def took(time: float, step: int, useful: float = 1.0, *, skipped: bool = False, **parts: float) -> dict[str, Any]:
    return {
        "time": time,
        "step": step,
        "step_time_s": useful,
        "skipped": skipped,
        "parts": {"forward": useful, **parts},
    }


def test_an_undisturbed_run() -> None:
    found = account(
        [started(10.0, startup_s=4.0), {"event": "ended", "time": 20.0, "step": 3}],
        [took(12.0, 1), took(14.0, 2, data_wait=0.25), took(17.0, 3, checkpoint=1.5, evaluation=0.25)],
    )
    assert found.began == 6.0
    assert found.useful_s == 3.0
    assert found.lost_s == {"startup": 5.0, "data_wait": 0.25, "checkpoint": 1.5, "evaluation": 0.25, "other": 4.0}
    assert found.goodput_ratio(18.0) == pytest.approx(0.25)
    assert found.attempts == 1


def test_a_lost_worker_costs_repeated_steps_and_the_way_back() -> None:
    """Steps 3 and 4 are lost with the attempt: the driver saw them, the files do not have them any more."""
    attempts = [started(0.0), started(20.0, 2, cause="worker_lost", repeated_s=2.0)]
    kept, lost = [took(2.0, 1), took(3.0, 2)], [took(4.0, 3), took(5.0, 4)]
    after = [took(22.0, 3), took(23.0, 4)]
    for seen in ([*kept, *after], [*kept, *lost, *after]):
        found = account(attempts, seen)
        assert found.useful_s == 4.0
        assert found.lost_s == {"startup": 2.0, "repeated": 2.0, "worker_lost": 15.0}
        assert found.restarts == {"worker_lost": 1}
        assert found.attempts == 2


def test_a_skipped_step_is_no_use() -> None:
    found = account([started(0.0)], [took(1.0, 1), took(2.0, 2, skipped=True)])
    assert (found.useful_s, found.lost_s) == (1.0, {"skipped": 1.0})


def test_parts_add_up_over_the_steps() -> None:
    assert time_by_part([took(1.0, 1, data_wait=0.5), took(2.0, 2, 2.0), {"step": 3}]) == {
        "data_wait": 0.5,
        "forward": 3.0,
    }


def test_before_anything_has_begun() -> None:
    assert Account().goodput_ratio(5.0) is None
    assert account([], [took(1.0, 1)]) == Account()


@given(st.lists(st.tuples(st.booleans(), st.floats(0.01, 9), st.floats(0.0, 9), st.floats(0, 3)), max_size=20))
def test_useful_and_lost_are_the_wall_time(events: list[tuple[bool, float, float, float]]) -> None:
    now, step, found = 5.0, 0, Account().after_attempt(started(5.0, startup_s=1.0))
    for restart, gap, useful, waited in events:
        now += gap
        if restart:
            found = found.after_attempt(started(now, step, cause="worker_lost"))
        else:
            step += 1
            found = found.after_step(took(now, step, useful, data_wait=waited, checkpoint=waited))
    assert found.useful_s + sum(found.lost_s.values()) == pytest.approx(now - 4.0)
    assert all(seconds >= 0 for seconds in found.lost_s.values())
