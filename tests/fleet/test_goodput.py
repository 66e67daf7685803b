"""What the goodput policy weighs: lengths, restarts, priorities, deadlines, quotas, and who has waited."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings

from fleets import NOW_S, fleets, job, model, nodes, running
from orchestrator.fleet import Allocation, GoodputPolicy, JobView
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.rating import options
from orchestrator.fleet.worth import RELUCTANCE, worth

EIGHT = nodes(gpu=(1, 8))


def devices(answer: Mapping[str, Allocation | None]) -> dict[str, int]:
    return {name: one.devices if one else 0 for name, one in answer.items()}


def decide(*jobs: JobView, cluster: Mapping[str, tuple[str, int]] = EIGHT, **settings: float) -> dict[str, int]:
    return devices(GoodputPolicy(**settings).allocate(jobs, cluster, NOW_S))  # type: ignore[arg-type]


def test_alone_a_run_has_what_it_can_use() -> None:
    assert decide(job()) == {"run": 8}


def test_the_shorter_of_two_has_more() -> None:
    runs = job("long", remaining_progress=1e8), job("short", remaining_progress=1e5)
    found = decide(*runs, cluster=nodes(gpu=(1, 6)))
    assert found["short"] > found["long"]


def test_where_lengths_are_unknown_the_one_that_had_less_has_more() -> None:
    old = job("old", remaining_progress=None, progress=1e8, attained_device_s=1e5, age_s=1000.0)
    found = decide(old, job("new", remaining_progress=None), cluster=nodes(gpu=(1, 6)))
    assert found["new"] > found["old"]


def weights(*jobs: JobView, cluster: Mapping[str, tuple[str, int]]) -> dict[str, float]:
    """Of runs that wait: what a second of their work is worth."""
    fleet = Fleet.of(jobs, cluster)
    judged = worth(fleet, options(fleet), NOW_S)
    rated = options(fleet)
    return {
        view.name: float(judged.value[row] / judged.speed[row])
        for view, row in zip(fleet.jobs, rated.starts[:-1], strict=True)
    }


def test_the_shortest_is_waited_for_and_the_last_of_many_counts_more() -> None:
    many = [job(f"run-{index:02}", remaining_progress=1e6 * 1.5**index) for index in range(12)]
    found = list(weights(*many, cluster=nodes(gpu=(8, 8))).values())
    assert found[:8] == sorted(found[:8], reverse=True)
    assert found[-1] > found[-3]
    few = list(weights(*many[-2:], cluster=EIGHT).values())
    assert few[0] > few[1]


def test_a_run_keeps_its_weight_as_it_tries_larger_sizes() -> None:
    step_time = [{"gpu": model(network_s=0.001, timed=size)} for size in (1, 2, 4, 8)]
    found = [weights(job(step_time=one), cluster=nodes(gpu=(2, 8)))["run"] for one in step_time]
    assert max(found) < 2.0 * min(found)


def test_a_stop_must_earn_its_cost() -> None:
    fleet = Fleet.of([running(job(restart_cost_s=0.0), {"gpu-00": 4})], EIGHT)
    judged = worth(fleet, options(fleet), NOW_S)
    assert judged.idle[0] == pytest.approx(-RELUCTANCE * judged.value[judged.stays[0]])


def test_a_run_about_to_end_is_not_moved() -> None:
    short = running(job("short", remaining_progress=2e3), {"gpu-00": 2})
    assert decide(short) == {"short": 2}
    longer = running(job("longer", remaining_progress=1e6), {"gpu-00": 2})
    assert decide(longer) == {"longer": 4 if max_doubling(longer) else 8}


def max_doubling(view: JobView) -> bool:
    """The made-up model says nothing about what was timed, so nothing limits the growth."""
    return not all(getattr(fitted, "most_workers_timed", 0) is None for fitted in (view.step_time or {}).values())


def test_a_dear_restart_is_not_made() -> None:
    cheap = running(job("a", restart_cost_s=10.0), {"gpu-00": 4})
    dear = running(job("a", restart_cost_s=1e5), {"gpu-00": 4})
    assert decide(cheap) == {"a": 8}
    assert decide(dear) == {"a": 4}


def test_a_run_stays_on_its_devices_and_keeps_its_layout() -> None:
    first = GoodputPolicy().allocate([job("a"), job("b")], EIGHT, NOW_S)
    again = [JobView(**(vars(job(name)) | {"current": first[name]})) for name in ("a", "b")]
    assert GoodputPolicy().allocate(again, EIGHT, NOW_S) == first


def test_the_batch_at_most_doubles_at_once() -> None:
    small = running(job("a", noise_scale=1e6), {"gpu-00": 4})
    given = GoodputPolicy().allocate([small], EIGHT, NOW_S)["a"]
    assert given is not None
    assert small.current is not None
    assert given.layout.global_batch <= 2 * small.current.layout.global_batch
    free = GoodputPolicy().allocate([job("a", noise_scale=1e6)], EIGHT, NOW_S)["a"]
    assert free is not None
    assert free.layout.global_batch > given.layout.global_batch


def test_priority_goes_first() -> None:
    full = nodes(gpu=(1, 2))
    plain = [job(f"plain-{index}", remaining_progress=1e5) for index in range(2)]
    assert decide(*plain, job("urgent", remaining_progress=1e6, priority=10), cluster=full)["urgent"] == 2


def test_a_deadline_that_can_be_met_is_met() -> None:
    others = [job(f"other-{index}", remaining_progress=1e5) for index in range(8)]
    late = job("late", remaining_progress=2e6)
    assert decide(late, *others)["late"] <= 1
    alone = GoodputPolicy().allocate([late], EIGHT, NOW_S)["late"]
    assert alone is not None
    fleet = Fleet.of([late], EIGHT)
    least_s = float(worth(fleet, options(fleet), NOW_S).left_s.min())
    due = JobView(**(vars(late) | {"deadline_s": NOW_S + 1.05 * least_s}))
    assert decide(due, *others)["late"] == 8
    hopeless = JobView(**(vars(late) | {"deadline_s": NOW_S + 0.5 * least_s}))
    assert decide(hopeless, *others)["late"] <= 1


def test_who_has_waited_longest_must_run() -> None:
    shorts = [running(job(f"short-{i}", remaining_progress=1e4), {"gpu-00": 1}) for i in range(8)]
    assert decide(*shorts, job("giant", remaining_progress=1e9, age_s=1700.0))["giant"] == 0
    answer = GoodputPolicy().allocate([*shorts, job("giant", remaining_progress=1e9, age_s=1900.0)], EIGHT, NOW_S)
    given = answer["giant"]
    assert given is not None
    assert given.devices == 1
    assert "it had waited its longest" in given.reasons


def test_who_has_no_place_keeps_nobody_from_its_turn() -> None:
    cluster = nodes(gpu=(2, 4))
    wary = job("wary", workers_range=(8, 8), avoid=frozenset({"gpu-00"}), age_s=6000.0)
    heavy = running(job("heavy", workers_range=(4, 8), priority=6), {"gpu-00": 4, "gpu-01": 4})
    patient = job("patient", workers_range=(4, 4), age_s=5000.0)
    answer = GoodputPolicy().allocate([wary, heavy, patient], cluster, NOW_S)
    assert devices(answer) == {"wary": 0, "heavy": 4, "patient": 4}
    assert answer.waiting["wary"] == "needs 8 devices on other nodes than gpu-00, where it has failed"


def test_who_has_no_place_within_its_quota_keeps_nobody_from_its_turn() -> None:
    wide = job("wide", workers_range=(8, 8), queue="other", age_s=6000.0)
    heavy = running(job("heavy", workers_range=(4, 8), queue="a", priority=6), {"gpu-00": 8})
    patient = job("patient", workers_range=(4, 4), queue="a", age_s=5000.0)
    answer = GoodputPolicy(quotas={"a": 8}).allocate([wide, heavy, patient], EIGHT, NOW_S)
    assert devices(answer) == {"wide": 0, "heavy": 4, "patient": 4}


def test_whose_turn_it_is_has_a_place_even_where_only_the_number_of_devices_fits() -> None:
    """Two runs of three leave one device on each node of four."""
    odd = [running(job(f"odd-{i}", workers_range=(3, 3), priority=6), {f"gpu-0{i}": 3}) for i in range(2)]
    patient = job("patient", workers_range=(2, 2), age_s=5000.0)
    answer = GoodputPolicy().allocate([*odd, patient], nodes(gpu=(2, 4)), NOW_S)
    assert sorted(devices(answer).values()) == [0, 2, 3]
    assert devices(answer)["patient"] == 2
    waits = next(name for name in ("odd-0", "odd-1") if answer[name] is None)
    assert answer.waiting[waits] == "there is no room for it without moves that cost more than they gain"


def test_of_those_that_waited_longest_as_many_run_as_fit_on_their_types() -> None:
    late = {"age_s": 5000.0, "workers_range": (3, 3)}
    waiting = [job("a", **late), job("b", **late), job("c", age_s=4900.0, workers_range=(2, 2))]
    answer = GoodputPolicy().allocate(waiting, nodes(gpu=(1, 4), old=(1, 4)), NOW_S)
    assert devices(answer) == {"a": 3, "b": 3, "c": 0}
    assert answer.waiting["c"] == "has waited its longest, as have others that have had less"


def test_a_run_that_was_let_in_late_has_its_term() -> None:
    shorts = [job(f"short-{i}", remaining_progress=1e4) for i in range(8)]
    giant = job("giant", remaining_progress=1e9, age_s=1900.0)
    for attained_s, expected in ((300.0, 1), (10_000.0, 0)):
        assert decide(running(giant, {"gpu-00": 1}, attained_device_s=attained_s), *shorts)["giant"] == expected


def test_quotas_are_lent_and_taken_back() -> None:
    policy = GoodputPolicy(quotas={"a": 4, "b": 4})
    lent = policy.allocate([job("b", queue="b")], EIGHT, NOW_S)
    assert devices(lent) == {"b": 8}
    borrower = JobView(**(vars(job("b", queue="b")) | {"current": lent["b"]}))
    back = policy.allocate([borrower, job("a", queue="a", remaining_progress=1e9)], EIGHT, NOW_S)
    assert devices(back) == {"a": 4, "b": 4}


def test_queues_without_a_quota_share_what_quotas_leave() -> None:
    policy = GoodputPolicy(quotas={"a": 6})
    found = devices(policy.allocate([job("a", queue="a"), job("other", remaining_progress=1e5)], EIGHT, NOW_S))
    assert found == {"a": 6, "other": 2} or found == {"a": 4, "other": 4}


def test_quotas_of_more_than_there_is_shrink_in_proportion() -> None:
    policy = GoodputPolicy(quotas={"a": 16, "b": 16})
    found = devices(policy.allocate([job("a", queue="a"), job("b", queue="b", remaining_progress=1e5)], EIGHT, NOW_S))
    assert found == {"a": 4, "b": 4}


def test_each_run_goes_where_it_is_comparatively_faster() -> None:
    cluster = nodes(gpu=(1, 4), old=(1, 4))
    scales = job("scales", step_time={"gpu": model(10.0), "old": model(1.0)}, workers_range=(4, 4))
    other = job("other", step_time={"gpu": model(2.0), "old": model(1.5)}, workers_range=(4, 4))
    answer = GoodputPolicy().allocate([scales, other], cluster, NOW_S)
    assert {name: one.device_type for name, one in answer.items() if one} == {"scales": "gpu", "other": "old"}


def loses(jobs: list[JobView], cluster: Mapping[str, tuple[str, int]], answer: Mapping[str, Allocation | None]) -> bool:
    """By the model's own numbers: whether the answer is worth less than leaving every run where it is."""
    fleet = Fleet.of(jobs, cluster)
    rated = options(fleet)
    judged = worth(fleet, rated, NOW_S)
    now, then = 0.0, 0.0
    for index, view in enumerate(fleet.jobs):
        stays, answered, here = int(judged.stays[index]), answer[view.name], fleet.current[index]
        now += judged.value[stays] if stays >= 0 else judged.idle[index]
        if answered is None:
            then += judged.idle[index]
            continue
        kind = fleet.types.index(answered.device_type)
        row = next(r for r in rated.of(index) if (rated.kind[r], rated.devices[r]) == (kind, answered.devices))
        then += judged.value[row]
        if row == stays and here is not None and dict(here.devices_per_node) != dict(answered.devices_per_node):
            then -= judged.moving[index]
    return bool(then < now - 1e-6 * max(1.0, abs(now)))


Given = tuple[list[JobView], dict[str, tuple[str, int]]]


def let_in_late(jobs: list[JobView], cluster: Mapping[str, tuple[str, int]], answer: Mapping[str, object]) -> bool:
    """Whether a run without a place is given one because it has waited its longest."""
    fleet = Fleet.of(jobs, cluster)
    waited = [view for view, here in zip(fleet.jobs, fleet.current, strict=True) if here is None]
    return any(answer[view.name] is not None and view.age_s >= 1800.0 for view in waited)


@settings(max_examples=150)
@given(fleets() | fleets(avoiding=True))
def test_no_move_loses_but_to_let_in_who_has_waited_longest(given: Given) -> None:
    """Runs that must run and have a place already are no exception, nor are those that must and find none."""
    jobs, cluster = given
    answer = GoodputPolicy().allocate(jobs, cluster, NOW_S)
    assert let_in_late(jobs, cluster, answer) or not loses(jobs, cluster, answer)


PIECES = {"gpu-0": ("gpu", 3), "gpu-1": ("gpu", 2), "gpu-2": ("gpu", 2)}
IN_PIECES = [  # the larger size that was picked for a-2 has no place but that of a-0
    job("b-0", queue="b", workers_range=(3, 16), remaining_progress=13e3, restart_cost_s=0.0),
    running(job("a-0", queue="a", workers_range=(2, 4), remaining_progress=1.23e6, priority=-2), {"gpu-1": 2}),
    job("a-1", queue="a", workers_range=(2, 2), remaining_progress=10.8e3, restart_cost_s=0.0, priority=-2),
    running(job("b-1", queue="b", workers_range=(3, 4), remaining_progress=3.68e6, restart_cost_s=0.0, priority=2),
            {"gpu-0": 3}),
    running(job("a-2", queue="a", workers_range=(1, 8), remaining_progress=8.09e6, restart_cost_s=0.0), {"gpu-2": 1}),
]  # fmt: skip


@settings(max_examples=100)
@given(given=fleets())
@example(given=(IN_PIECES, PIECES))
def test_with_quotas_no_move_loses_where_nobody_borrows(given: Given) -> None:
    jobs, cluster = given
    capacity = sum(size for _, size in cluster.values())
    quotas = {"a": capacity // 2, "b": capacity - capacity // 2}
    used = dict.fromkeys(("a", "b", "c"), 0)
    for view in jobs:
        used[view.queue] += 0 if view.current is None else view.current.devices
    answer = GoodputPolicy(quotas=quotas).allocate(jobs, cluster, NOW_S)
    if all(used[queue] <= quotas.get(queue, 0) for queue in used) and not let_in_late(jobs, cluster, answer):
        assert not loses(jobs, cluster, answer)


def test_an_owner_takes_back_what_is_worth_more_to_the_borrower() -> None:
    jobs = [running(job("borrower", queue="b", priority=10), {"gpu-00": 8}), job("owner", queue="a")]
    answer = GoodputPolicy(quotas={"a": 4, "b": 4}).allocate(jobs, EIGHT, NOW_S)
    assert devices(answer) == {"borrower": 4, "owner": 4}
    assert loses(jobs, EIGHT, answer)


@pytest.mark.parametrize(("view", "first"), [
    (job(), "starts on 8 gpu"),
    (job(attained_device_s=10.0), "resumes on 8 gpu"),
    (running(job(), {"gpu-00": 8}), "keeps 8 gpu where it is"),
    (running(job(), {"gpu-00": 4}), "goes from 4 gpu to 8 gpu"),
])  # fmt: skip
def test_reasons_say_what_happens(view: JobView, first: str) -> None:
    given = GoodputPolicy().allocate([view], EIGHT, NOW_S)["run"]
    assert given is not None
    assert given.reasons[0] == first
    assert given.reasons[1].startswith("goodput ")
    assert given.reasons[2].endswith(" s left at that")
