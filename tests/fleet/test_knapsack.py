"""The solver is exact: on small instances its answer is worth what the best of all answers is worth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import NOW_S, job, model, nodes
from orchestrator.fleet import GoodputPolicy, knapsack, rating
from orchestrator.fleet.cluster import Shunned
from orchestrator.fleet.knapsack import Problem, solve


@st.composite
def problems(draw: st.DrawFn, kinds: int, queues: int = 0, shunned: int = 0) -> Problem:
    owners = draw(st.integers(1, 5))
    rows = [
        (owner, draw(st.integers(1, 9)), draw(st.integers(0, kinds - 1)), draw(st.integers(-4, 20)) / 2)
        for owner in range(owners)
        for _ in range(draw(st.integers(0, 3)))
    ]
    owner, devices, kind, value = np.array(rows, float).reshape(-1, 4).T
    return Problem(
        owner=owner.astype(int),
        devices=devices.astype(int),
        kind=kind.astype(int),
        value=value,
        idle=np.array([draw(st.sampled_from([0.0, 0.0, -1.0, -100.0])) for _ in range(owners)]),
        capacity=np.array([draw(st.integers(1, 16)) for _ in range(kinds)]),
        queue=np.array([draw(st.integers(0, queues - 1)) if queues else -1 for _ in range(owners)]),
        limit=np.array([draw(st.integers(0, 12)) for _ in range(queues)], int),
        shunned=tuple(
            Shunned(
                draw(st.integers(0, kinds - 1)),
                draw(st.frozensets(st.integers(0, owners - 1))),
                draw(st.integers(0, 9)),
            )
            for _ in range(shunned)
        ),
    )


def worth(problem: Problem, picked: Any) -> float:
    return float(sum(problem.idle[owner] if row < 0 else problem.value[row] for owner, row in enumerate(picked)))


def fits(problem: Problem, picked: Any) -> bool:
    rows = np.array([row for row in picked if row >= 0], int)
    return all(problem.devices[np.intersect1d(rows, inside)].sum() <= size for inside, size in problem.usage)


def brute_force(problem: Problem) -> float:
    choices = [[-1, *np.flatnonzero(problem.owner == owner)] for owner in range(len(problem.idle))]
    return max(worth(problem, picked) for picked in itertools.product(*choices) if fits(problem, picked))


def check(problem: Problem) -> None:
    picked = solve(problem)
    assert all(row < 0 or problem.owner[row] == owner for owner, row in enumerate(picked))
    assert fits(problem, picked)
    assert worth(problem, picked) == pytest.approx(brute_force(problem), abs=1e-6)
    assert list(solve(problem)) == list(picked)


@settings(max_examples=200)
@given(problems(kinds=1))
def test_one_kind_is_solved_exactly(problem: Problem) -> None:
    check(problem)


@settings(max_examples=100)
@given(problems(kinds=3))
def test_several_kinds_are_solved_exactly(problem: Problem) -> None:
    check(problem)


@settings(max_examples=60)
@given(problems(kinds=1, queues=2))
def test_limits_by_queue_are_kept_exactly_on_one_kind(problem: Problem) -> None:
    check(problem)


@settings(max_examples=60)
@given(problems(kinds=2, queues=2))
def test_limits_by_queue_are_kept_exactly_on_several_kinds(problem: Problem) -> None:
    check(problem)


@settings(max_examples=60)
@given(problems(kinds=1, shunned=2) | problems(kinds=2, queues=2, shunned=1))
def test_what_owners_that_avoid_the_same_nodes_have_together_is_kept_exactly(problem: Problem) -> None:
    check(problem)


def crowd(count: int, types: dict[str, float]) -> list[Any]:
    chance = np.random.default_rng(0)
    return [
        job(
            f"run-{index:04}",
            age_s=float(chance.uniform(0.0, 1700.0)),
            remaining_progress=float(chance.lognormal(13.0, 1.5)),
            noise_scale=float(chance.lognormal(7.0, 1.0)),
            step_time={
                kind: model(speed * chance.uniform(0.5, 2.0), chance.uniform(0.01, 0.1))
                for kind, speed in types.items()
            },
            workers_range=(1, 64),
        )
        for index in range(count)
    ]


def test_a_large_cluster_leaves_the_integer_program_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a decision is counted, not timed: rows rated in one pass, few variables left open."""
    counted = {"rated": 0, "passes": 0, "open": 0}
    parts, milp = rating.step_parts, knapsack._milp

    def rate_counting(models: Any, which: Any, *rest: Any) -> Any:
        counted["rated"] += len(which)
        counted["passes"] += 1
        return parts(models, which, *rest)

    def milp_counting(problem: Any, rows: Any, *rest: Any) -> Any:
        counted["open"] += len(rows)
        return milp(problem, rows, *rest)

    monkeypatch.setattr(rating, "step_parts", rate_counting)
    monkeypatch.setattr(knapsack, "_milp", milp_counting)
    types = {"a": 1.0, "b": 1.5, "c": 3.0, "d": 4.0}
    answer = GoodputPolicy().allocate(crowd(400, types), nodes(a=(100, 8), b=(100, 8), c=(100, 8), d=(100, 8)), NOW_S)
    assert sum(one.devices for one in answer.values() if one) > 0.99 * 3200
    assert counted["passes"] == 1
    assert counted["rated"] < 400 * 4 * 200
    assert counted["open"] <= knapsack.EXACT_ROWS + 400
