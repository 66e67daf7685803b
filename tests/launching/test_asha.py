"""Which trials of a search go on, whatever comes when, and what is said of them; no Ray is started."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_folders import has_run, trials_in

from orchestrator.launching.asha import Halving
from orchestrator.launching.trials import Trials
from orchestrator.scheduling.halving import FACTOR, SHARES, Standing, goes_on, goes_on_at_last


def test_a_trial_stands_by_the_best_value_up_to_each_rung(tmp_path: Path) -> None:
    trials, grows = trials_in(tmp_path), trials_in(tmp_path, grows=True)
    for name, values, of, state, stands in (
        ("begun", [], 9, "stopped", ()),
        ("first", [0.9, 0.5], 9, "stopped", (0.9,)),
        ("second", [0.9, 0.5, 0.7], 9, "stopped", (0.9, 0.5)),
        ("seldom", [0.8, 0.6], 3, "stopped", (0.8, 0.8)),
        ("finished", [0.9, math.nan, 0.7, 0.6, 0.5, 0.4, 0.5, 0.6, 0.7], 9, "finished", (0.9, 0.7, 0.4)),
        ("early", [0.9, 0.5, 0.2], 9, "finished", (0.9, 0.2, 0.2)),
        ("nothing", [math.nan], 9, "stopped", (math.inf,)),
    ):
        has_run(trials, name, values, of=of, state=state)
        assert trials.standing(name) == Standing(name, stands)
    assert grows.standing("finished").losses == (-0.9, -0.9, -0.9)
    assert not trials.standing("first", running=True).may_go_on
    trials.end("second", "failed", "nan")
    assert trials.standing("second") == Standing("second", (0.9, 0.5, math.inf), may_go_on=False)


class Search:
    """A search without Ray Tune: what it asks, and runs that end at once, each at the share that it was given."""

    def __init__(self, trials: Trials, values: Sequence[float], more: Any = None, count: int = 0) -> None:
        self.trials = trials
        self.told: list[str] = []
        self.ran: list[tuple[str, float]] = []
        for index, value in enumerate(values):
            trials.keep(f"trial-{index:03d}", {"value": value})
        self.halving = Halving(trials, max(count, len(values)), more, self.told.append)

    def start(self) -> tuple[str, str, float] | None:
        """What Ray Tune is told to run, with a number of its own."""
        number = str(len(self.ran))
        chosen = self.halving.suggest(number)
        if not isinstance(chosen, dict):
            return None
        self.ran.append((chosen["trial"], chosen["share"]))
        return number, chosen["trial"], chosen["share"]

    def end(self, started: tuple[str, str, float]) -> None:
        number, name, share = started
        value = float(self.trials.settings(name)["value"])
        has_run(self.trials, name, [value] * math.ceil(9 * share), state="finished" if share == 1.0 else "stopped")
        self.halving.on_trial_complete(number)

    def run(self) -> Search:
        """One trial after the other, to the end."""
        while (started := self.start()) is not None:
            self.end(started)
        return self


def test_the_best_quarter_so_far_goes_on_and_one_comes_to_the_end(tmp_path: Path) -> None:
    done = Search(trials_in(tmp_path), [5.0, 4.0, 6.0, 3.0, 4.5, 2.0]).run()
    first, second = SHARES[:2]
    assert [(int(name[-3:]), share) for name, share in done.ran] == [
        *((index, first) for index in range(4)),
        (3, second),  # the best of four
        *((index, first) for index in (4, 5)),
        (5, second),  # the best of six is another one
        (5, 1.0),  # nobody is in a best quarter of two, and nothing else is left to do
    ]
    assert done.told[3:6] == [
        "trial-003: loss 3 after 11% of its length",
        "trial-003 goes on: in the best 1 of 4 so far",
        "trial-003: loss 3 after 33% of its length",
    ]
    assert done.told[-2:] == ["trial-005 goes on: the best of all", "trial-005: loss 2 after 100% of its length"]
    assert Search(trials_in(tmp_path), []).run().ran == [], "the same search again has nothing left to do"


@given(
    values=st.lists(st.integers(1, 1000), min_size=2, max_size=80, unique=True),
    together=st.integers(1, 6),
    draws=st.randoms(use_true_random=False),
    killed_after=st.integers(0, 60),
)
@settings(max_examples=60)
def test_a_search_ends_with_a_good_one_whatever_comes_when_and_however_often_it_is_killed(
    values: list[int], together: int, draws: Any, killed_after: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trials = trials_in(Path(folder))
        search, running, ended = Search(trials, values), [], 0  # type: ignore[var-annotated]
        while True:
            while len(running) < together and (started := search.start()) is not None:
                running.append(started)
            if not running:
                break
            assert len({name for _, name, _ in running}) == len(running), "no trial runs twice at a time"
            search.end(running.pop(draws.randrange(len(running))))
            ended += 1
            if ended == killed_after:  # with all that runs; what was not recorded is gone
                search, running = Search(trials, values), []
        standings = [trials.standing(name) for name in trials.names()]
        came = [sum(len(one.losses) > rung for one in standings) for rung in range(3)]
        assert came[0] == len(values)
        assert came[1] >= max(1, came[0] // FACTOR)
        assert came[2] >= max(1, came[1] // FACTOR)
        at_the_end = [one.losses[0] for one in standings if len(one.losses) == 3]
        assert min(at_the_end) == min(values), "values do not change on the way, so the best is never left"


def test_the_highest_rung_goes_first() -> None:
    low = [Standing(f"low-{index}", (float(index),)) for index in range(4)]
    high = [Standing(f"high-{index}", (9.0, float(index))) for index in range(FACTOR)]
    found = goes_on([*low, *high])
    assert found is not None
    assert found.name == "high-0"
    found = goes_on([*low, *high[1:]])
    assert found is not None
    assert found.name == "low-0", "one of three is no quarter"


def test_what_measured_nothing_does_not_go_on() -> None:
    nothing = [Standing(f"trial-{index}", (math.inf,)) for index in range(FACTOR)]
    assert goes_on(nothing) is goes_on_at_last(nothing) is None
    assert goes_on([*nothing, Standing("one", (1.0,))]) == Standing("one", (1.0,))


def test_a_trial_that_breaks_goes_on_no_more_and_another_does(tmp_path: Path) -> None:
    search = Search(trials_in(tmp_path), [1.0, 2.0, 3.0, 4.0])
    for _ in range(4):
        search.end(search.start())  # type: ignore[arg-type]
    number, name, _ = search.start()  # type: ignore[misc]
    search.trials.end(name, "failed", "the loss is nan\nat step 30")
    search.halving.on_trial_complete(number)
    assert search.told[-1] == "trial-000 ended: the loss is nan"
    assert search.run().ran[5:] == [("trial-001", 1 / 3), ("trial-001", 1.0)]
    assert [trial.state for trial in search.trials.ranked()] == ["failed", "finished", "ended early", "ended early"]


@pytest.mark.parametrize(("state", "how"), [("finished", "failed"), ("stopped", "lost")])
def test_a_trial_that_was_not_evaluated_is_not_tried_for_ever(tmp_path: Path, state: str, how: str) -> None:
    search = Search(trials_in(tmp_path), [1.0])
    number, name, _ = search.start()  # type: ignore[misc]
    has_run(search.trials, name, [], state=state)
    search.halving.on_trial_complete(number)
    assert search.start() is None
    assert search.trials.state(name) == how
    assert search.told == [f"trial-000 ended: it was {'never evaluated' if how == 'failed' else 'stopped'}"]


def test_a_process_that_fails_is_said_and_its_trial_tried_by_the_next_search(tmp_path: Path) -> None:
    search = Search(trials_in(tmp_path), [1.0, 2.0])
    number, *_ = search.start()  # type: ignore[misc]
    search.halving.on_trial_complete(number, None, True)
    assert search.told == [f"trial-000 ended: its process failed: see {tmp_path / 'ray' / 'search'}"]
    assert {name for name, _ in search.run().ran[1:]} == {"trial-001"}
    search.trials.begin("trial-000")
    assert Search(search.trials, []).run().ran[0] == ("trial-000", SHARES[0])


def test_a_searcher_draws_what_is_missing_and_hears_of_its_own_first_rungs(tmp_path: Path) -> None:
    heard: list[Any] = []
    draws: Any = SimpleNamespace(
        suggest=lambda _: {"value": 0.123456789}, on_trial_complete=lambda *words: heard.append(words)
    )
    search = Search(trials_in(tmp_path), [1.0, 2.0], draws, count=3).run()
    assert search.trials.settings("trial-002") == {"value": "0.123457"}
    assert search.ran[:3] == [(f"trial-{index:03d}", SHARES[0]) for index in range(3)]
    assert heard == [("2", {"value": 0.123457}, False)]
