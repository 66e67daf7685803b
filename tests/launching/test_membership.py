"""A run's part in the fleet without a cluster: what it registers, learns from its records, and is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import vision
from orchestrator.config import apply_overrides
from orchestrator.errors import ConfigError, RequestError
from orchestrator.fleet.book import Book, Report
from orchestrator.fleet.fair import FairPolicy
from orchestrator.fleet.view import Allocation, JobView, Nodes
from orchestrator.job import Job
from orchestrator.launching.fleet import FleetSettings, Patient, Seat
from orchestrator.launching.membership import (
    Learned,
    Member,
    registration,
    seated,
    wait_for_devices,
    why_to_move,
)
from orchestrator.launching.planner import make_job_plan
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.layout import Layout
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.records import JsonLines

SHAPE = ClusterShape(nodes=2, cpus=8.0, memory_bytes=2**34)


def job(*overrides: str) -> Job:
    made = vision.mlp()
    words = ("fleet.queue=team-a", "scale.workers=1,8", "policy.name=fixed", *overrides)
    return replace(made, config=apply_overrides(made.config, words))


def planned(given: Job) -> Any:
    return make_job_plan(given, SHAPE, (1437, 360), (None, ""))


def test_a_range_of_workers_need_not_divide_the_batch_in_a_queue() -> None:
    with pytest.raises(ConfigError, match="does not divide over any number"):
        planned(job("fleet.queue=none", "scale.workers=5,7"))
    assert planned(job("scale.workers=5,7", "recipe.batch=65")).layout == Layout(5, 13, 1)
    given = job("fleet.priority=3", "fleet.deadline_s=100")
    plan = planned(given)
    assert plan.layout == Layout(1, 64, 1)
    assert any("the fleet says how many it gets" in reason for reason in plan.reasons)
    facts = registration(given.config, plan, 1000.0)
    assert (facts.workers_range, facts.batch_range, facts.micro_batch_range) == ((1, 8), (64, 64), (1, 64))
    assert (facts.queue, facts.priority, facts.deadline_s) == ("team-a", 3, 1100.0)


def test_a_policy_that_moves_the_batch_says_how_far() -> None:
    given = job("policy.name=goodput")
    assert registration(given.config, planned(given), 0.0).batch_range == (64, 359)
    given = job("policy.name=goodput", "policy.min_batch=32", "policy.max_batch=128", "layout.micro_batch=16")
    facts = registration(given.config, planned(given), 0.0)
    assert (facts.batch_range, facts.micro_batch_range) == ((32, 128), (16, 16))


def test_a_run_is_planned_for_just_the_devices_it_is_given() -> None:
    given, shape = seated(job(), SHAPE, Allocation("cpu", {"n1": 2, "n2": 2}, Layout(4, 16, 1)))
    plan = make_job_plan(given, shape, (1437, 360), (None, ""))
    assert (plan.layout, plan.nodes) == (Layout(4, 16, 1), 2)


def test_a_batch_that_the_devices_do_not_divide_is_the_nearest_that_the_policy_allows() -> None:
    given, shape = seated(job("policy.name=goodput"), SHAPE, Allocation("cpu", {"n1": 3}, Layout(3, 22, 1)))
    assert make_job_plan(given, shape, (1437, 360), (None, "")).layout == Layout(3, 22, 1)


def test_the_book_is_beside_the_runs_unless_it_is_put_elsewhere(tmp_path: Path) -> None:
    assert FleetSettings.of(job(f"checkpoint.uri={tmp_path}").config).uri == str(tmp_path / ".fleet")
    assert FleetSettings.of(job("checkpoint.uri=s3://bucket/runs/").config).uri == "s3://bucket/runs/.fleet"
    assert FleetSettings.of(job("checkpoint.uri=s3://bucket/runs", "fleet.uri=/shared").config).uri == "/shared"


HERE, MORE = Allocation("cpu", {"n1": 1}, Layout(1, 64, 1)), Allocation("cpu", {"n1": 2}, Layout(2, 32, 1))


@pytest.mark.parametrize(
    ("seat", "why"),
    [
        (Seat(HERE, why=("keeps 1 cpu",)), None),
        (Seat(replace(HERE, layout=Layout(1, 32, 2)), ready=True), None),  # only its layout is another
        (Seat(MORE, why=("goes to 2 cpu",)), None),  # somebody holds them still
        (Seat(MORE, why=("goes to 2 cpu",), ready=True), "goes to 2 cpu"),
        (Seat(MORE, why=("goes to 2 cpu",), in_the_way=True), "goes to 2 cpu"),
        (Seat(None, why=("paused",)), "paused"),
        (Seat(None), "its devices are given to others"),
        (Seat(None, refused="the name is taken"), None),
    ],
)
def test_a_run_keeps_what_it_has_until_its_new_devices_are_free_or_others_wait(seat: Seat, why: str | None) -> None:
    assert why_to_move(seat, HERE) == why


class TwoNodes:
    """A fleet of two nodes with two CPUs each, in this process; ``deaf`` while it hears no reports."""

    deaf = False

    def __init__(self, settings: FleetSettings) -> None:
        self.book = Book()

    def ask(self, method: str, *values: Any) -> Any:
        if method == "end":
            return None
        facts, _, report = values
        if facts.name not in self.book.entries:
            self.book = self.book.register(facts, 0.0)
        if report is not None and not TwoNodes.deaf:
            self.book = self.book.report(facts.name, report, 0.0)
        self.book = self.book.decide(FairPolicy(), Nodes({"n1": ("cpu", 2), "n2": ("cpu", 2)}), 0.0)
        return Seat(self.book.told(facts.name), self.book.entries[facts.name].why, ready=True)


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Member]:
    monkeypatch.setattr("orchestrator.launching.membership.FleetClient", TwoNodes)
    monkeypatch.setattr("orchestrator.launching.membership.POLL_S", 0.02)
    monkeypatch.setattr(TwoNodes, "deaf", False)
    folder = RunFolder(tmp_path)
    folder.create()
    given = job("scale.workers=2")
    made = Member(registration(given.config, planned(given), 0.0), FleetSettings.of(given.config), folder, "driver")
    yield made
    made.leave()


def offered(member: Member) -> Allocation:
    told = wait_for_devices(member, lambda _: None, lambda: True)
    assert told is not None
    return told


def test_a_run_that_leaves_a_node_is_offered_another_one(member: Member) -> None:
    first = offered(member)
    member.here = None
    member.avoid(first.devices_per_node)
    second = offered(member)
    assert set(first.devices_per_node) | set(second.devices_per_node) == {"n1", "n2"}
    member.look()
    member.here = None
    assert offered(member) == second, "what it tells later takes nothing back"


def test_a_run_starts_on_no_node_that_it_avoids_whatever_it_is_offered(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = offered(member)
    monkeypatch.setattr(TwoNodes, "deaf", True)
    member.avoid(first.devices_per_node)
    assert wait_for_devices(member, lambda _: None, iter([True] * 4 + [False]).__next__) is None
    monkeypatch.setattr(TwoNodes, "deaf", False)
    assert set(offered(member).devices_per_node).isdisjoint(first.devices_per_node)


def test_each_time_that_its_name_is_taken_a_run_asks_again_for_a_while(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = offered(member)
    refused, free = Seat(None, refused="another run called a is there"), Seat(told, ready=True)
    answers = [free]
    monkeypatch.setattr(TwoNodes, "ask", lambda *_: answers[-1])
    clock = [0.0]
    monkeypatch.setattr("orchestrator.launching.membership.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def hears(seat: Seat, now_s: float) -> Allocation | None:
        answers.append(seat)
        ends_at = time.monotonic() + 240.0
        while member._seat is not seat:
            assert time.monotonic() < ends_at
            time.sleep(0.01)
        clock[0] = now_s
        return member.offer()

    assert hears(refused, 1.0) is None
    assert hears(free, 2.0) == told
    assert hears(refused, 5000.0) is None
    with pytest.raises(RequestError, match="another run called a is there"):
        hears(refused, 5021.0)


@pytest.fixture
def records(tmp_path: Path) -> tuple[RunFolder, Callable[..., None]]:
    folder = RunFolder(tmp_path)
    folder.create()

    def step(number: int, time: float, attempt: int = 1, workers: int = 2, **more: Any) -> None:
        record = {"step": number, "time": time, "attempt": attempt, "progress": 64.0 * number, "length": 6400.0}
        record |= {"workers": workers, "micro_batch": 64 // workers, "accumulation": 1, "step_time_s": 0.1}
        with JsonLines(folder.metrics) as metrics:
            metrics.append({**record, **more})

    with JsonLines(folder.attempts) as attempts:
        attempts.append({"attempt": 1, "event": "started", "step": 0, "nodes": ["n1", "n2"], "time": 0.0})
    return folder, step


def learned_of(request: pytest.FixtureRequest, folder: RunFolder) -> Learned:
    learned = Learned(folder)
    request.addfinalizer(learned.close)
    return learned


def test_what_a_run_has_learned_is_in_its_records(
    records: tuple[RunFolder, Callable[..., None]], request: pytest.FixtureRequest
) -> None:
    folder, step = records
    learned = learned_of(request, folder)
    assert learned.report() == Report(0.0)
    learned.begins(100.0)
    for number in range(1, 21):
        noise = {"noise_cost_s": 1.0, "step_time_s": 9.0, "noise_scale": 300.0} if number % 3 else {}
        step(number, 110.0 + number, **noise)
    learned.look("cpu")
    learned.stopped(2.0)
    found = learned.report()
    assert (found.progress, found.remaining_progress, found.restart_cost_s) == (1280.0, 5120.0, 13.0)
    assert found.step_time is not None
    model = found.step_time["cpu"]
    assert model.step_time_s(nodes=2, workers=2, micro_batch=32, accumulation=1) == pytest.approx(0.1)


def test_noise_and_types_are_told_apart(
    records: tuple[RunFolder, Callable[..., None]], request: pytest.FixtureRequest
) -> None:
    folder, step = records
    learned = learned_of(request, folder)
    for number in range(1, 12):
        step(number, float(number), noise_scale=300.0)
    learned.look("cpu")
    for number in range(12, 24):
        step(number, float(number), noise_scale=310.0, step_time_s=0.01)
    learned.look("A100")
    found = learned.report()
    assert found.noise_scale == 310.0
    times = {
        kind: model.step_time_s(nodes=2, workers=2, micro_batch=32, accumulation=1)
        for kind, model in (found.step_time or {}).items()
    }
    assert times == {"cpu": pytest.approx(0.1), "A100": pytest.approx(0.01)}


def test_a_run_does_not_grow_before_it_was_timed() -> None:
    nodes = Nodes({"n1": ("cpu", 8)})
    here = Allocation("cpu", {"n1": 2}, Layout(2, 32, 1))
    young = JobView(
        name="a",
        submitted_s=0.0,
        age_s=1.0,
        attained_device_s=1.0,
        restarts=0,
        restart_cost_s=1.0,
        progress=0.0,
        remaining_progress=None,
        step_time=None,
        noise_scale=None,
        reference_batch=64,
        batch_range=(64, 64),
        micro_batch_range=(1, 64),
        workers_range=(1, 8),
        current=here,
    )
    impatient, patient = (policy.allocate([young], nodes, 1.0)["a"] for policy in (FairPolicy(), Patient(FairPolicy())))
    assert impatient is not None
    assert impatient.devices > 2
    assert patient == here
