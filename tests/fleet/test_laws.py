"""What holds for every policy, every cluster and every set of runs."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleets import NOW_S, clusters, fleets, job, nodes, running
from orchestrator.errors import ConfigError
from orchestrator.fleet import POLICIES, Allocations, JobView, Policy, make_policy
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.quotas import limits
from orchestrator.fleet.rating import options
from orchestrator.fleet.worth import staying

Given = tuple[list[JobView], dict[str, tuple[str, int]]]
QUOTAS = {"a": 4, "b": 6}
every_policy = pytest.mark.parametrize("name", POLICIES)


@every_policy
@settings(max_examples=120)
@given(given=fleets() | fleets(avoiding=True), quotas=st.sampled_from([None, QUOTAS]))
def test_an_answer_is_possible(name: str, given: Given, quotas: dict[str, int] | None) -> None:
    jobs, cluster = given
    answer = make_policy(name, quotas=quotas).allocate(jobs, cluster, NOW_S)
    assert set(answer) == {view.name for view in jobs}
    assert set(answer.waiting) == {view.name for view in jobs if answer[view.name] is None}
    check_devices(jobs, cluster, answer)


def check_devices(jobs: list[JobView], cluster: dict[str, tuple[str, int]], answer: Allocations) -> None:
    """Never over capacity, within the job's range, one type, no more nodes than needed, a layout that fits."""
    used: dict[str, int] = defaultdict(int)
    largest: dict[str, int] = defaultdict(int)
    for kind, devices in cluster.values():
        largest[kind] = max(largest[kind], devices)
    for view in jobs:
        given = answer[view.name]
        if given is None:
            continue
        low, high = view.workers_range
        assert low <= given.devices <= high
        assert given.devices == given.layout.workers
        assert len(given.devices_per_node) == math.ceil(given.devices / largest[given.device_type])
        assert {cluster[node][0] for node in given.devices_per_node} == {given.device_type}
        assert view.avoid.isdisjoint(given.devices_per_node)
        if given != view.current:
            assert view.batch_range[0] <= given.layout.global_batch <= view.batch_range[1]
            assert view.micro_batch_range[0] <= given.layout.micro_batch <= view.micro_batch_range[1]
        assert given.reasons
        for node, devices in given.devices_per_node.items():
            used[node] += devices
    assert all(devices <= cluster[node][1] for node, devices in used.items())


@every_policy
@settings(max_examples=40)
@given(given=fleets() | fleets(avoiding=True), order=st.randoms(use_true_random=False))
def test_the_same_input_has_the_same_answer_in_any_order(name: str, given: Given, order: Any) -> None:
    jobs, cluster = given
    first = make_policy(name).allocate(jobs, cluster, NOW_S)
    order.shuffle(jobs)
    turned = dict(reversed(cluster.items()))
    again = make_policy(name).allocate(jobs, turned, NOW_S)
    assert first == again
    assert first.waiting == again.waiting
    assert [one and one.reasons for one in first.values()] == [again[key] and again[key].reasons for key in first]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["fair", "goodput"])
@settings(max_examples=60)
@given(given=fleets(most_jobs=7))
def test_nobody_borrows_while_its_owner_could_use_it(name: str, given: Given) -> None:
    """A queue that waits with a run that its quota still has room for: no other queue is above its own."""
    jobs, _ = given
    cluster = nodes(gpu=(2, 8))
    fresh = [JobView(**(vars(view) | {"current": None, "workers_range": (1, view.workers_range[1])})) for view in jobs]
    answer = make_policy(name, quotas={"a": 4, "b": 6, "c": 6}).allocate(fresh, cluster, NOW_S)
    used: dict[str, int] = defaultdict(int)
    for view in fresh:
        used[view.queue] += answer[view.name].devices if answer[view.name] else 0  # type: ignore[union-attr]
    sure = {"a": 4, "b": 6, "c": 6}
    for view in fresh:
        if answer[view.name] is None and used[view.queue] + view.workers_range[0] <= sure[view.queue]:
            assert all(used[queue] <= sure[queue] for queue in sure)


@st.composite
def crowds(draw: st.DrawFn) -> Given:
    """Runs that came one after another, on one or two types: minima, priorities, queues and nodes avoided."""
    cluster = draw(clusters())
    known = draw(st.booleans())
    runs = []
    for index in range(draw(st.integers(1, 8))):
        low = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
        runs.append(
            job(
                f"run-{index}",
                submitted_s=draw(st.sampled_from([0.0, 0.0, 900.0, 6000.0])),
                remaining_progress=10.0 ** (5 + index) if known else None,
                workers_range=(low, draw(st.sampled_from([low, 16]))),
                priority=draw(st.sampled_from([0, 6])),
                queue=draw(st.sampled_from(["a", "b", "c"])),
                avoid=frozenset(draw(st.sets(st.sampled_from(sorted(cluster)), max_size=2))),
            )
        )
    return runs, cluster


def has_a_place(view: JobView, cluster: dict[str, tuple[str, int]]) -> bool:
    """Whether its smallest size would fit if nothing else ran: whole nodes of the largest size, and the rest on one."""
    for kind in {kind for kind, _ in cluster.values()}:
        whole, rest = divmod(view.workers_range[0], max(size for one, size in cluster.values() if one == kind))
        sizes = sorted(size for node, (one, size) in cluster.items() if one == kind and node not in view.avoid)[::-1]
        largest = max(size for one, size in cluster.values() if one == kind)
        if sizes[:whole] == [largest] * whole and (rest == 0 or max(sizes[whole:], default=0) >= rest):
            return True
    return False


def in_rounds(
    name: str, given: Given, quotas: dict[str, int] | None, *, round_s: float, end_s: float, length_s: float = math.inf
) -> dict[str, float]:
    """When each run was first given devices, in s since the start; each ends when it has run ``length_s``."""
    jobs, cluster = given
    policy = make_policy(name, quotas=quotas)
    views = {view.name: view for view in jobs}
    first: dict[str, float] = {}
    ran_s: dict[str, float] = dict.fromkeys(views, 0.0)
    for number in range(int(end_s / round_s) + 1):
        now_s = number * round_s
        here = {key: replace(view, age_s=now_s - view.submitted_s) for key, view in views.items()}
        asked = [view for key, view in here.items() if view.age_s >= 0.0 and ran_s[key] < length_s]
        answer = policy.allocate(asked, cluster, now_s)
        check_devices(asked, cluster, answer)
        for key, one in answer.items():
            devices = 0 if one is None else one.devices
            attained = views[key].attained_device_s + round_s * devices
            views[key] = replace(views[key], current=one, attained_device_s=attained)
            if one is not None:
                first.setdefault(key, now_s)
                ran_s[key] += round_s
    return first


def surely(jobs: list[JobView], cluster: dict[str, tuple[str, int]], quotas: dict[str, int] | None) -> set[str]:
    """Runs that have a place, at a size that is within what their queue is sure of."""
    fleet = Fleet.of(jobs, cluster)
    rated, (queue, limit) = options(fleet), limits(fleet, quotas or {})
    most = [fleet.devices if quotas is None else limit[queue[index]] for index in range(len(jobs))]
    return {
        view.name
        for index, view in enumerate(fleet.jobs)
        if has_a_place(view, cluster) and any(rated.devices[row] <= most[index] for row in rated.of(index))
    }


def starting(*jobs: JobView) -> list[JobView]:
    return [replace(view, submitted_s=0.0) for view in jobs]


IN_THE_WAY = (  # no place for one, who must not keep the last from its turn
    starting(
        job("none", workers_range=(8, 8), avoid=frozenset({"gpu-00"})),
        job("heavy", workers_range=(8, 8), priority=6),
        job("light", workers_range=(4, 4)),
    ),
    nodes(gpu=(2, 4)),
)
IN_PIECES = (  # five devices are free in two pieces, where only one run of two fits beside two of three
    starting(
        *(job(f"odd-{index}", workers_range=(3, 3), priority=6) for index in range(2)),
        job("even", workers_range=(2, 2)),
    ),
    nodes(gpu=(2, 4)),
)
WIDE_BEHIND_SMALL = (  # there is always room for a small one when one ends
    starting(
        job("a", workers_range=(4, 4)),
        *(job(f"wide-{index}", workers_range=(8, 8)) for index in range(2)),
        *(job(f"x-{index}", workers_range=(4, 4)) for index in range(3)),
    ),
    nodes(gpu=(1, 8)),
)
LAST_OF_MANY = (  # the others have long had too little when the last one comes
    [*starting(*(job(f"run-{index}") for index in range(7))), job("last", submitted_s=24_000.0)],
    nodes(gpu=(1, 1)),
)


@pytest.mark.parametrize("name", ["fair", "goodput"])
@settings(max_examples=8)
@given(given=crowds(), quotas=st.sampled_from([None, QUOTAS]))
@example(given=(starting(job("a"), job("b"), job("c", workers_range=(3, 3))), nodes(gpu=(1, 3))), quotas=None)
@example(given=IN_THE_WAY, quotas=None)
@example(given=IN_PIECES, quotas=None)
@example(given=LAST_OF_MANY, quotas=None)
def test_every_run_runs_within_the_bound(name: str, given: Given, quotas: dict[str, int] | None) -> None:
    """None ever ends, and the policy is asked every five minutes: each that has a place has its first turn."""
    jobs, cluster = given
    bound_s = 1800.0 + (600.0 + 300.0) * len(jobs)
    end_s = bound_s + max(view.submitted_s for view in jobs)
    first = in_rounds(name, given, quotas, round_s=300.0, end_s=end_s)
    late = {
        key
        for key, view in ((view.name, view) for view in jobs)
        if first.get(key, math.inf) > bound_s + view.submitted_s
    }
    assert late.isdisjoint(surely(jobs, cluster, quotas))
    assert first.keys() <= surely(jobs, cluster, None)


def in_order(
    jobs: list[JobView], cluster: dict[str, tuple[str, int]], quotas: dict[str, int] | None
) -> list[list[str]]:
    """Runs that wait and have a place, by who is first; a list for each queue that has a quota."""
    fleet = Fleet.of(jobs, cluster)
    rated, queue = options(fleet), limits(fleet, quotas or {})[0]
    stays, found = staying(fleet, rated), defaultdict(list)
    for index in sorted(range(len(jobs)), key=lambda index: (-fleet.jobs[index].priority, index)):
        if stays[index] < 0 and rated.of(index):
            found[queue[index]].append(fleet.jobs[index].name)
    return list(found.values())


WIDE_FIRST = (
    [
        running(job("runs", age_s=900.0), {"gpu-00": 4}),
        job("wide", workers_range=(8, 8)),
        job("x", workers_range=(4, 4)),
    ],
    nodes(gpu=(1, 8)),
)
WIDE_FIRST_OF_QUEUE = ([replace(view, queue="b") for view in WIDE_FIRST[0]], nodes(gpu=(1, 8)))


@settings(max_examples=120)
@given(given=fleets() | fleets(avoiding=True), quotas=st.sampled_from([None, QUOTAS]))
@example(given=WIDE_FIRST, quotas=None)
@example(given=WIDE_FIRST_OF_QUEUE, quotas=QUOTAS)
def test_first_come_is_first_served(given: Given, quotas: dict[str, int] | None) -> None:
    """Who came later, or has less priority, does not start while one before it waits; with quotas, in one queue."""
    jobs, cluster = given
    answer = make_policy("fifo", quotas=quotas).allocate(jobs, cluster, NOW_S)
    for names in in_order(jobs, cluster, quotas):
        started = [answer[name] is not None for name in names]
        assert started == sorted(started, reverse=True)


@settings(max_examples=40)
@given(given=crowds(), quotas=st.sampled_from([None, QUOTAS]))
@example(given=WIDE_BEHIND_SMALL, quotas=None)
def test_first_come_starts_when_all_before_could_have_ended(given: Given, quotas: dict[str, int] | None) -> None:
    """Ten minutes each, one after another; with quotas, those of the other queues as well."""
    jobs, cluster = starting(*given[0]), given[1]
    first = in_rounds("fifo", (jobs, cluster), quotas, round_s=300.0, end_s=600.0 * len(jobs), length_s=600.0)
    for names in in_order(jobs, cluster, quotas):
        for number, name in enumerate(names):
            assert first[name] <= 600.0 * (number if quotas is None else len(surely(jobs, cluster, None)) - 1)


@every_policy
def test_a_lost_node_stops_only_the_runs_on_it(name: str) -> None:
    safe = running(job("safe", remaining_progress=5e5), {"gpu-00": 8})
    hit = running(job("hit"), {"gpu-01": 8})
    answer = make_policy(name).allocate([safe, hit], nodes(gpu=(1, 8)), NOW_S)
    check_devices([safe, hit], nodes(gpu=(1, 8)), answer)
    given = answer["safe"]
    assert given is not None
    assert set(given.devices_per_node) == {"gpu-00"}


@every_policy
def test_who_avoids_nodes_that_are_not_there_has_what_it_had(name: str) -> None:
    runs = [running(job("a"), {"gpu-00": 4}), job("b"), job("c", workers_range=(2, 8))]
    wary = [replace(view, avoid=frozenset({"gone"})) for view in runs]
    policy, cluster = make_policy(name), nodes(gpu=(2, 8))
    assert policy.allocate(wary, cluster, NOW_S) == policy.allocate(runs, cluster, NOW_S)


@every_policy
def test_a_run_leaves_a_node_that_it_avoids_and_another_takes_it(name: str) -> None:
    """Where both nodes are full, the one that does not mind goes to the node that the other one leaves."""
    wary = running(job("wary", workers_range=(8, 8)), {"gpu-00": 8}, avoid=frozenset({"gpu-00"}))
    answer = make_policy(name).allocate([wary, job("other", workers_range=(8, 8))], nodes(gpu=(2, 8)), NOW_S)
    assert {key: dict(one.devices_per_node) for key, one in answer.items() if one is not None} == {
        "wary": {"gpu-01": 8},
        "other": {"gpu-00": 8},
    }
    assert (answer["wary"] or answer["other"]).reasons[0] == "resumes on 8 gpu"  # type: ignore[union-attr]


def test_room_is_made_for_a_run_that_can_be_on_one_node_only() -> None:
    wary = job("wary", workers_range=(8, 8), avoid=frozenset({"gpu-00"}), priority=4)
    settled = running(job("settled", workers_range=(8, 8), restart_cost_s=1.0), {"gpu-01": 8})
    answer = make_policy("goodput").allocate([wary, settled], nodes(gpu=(2, 8)), NOW_S)
    assert {key: dict(one.devices_per_node) for key, one in answer.items() if one is not None} == {
        "wary": {"gpu-01": 8},
        "settled": {"gpu-00": 8},
    }


@pytest.mark.parametrize("name", ["fair", "goodput"])
def test_a_node_that_most_avoid_is_not_kept_idle_for_them(name: str) -> None:
    """A policy that only counted would promise its devices to the two that will not use it."""
    wary = [
        job(f"wary-{index}", workers_range=(4, 4), avoid=frozenset({"gpu-00"}), priority=3, age_s=900.0)
        for index in range(2)
    ]
    answer = make_policy(name).allocate([*wary, job("other", workers_range=(4, 4))], nodes(gpu=(2, 4)), NOW_S)
    assert {key: dict(one.devices_per_node) for key, one in answer.items() if one is not None} == {
        "wary-0": {"gpu-01": 4},
        "other": {"gpu-00": 4},
    }


@every_policy
def test_a_run_that_avoids_all_nodes_large_enough_waits_and_says_so(name: str) -> None:
    wary = job("wary", workers_range=(4, 8), avoid=frozenset({"gpu-00"}))
    answer = make_policy(name).allocate([wary], {"gpu-00": ("gpu", 8), "gpu-01": ("gpu", 2)}, NOW_S)
    assert answer["wary"] is None
    assert answer.waiting["wary"] == "needs 4 devices on other nodes than gpu-00, where it has failed"


@every_policy
def test_a_run_that_the_nodes_cannot_hold_says_so_and_holds_up_nobody(name: str) -> None:
    """Twelve devices there are, but not as one whole node of eight and four more on one other."""
    odd = {"gpu-00": ("gpu", 8), "gpu-01": ("gpu", 2), "gpu-02": ("gpu", 2)}
    wide = job("wide", workers_range=(12, 12), age_s=5000.0)
    answer = make_policy(name).allocate([wide, job("small", workers_range=(8, 8))], odd, NOW_S)
    assert answer["small"] is not None
    assert answer.waiting["wide"] == (
        "needs 12 devices on whole nodes of the largest size and part of one more: the nodes there are do not hold that"
    )


@pytest.mark.parametrize("name", ["fair", "goodput"])
def test_runs_that_avoid_one_node_take_turns_on_the_others(name: str) -> None:
    views = {
        f"run-{index}": job(f"run-{index}", age_s=0.0, workers_range=(4, 4), avoid=frozenset({"gpu-00"}))
        for index in range(3)
    }
    has = dict.fromkeys(views, 0.0)
    for minute in range(180):
        asked = [
            replace(view, submitted_s=10_000.0, age_s=60.0 * minute, attained_device_s=has[name])
            for name, view in views.items()
        ]
        for key, one in make_policy(name).allocate(asked, nodes(gpu=(2, 4)), 10_000.0 + 60.0 * minute).items():
            views[key] = replace(views[key], current=one)
            has[key] += 0.0 if one is None else 60.0 * one.devices
    assert min(has.values()) > 0.2 * sum(has.values())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fifo", "runs that came before it, or have more priority, are first"),
        ("fair", "others with more priority, or less so far, are first"),
        ("goodput", "others are worth more on the devices there are"),
    ],
)
def test_who_waits_is_told_by_which_rule(name: str, why: str) -> None:
    runs = [running(job("first", workers_range=(8, 8), priority=1), {"gpu-00": 8}), job("last", workers_range=(8, 8))]
    assert make_policy(name).allocate(runs, nodes(gpu=(1, 8)), NOW_S).waiting == {"last": why}


@every_policy
def test_an_empty_cluster_and_no_runs_are_no_trouble(name: str) -> None:
    policy: Policy = make_policy(name)
    assert policy.allocate([], nodes(gpu=(1, 8)), NOW_S) == {}
    answer = policy.allocate([job("a"), job("b", workers_range=(4, 8))], {}, NOW_S)
    assert dict(answer) == {"a": None, "b": None}
    assert answer.waiting["b"] == "needs 4 devices of one type, and there are 0"


def test_a_policy_of_another_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no fleet policy is called 'goodputs': did you mean 'goodput'\?"):
        make_policy("goodputs")


@every_policy
@pytest.mark.parametrize("quota", [-1, 2.5])
def test_a_quota_is_a_number_of_devices(name: str, quota: float) -> None:
    with pytest.raises(ConfigError, match=r"quota of queue a: .* whole number, 0 or more"):
        make_policy(name, quotas={"a": quota})  # type: ignore[dict-item]
