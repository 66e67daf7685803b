"""Equal shares: turns where there are more runs than devices, and who has waited its longest."""

from __future__ import annotations

import pytest

from fleets import NOW_S, job, nodes, running
from orchestrator.fleet import FairPolicy, JobView

FOUR, EIGHT = nodes(gpu=(1, 4)), nodes(gpu=(1, 8))


def devices(policy: FairPolicy, jobs: list[JobView], cluster: dict[str, tuple[str, int]]) -> dict[str, int]:
    answer = policy.allocate(jobs, cluster, NOW_S)
    return {name: one.devices if one else 0 for name, one in answer.items()}


@pytest.mark.parametrize(("age_s", "has"), [(1700.0, 0), (1900.0, 4)])
def test_who_has_waited_longest_goes_before_more_priority(age_s: float, has: int) -> None:
    heavy = running(job("heavy", workers_range=(4, 4), priority=6), {"gpu-00": 4})
    answer = FairPolicy().allocate([heavy, job("light", workers_range=(4, 4), age_s=age_s)], FOUR, NOW_S)
    given = answer["light"]
    assert (given.devices if given else 0) == has
    assert (given is None) == (answer["heavy"] is not None)
    assert given is None or "it had waited its longest" in given.reasons


def test_who_was_let_in_late_has_its_term_and_no_more() -> None:
    heavy = job("heavy", workers_range=(4, 4), priority=6)
    for attained_s, has in ((500.0, 4), (900.0, 0)):
        light = running(
            job("light", workers_range=(4, 4), age_s=1900.0), {"gpu-00": 4}, attained_device_s=4 * attained_s
        )
        assert devices(FairPolicy(), [heavy, light], FOUR) == {"heavy": 4 - has, "light": has}


def test_in_a_crowd_nobody_lacks_who_had_its_equal_share_and_a_new_run_is_first() -> None:
    """Of eight runs on one device each has an eighth of the time, which is less than a quarter of its smallest size."""
    crowd = [job(f"run-{i}", age_s=20_000.0, attained_device_s=2500.0) for i in range(7)]
    crowd[0] = running(crowd[0], {"gpu-00": 1}, attained_device_s=2500.0 + 601.0)
    found = devices(FairPolicy(), [*crowd, job("new", age_s=0.0)], nodes(gpu=(1, 1)))
    assert found == dict.fromkeys(found, 0) | {"new": 1}


def test_who_has_waited_longest_counts_within_its_queue() -> None:
    """It has the devices of its own queue's other run, not those that the other queue is sure of."""
    runs = [
        running(job("mine", workers_range=(4, 4), queue="a", priority=6), {"gpu-00": 4}),
        job("late", workers_range=(4, 4), queue="a", age_s=1900.0),
        job("other", workers_range=(4, 4), queue="b"),
    ]
    assert devices(FairPolicy({"a": 4, "b": 4}), runs, EIGHT) == {"mine": 0, "late": 4, "other": 4}
