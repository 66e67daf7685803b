"""The fleet's book: arrivals, reports, decisions, what people ask for, and all of it written down and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fleets import model, nodes
from orchestrator.errors import ConfigError, RequestError
from orchestrator.fleet import GoodputPolicy
from orchestrator.fleet.book import Book, Registration, Report

EIGHT = nodes(gpu=(1, 8))
POLICY = GoodputPolicy()


def facts(name: str, **changes: Any) -> Registration:
    known: dict[str, Any] = {
        "reference_batch": 64,
        "batch_range": (64, 4096),
        "micro_batch_range": (4, 256),
        "workers_range": (1, 16),
    }
    return Registration(name, **(known | changes))


def report(progress: float = 0.0, remaining: float | None = 1e6) -> Report:
    return Report(progress, remaining, 2000.0, {"gpu": model()}, 30.0)


def with_run(name: str = "a", now_s: float = 0.0, book: Book | None = None, **changes: Any) -> Book:
    return (book or Book()).register(facts(name, **changes), now_s).report(name, report(), now_s)


def test_a_run_arrives_is_given_devices_and_ends() -> None:
    book = with_run()
    assert book.due(EIGHT, 0.0)
    book = book.decide(POLICY, EIGHT, 0.0)
    told = book.told("a")
    assert told is not None
    assert told.devices == 8
    assert not book.due(EIGHT, 59.0)
    assert book.due(EIGHT, 60.0)
    book = book.end("a")
    assert book.due(EIGHT, 10.0)
    book = book.decide(POLICY, EIGHT, 10.0)
    assert not book.entries
    assert not book.due(EIGHT, 1000.0)


def test_what_a_run_has_had_is_counted() -> None:
    book = with_run().decide(POLICY, EIGHT, 0.0)
    book = book.report("a", report(progress=500.0), 100.0)
    assert book.entries["a"].attained_device_s == 800.0
    assert book.entries["a"].view(110.0).attained_device_s == 880.0
    assert book.entries["a"].view(110.0).progress == 500.0


def test_another_place_is_a_restart_and_the_same_one_is_not() -> None:
    book = with_run().decide(POLICY, EIGHT, 0.0).decide(POLICY, EIGHT, 60.0)
    entry = book.entries["a"]
    assert (entry.restarts, entry.since_s) == (0, 0.0)
    book = with_run("b", 120.0, book, workers_range=(1, 4), priority=1).decide(POLICY, EIGHT, 120.0)
    shared = {name: entry.current.devices for name, entry in book.entries.items() if entry.current}
    assert shared == {"a": 4, "b": 4}
    assert (book.entries["a"].restarts, book.entries["a"].since_s) == (1, 120.0)
    assert book.entries["b"].restarts == 0


def test_a_lost_node_asks_for_a_decision() -> None:
    two = nodes(gpu=(2, 8))
    book = with_run().decide(POLICY, two, 0.0)
    assert not book.due(two, 1.0)
    assert book.due(EIGHT, 1.0)
    told = book.decide(POLICY, EIGHT, 1.0).told("a")
    assert told is not None
    assert set(told.devices_per_node) == {"gpu-00"}


def test_a_paused_run_gives_its_devices_back_until_it_is_resumed() -> None:
    book = with_run().decide(POLICY, EIGHT, 0.0).pause("a")
    assert book.due(EIGHT, 1.0)
    book = book.decide(POLICY, EIGHT, 1.0)
    assert book.told("a") is None
    assert book.rows(1.0)[0].state == "paused"
    assert book.rows(1.0)[0].why == ("paused",)
    book = book.resume("a").decide(POLICY, EIGHT, 2.0)
    assert book.told("a") is not None
    assert book.entries["a"].restarts == 1


def test_runs_are_moved_between_queues_and_queues_are_given_quotas() -> None:
    book = with_run("b", book=with_run("a")).move("a", queue="team", priority=3)
    assert (book.entries["a"].facts.queue, book.entries["a"].facts.priority) == ("team", 3)
    assert book.move("a").entries["a"].facts == book.entries["a"].facts
    assert book.quota("team", 4).quotas == {"team": 4}
    assert book.quota("team", 4).quota("team", None).quotas == {}
    with pytest.raises(ConfigError, match="quota of queue team: -1 devices"):
        book.quota("team", -1)


def test_where_people_moved_a_run_it_stays_when_its_driver_comes_back_until_that_says_something_new() -> None:
    moved = with_run("a", priority=1).move("a", priority=5).move("a", queue="team")
    read = Book.from_dict(json.loads(json.dumps(moved.to_dict())), 10.0)
    again = read.register(facts("a", priority=1), 20.0)
    assert (again.entries["a"].facts.queue, again.entries["a"].facts.priority) == ("team", 5)
    again = again.register(facts("a", priority=2), 30.0)
    assert (again.entries["a"].facts.queue, again.entries["a"].facts.priority) == ("default", 2)
    old = moved.to_dict()
    del old["entries"][0]["said"]  # written before it was there
    assert Book.from_dict(old, 0.0).entries["a"].facts.priority == 5


def test_quotas_that_are_given_elsewhere_hold_until_people_set_others() -> None:
    given = {"a": 4, "b": 2}
    book = Book().given_quotas({}, given)
    assert book.quotas == given
    assert book.changed
    by_hand = book.quota("a", 1).quota("b", None)
    assert by_hand.given_quotas(given, given).quotas == {"a": 1}
    assert by_hand.given_quotas(given, {"a": 6, "b": 2}).quotas == {"a": 6}
    assert by_hand.quota("c", 3).given_quotas(given, {}).quotas == {"c": 3}


def test_a_run_that_comes_back_keeps_its_place_and_its_age() -> None:
    book = with_run().decide(POLICY, EIGHT, 0.0)
    again = book.register(facts("a"), 500.0)
    assert again.told("a") == book.told("a")
    assert again.entries["a"].submitted_s == 0.0
    assert not again.changed
    assert book.register(facts("a", workers_range=(1, 4)), 500.0).changed


def test_reports_that_say_less_take_nothing_away() -> None:
    book = with_run().report("a", Report(10.0, 5.0), 1.0)
    known = book.entries["a"].report
    assert (known.progress, known.remaining_progress, known.noise_scale, known.restart_cost_s) == (
        10.0,
        5.0,
        2000.0,
        30.0,
    )
    assert known.step_time == {"gpu": model()}


def test_nodes_to_avoid_ask_for_a_decision_and_are_forgotten_with_the_driver() -> None:
    two = nodes(gpu=(2, 4))
    book = with_run(workers_range=(4, 4)).decide(POLICY, two, 0.0)
    told = book.told("a")
    assert told is not None
    (failed,) = told.devices_per_node
    wary = replace(report(), avoid=frozenset({failed}))
    book = book.report("a", wary, 1.0)
    assert book.due(two, 1.0)
    book = book.decide(POLICY, two, 1.0)
    told = book.told("a")
    assert told is not None
    assert failed not in told.devices_per_node
    assert book.entries["a"].restarts == 1
    assert not book.report("a", wary, 2.0).due(two, 2.0)
    again = book.register(facts("a", workers_range=(4, 4)), 3.0)
    assert again.due(two, 3.0)
    assert again.entries["a"].report == report()


def test_a_silent_run_is_forgotten() -> None:
    book = with_run("b", 1000.0, with_run("a", 0.0))
    assert set(book.forget_silent(1000.0).entries) == {"b"}
    assert book.forget_silent(800.0) is book


def test_the_queue_is_told_in_its_order() -> None:
    book = Book()
    for index, name in enumerate(("first", "second", "third")):
        book = with_run(name, float(index), book, workers_range=(4, 4))
    book = book.decide(POLICY, EIGHT, 10.0)
    rows = book.rows(10.0)
    assert [row.state for row in rows] == ["running", "running", "waiting"]
    assert [row.devices for row in rows] == [4, 4, 0]
    assert rows[0].ends_s is not None
    assert rows[0].ends_s > 10.0
    assert rows[2].ends_s is None
    assert rows[2].why == ("others are worth more on the devices there are",)


def test_what_is_written_down_is_read_back() -> None:
    book = with_run("b", 5.0, with_run("a"), deadline_s=1e5).quota("default", 6).decide(POLICY, EIGHT, 10.0)
    book = book.register(facts("silent"), 11.0).pause("silent")
    book = book.report("silent", Report(0.0, avoid=frozenset({"gpu-01", "gpu-00"})), 12.0)
    saved = json.loads(json.dumps(book.to_dict()))
    read = Book.from_dict(saved, 400.0)
    assert read.changed
    assert {entry.heard_s for entry in read.entries.values()} == {400.0}
    entries = {name: replace(entry, heard_s=read.entries[name].heard_s) for name, entry in book.entries.items()}
    assert read == replace(book, entries=entries, changed=True)
    assert [entry.why for entry in read.entries.values()] == [entry.why for entry in book.entries.values()]
    assert read.decide(POLICY, EIGHT, 400.0).told("a") is not None


def test_a_book_from_before_runs_could_avoid_nodes_is_read() -> None:
    saved = with_run().to_dict()
    del saved["entries"][0]["report"]["avoid"]
    assert Book.from_dict(saved, 0.0).entries["a"].report.avoid == frozenset()


def test_a_book_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"version 7, and this program reads 1: .* move the file away"):
        Book.from_dict({"version": 7}, 0.0)


def test_a_run_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(RequestError, match=r"no run called 'digit' is in the queue: did you mean 'digits'\?"):
        with_run("digits").pause("digit")


def test_a_registration_that_no_policy_could_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run a: workers_range is \(4, 2\)"):
        Book().register(facts("a", workers_range=(4, 2)), 0.0)
