"""The hub's books: counters never fall, silence makes ranks disappear, and nothing strange gets in."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.telemetry.hub import FAREWELL_KEPT_S, Board, RefusedError, serve
from orchestrator.telemetry.meter import Counted, Key, Snapshot

STEPS: Key = ("orchestrator_steps_total", ())
OWN: Key = ("orchestrator_rank_step_seconds", ())
TTL_S = 10.0


class Clock:
    """A clock that tests turn."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board(ttl_s=TTL_S, clock=clock)


def said(steps: float = 1.0, *, source: str = "0", started: float = 1.0, attempt: int = 1, **fields: Any) -> Snapshot:
    values: dict[str, Any] = {"own": Counted({STEPS: steps}), "totals": {}, "gauges": {OWN: 0.1}, **fields}
    return Snapshot(run=values.pop("run", "a"), source=source, attempt=attempt, started=started, **values)


def shown(board: Board) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of the page, by name and label values."""
    registry = CollectorRegistry()
    registry.register(board)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def steps_of(board: Board, run: str = "a") -> float | None:
    return shown(board).get(("orchestrator_steps_total", (run,)))


def test_a_restarted_worker_counts_on(board: Board, clock: Clock) -> None:
    board.take(said(5))
    clock.now += 60
    assert steps_of(board) is None, "silent, so it is not shown"
    before = board.take(said(0, started=2.0, attempt=2))
    assert before.counters == {STEPS: 5.0}
    assert steps_of(board) == 5
    board.take(said(3, started=2.0, attempt=2, before=before))
    assert steps_of(board) == 8


def test_a_restarted_hub_learns_what_was_before(board: Board, clock: Clock) -> None:
    before = Counted({STEPS: 5.0})
    board.take(said(3, started=2.0, attempt=2, before=before))
    assert steps_of(board) == 8


def test_a_new_run_of_the_same_name_begins_anew(board: Board) -> None:
    board.take(said(5, leaving=True))
    board.take(said(1, started=9.0))
    assert steps_of(board) == 1


@given(st.lists(st.tuples(st.sampled_from(["step", "restart", "hub", "silence"]), st.integers(0, 9)), max_size=30))
def test_counters_never_fall(events: list[tuple[str, int]]) -> None:
    """Whatever restarts, as long as not worker and hub are lost together."""
    clock = Clock()
    board, steps, started, attempt, truth = Board(ttl_s=TTL_S, clock=clock), 0.0, 1.0, 1, 0.0
    before = board.take(said(0))
    for event, amount in events:
        clock.now += 1
        if event == "step":
            steps, truth = steps + amount, truth + amount
        elif event == "restart":
            steps, started, attempt = 0.0, started + 1, attempt + 1
            before = board.take(said(0, started=started, attempt=attempt))
        elif event == "hub":
            board = Board(ttl_s=TTL_S, clock=clock)
        else:
            clock.now += 100
        before = board.take(said(steps, started=started, attempt=attempt, before=before))
        assert steps_of(board) == truth


def test_totals_of_the_run_never_fall_within_it(board: Board) -> None:
    key: Key = ("orchestrator_lost_seconds_total", ("startup",))
    for value, attempt, expected in ((5.0, 1, 5.0), (4.9, 2, 5.0), (7.0, 2, 7.0), (1.0, 1, 1.0)):
        board.take(said(source="driver", totals={key: value}, attempt=attempt, started=float(attempt), leaving=True))
        assert shown(board)["orchestrator_lost_seconds_total", ("startup", "a")] == expected


def test_a_silent_rank_disappears_and_comes_back(board: Board, clock: Clock) -> None:
    board.take(said(source="0"))
    board.take(said(source="1"))
    clock.now += TTL_S
    board.take(said(source="0"))
    clock.now += 0.1
    assert ("orchestrator_rank_step_seconds", ("1", "a")) not in shown(board)
    assert ("orchestrator_rank_step_seconds", ("0", "a")) in shown(board)
    assert shown(board)["orchestrator_hub_sources", ()] == 1
    board.take(said(source="1"))
    assert ("orchestrator_rank_step_seconds", ("1", "a")) in shown(board)


def test_the_last_word_of_a_run_stays_for_a_while(board: Board, clock: Clock) -> None:
    board.take(said(7, leaving=True))
    clock.now += FAREWELL_KEPT_S
    assert steps_of(board) == 7
    assert ("orchestrator_rank_step_seconds", ("0", "a")) not in shown(board), "the rank itself is gone"
    clock.now += 1
    assert steps_of(board) is None


def test_straggler_ratio_is_against_the_median_rank(board: Board) -> None:
    for rank, own in enumerate((0.1, 0.1, 0.3)):
        board.take(said(source=str(rank), gauges={OWN: own}))
    board.take(said(run="b", gauges={OWN: 0.1}))
    board.take(said(run="b", source="1", gauges={OWN: 0.2}))
    assert shown(board)["orchestrator_straggler_ratio", ("a",)] == pytest.approx(3.0)
    assert shown(board)["orchestrator_straggler_ratio", ("b",)] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("strange", "why"),
    [
        (said(gauges={("nonsense", ()): 1.0}), "no process reports a metric 'nonsense'"),
        (said(gauges={("orchestrator_hub_sources", ()): 1.0}), "no process reports"),
        (said(gauges={("orchestrator_loss", ("x",)): 1.0}), "has the labels"),
        (said(gauges={("orchestrator_evaluation", ("x" * 300,)): 1.0}), "at most 200 characters"),
        (said(gauges={("orchestrator_evaluation", (str(n),)): 1.0 for n in range(1001)}), "more than 1000 series"),
    ],
)
def test_what_is_no_metric_is_refused_and_counted(board: Board, strange: Snapshot, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        board.take(strange)
    assert shown(board)["orchestrator_hub_refused_total", ()] == 1
    assert shown(board)["orchestrator_hub_snapshots_total", ()] == 0


def test_the_late_word_of_an_earlier_incarnation_is_refused(board: Board) -> None:
    board.take(said(1, started=2.0, attempt=2))
    with pytest.raises(RefusedError, match="newer incarnation"):
        board.take(said(9, started=1.0))
    assert steps_of(board) == 1


def test_it_is_served_on_the_first_free_port(board: Board) -> None:
    board.take(said(7))
    first, stop_first = serve(board, bind="127.0.0.1", port=29400, ports=50)
    second, stop_second = serve(board, bind="127.0.0.1", port=first, ports=50)
    try:
        assert second > first
        with urllib.request.urlopen(f"http://127.0.0.1:{second}/metrics", timeout=10) as page:
            assert 'orchestrator_steps_total{run="a"} 7.0' in page.read().decode()
        with pytest.raises(OSError, match="in use"):
            serve(board, bind="127.0.0.1", port=first, ports=1)
    finally:
        stop_first()
        stop_second()


def test_a_histogram_is_cumulative(board: Board) -> None:
    buckets = (1.0, 1.0, 1.0, *[0.0] * 13, 0.5)
    board.take(replace(said(), own=Counted({}, {("orchestrator_step_seconds", ()): buckets})))
    page = shown(board)
    assert page["orchestrator_step_seconds_count", ("a",)] == 3
    assert page["orchestrator_step_seconds_sum", ("a",)] == 0.5
    assert page["orchestrator_step_seconds_bucket", ("0.0025", "a")] == 2


def test_a_fleet_names_the_runs_itself() -> None:
    board = Board(ttl_s=10.0, clock=lambda: 0.0)
    gauges = {("orchestrator_fleet_devices", ("b", "team-a")): 2.0, ("orchestrator_fleet_used_devices", ()): 2.0}
    counted = Counted({("orchestrator_fleet_moves_total", ()): 3.0})
    board.take(said(run="fleet", source="fleet", own=counted, gauges=gauges))
    page = shown(board)
    assert page["orchestrator_fleet_devices", ("team-a", "b")] == 2.0
    assert page["orchestrator_fleet_used_devices", ()] == 2.0
    assert page["orchestrator_fleet_moves_total", ()] == 3.0
