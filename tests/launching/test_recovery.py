"""What is done about a failure: a pure answer, tested as laws and by its cases."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import FailureConfig
from orchestrator.errors import UnhealthyNodeError
from orchestrator.launching.failures import Failure, describe, to_error
from orchestrator.launching.recovery import Answer, Cause, Trouble, answer

CONFIG = FailureConfig(max_restarts=3, max_preemptions=5)
TROUBLES = st.lists(
    st.builds(
        Trouble,
        cause=st.sampled_from(get_args(Cause)),
        step=st.integers(0, 5),
        node=st.none() | st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=12,
)


def ask(*troubles: Trouble, micro_batch: int = 8, avoidable: Collection[str] = ("a", "b")) -> Answer:
    return answer(troubles, CONFIG, micro_batch=micro_batch, avoidable=avoidable)


def lost(step: int, node: str | None = None) -> Trouble:
    return Trouble("worker_lost", step, node)


@given(TROUBLES)
def test_every_trouble_has_an_answer_and_says_why(troubles: list[Trouble]) -> None:
    given_answer = ask(*troubles)
    assert given_answer.reason
    changes = given_answer.micro_batch is not None or given_answer.avoid != ()
    assert changes == (given_answer.action == "change")


@given(TROUBLES)
def test_what_cannot_go_better_is_not_tried_again(troubles: list[Trouble]) -> None:
    if troubles[-1].cause in ("user", "request", "run"):
        assert ask(*troubles).action == "stop"


@given(TROUBLES, st.integers(6, 9))
def test_progress_fills_every_budget_again(troubles: list[Trouble], further: int) -> None:
    for cause in ("worker_lost", "start", "preempted", "storage", "hang"):
        assert ask(*troubles, Trouble(cause, further)).action == "restart"


@given(st.sampled_from(["worker_lost", "start", "storage", "hang"]), st.integers(0, 10))
def test_without_progress_a_run_ends_after_its_budget(cause: Cause, step: int) -> None:
    actions = [ask(*[Trouble(cause, step)] * count).action for count in range(1, 7)]
    assert actions == ["restart"] * 3 + ["stop"] * 3


def test_preemptions_are_counted_by_themselves() -> None:
    preempted = [Trouble("preempted", 10)] * 5
    assert ask(*preempted).action == "restart"
    assert ask(*preempted, lost(10)).action == "restart"
    assert ask(*preempted, preempted[0]).reason == (
        "nodes were taken away 6 times without progress: more than failures.max_preemptions=5"
    )
    assert ask(*[lost(10)] * 3, *preempted).action == "restart"
    assert ask(*[lost(10)] * 3, *preempted, lost(10)).reason == (
        "workers were lost 4 times without progress: more than failures.max_restarts=3"
    )


def test_workers_lost_at_their_start_are_counted_by_themselves() -> None:
    start = Trouble("start", 10)
    assert ask(*[start] * 3, lost(10)).reason == "workers were lost: restart 1 of 3 without progress"
    assert ask(*[lost(10)] * 3, start).reason == "workers were lost while they started: restart 1 of 3 without progress"
    assert ask(*[start] * 3, lost(10), start).reason == (
        "workers were lost while they started 4 times without progress: more than failures.max_restarts=3"
    )
    again = Trouble("start", 10, "a")
    assert ask(again, again) == Answer("change", "2 failures in a row began on node a", avoid=("a",))


@pytest.mark.parametrize(("micro_batch", "smaller"), [(8, 4), (6, 3), (9, 3), (7, 1), (2, 1)])
def test_out_of_memory_takes_a_smaller_micro_batch_that_divides_the_same_batch(micro_batch: int, smaller: int) -> None:
    told = ask(Trouble("memory", 5), micro_batch=micro_batch)
    assert (told.action, told.micro_batch) == ("change", smaller)
    assert micro_batch % smaller == 0


def test_out_of_memory_with_one_sample_is_the_end() -> None:
    assert ask(Trouble("memory", 5), micro_batch=1) == Answer("stop", "out of memory with a micro batch of 1")


def test_a_node_that_fails_again_is_avoided() -> None:
    assert ask(lost(5, "a")).action == "restart"
    assert ask(lost(5, "a"), lost(5, "a")) == Answer("change", "2 failures in a row began on node a", avoid=("a",))
    assert ask(lost(5, "a"), lost(5, "b")).action == "restart"
    assert ask(lost(5, None), lost(5, None)).action == "restart"
    assert ask(lost(5, "a"), lost(9, "a")).action == "restart", "it did its work in between"
    assert ask(lost(5, "a"), lost(5, "a"), avoidable=["b"]).action == "restart", "there is no room elsewhere"
    preempted = Trouble("preempted", 5, "a")
    assert ask(preempted, preempted).action == "restart", "to be taken away is no fault"


def test_a_slow_node_is_left_where_there_is_room() -> None:
    slow = Trouble("slow", 5, "a")
    assert ask(slow) == Answer("change", "node a is far behind the others", avoid=("a",))
    assert ask(*[lost(5)] * 3, slow).action == "change", "whatever else was lost"
    assert ask(*[slow] * 4, lost(5)).action == "restart", "and it costs nothing of what else may be lost"
    assert [ask(*[slow] * count, avoidable=["b"]).action for count in range(1, 5)] == ["restart"] * 3 + ["stop"]


def test_a_slow_rank_names_its_node() -> None:
    error = UnhealthyNodeError("rank 3 is far behind the others", "a")
    failure = describe(error, rank=3, step=1)
    assert (failure.kind, failure.node, failure.is_collateral) == ("slow", "a", False)
    assert Failure(**json.loads(json.dumps(asdict(failure)))) == failure
    assert (type(to_error(failure)), str(to_error(failure))) == (UnhealthyNodeError, str(error))
