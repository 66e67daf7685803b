"""What a run remembers: how often it measures, what it times, and that JSON gives it back."""

from __future__ import annotations

import json

import pytest

from orchestrator.config import Goodput
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.adaptive import GoodputPolicy
from orchestrator.scheduling.history import History, StepFacts
from orchestrator.scheduling.noise_scale import FEWEST, NoiseSample
from orchestrator.scheduling.reach import Reach
from simulated import Simulation

POLICY = Goodput()
LAYOUT = Layout(2, 8, 1)
SAMPLE = NoiseSample(gradient_sq=1.0, noise_trace=100.0, small_batch=8, small_batches=2)


def facts(step: int, **fields: object) -> StepFacts:
    usual = {"progress": 16.0 * step, "layout": LAYOUT, "nodes": 1, "loss": 1.0, "finite": True, "step_time_s": 0.02}
    return StepFacts(step=step, **{**usual, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(("cost_s", "interval"), [(1e-5, 2), (4e-4, 2), (1.95e-3, 10), (0.02, 100), (1e3, 1000)])
def test_measuring_is_as_frequent_as_its_cost_allows(cost_s: float, interval: int) -> None:
    """A step of 20 ms, of which 1 % may go, once there is an estimate."""
    history = History()
    for step in range(1, 2 * FEWEST, 2):
        history = history.after(facts(step), POLICY)
        measured = facts(step + 1, noise=SAMPLE, noise_cost_s=cost_s, step_time_s=0.02 + cost_s)
        history = history.after(measured, POLICY)
    assert history.noise_scale is not None
    assert history.noise_interval == interval
    assert [step for step in range(1, 3001) if history.measures(step, POLICY)] == list(range(interval, 3001, interval))


def test_before_a_step_has_been_timed_a_quarter_of_a_measured_one_is_taken_to_be_its_own() -> None:
    history = History().after(facts(1, noise=SAMPLE, noise_cost_s=0.03, step_time_s=0.02), POLICY)
    assert history.noise_interval == 600


def test_where_no_cost_counts_the_interval_stays() -> None:
    policy = Goodput(noise_interval_steps=7, noise_cost=1.0)
    history = History().after(facts(7, noise=SAMPLE, noise_cost_s=10.0, step_time_s=10.02), policy)
    assert [step for step in range(1, 30) if history.measures(step, policy)] == [7, 14, 21, 28]


def test_every_second_step_is_measured_until_there_is_an_estimate_but_not_for_long() -> None:
    """Where a measurement gives nothing, as when a step overflows, it is as dear as ever."""
    history = History()
    assert [step for step in range(1, 61) if history.measures(step, POLICY)] == [*range(2, 33, 2), 40, 50, 60]
    seldom = Goodput(noise_interval_steps=20)
    assert [step for step in range(1, 61) if history.measures(step, seldom)] == [*range(4, 33, 4), 40, 60]
    history = history.after(facts(2, noise_cost_s=0.02, step_time_s=0.04), POLICY)
    assert [step for step in range(1, 301) if history.measures(step, POLICY)] == [*range(2, 33, 2), 100, 200, 300]


def test_a_measured_step_is_not_timed_but_for_its_backward_pass() -> None:
    history = History()
    for step in range(1, 8):
        history = history.after(facts(step), POLICY)
    timed = history.times.count(nodes=1, workers=2, micro_batch=8, accumulation=1)
    history = history.after(
        facts(8, noise=SAMPLE, noise_cost_s=0.002, step_time_s=0.5, micro_batch_time_s=0.012), POLICY
    )
    assert history.times.count(nodes=1, workers=2, micro_batch=8, accumulation=1) == timed
    assert history.times.timings()[0].accumulation_time_s == pytest.approx(0.010)


def test_a_discarded_step_teaches_nothing_about_the_loss() -> None:
    history = History().after(facts(1), POLICY)
    assert history.after(facts(2, loss=float("nan"), finite=False), POLICY).trend == history.trend


def test_a_step_whose_measurement_was_dropped_still_tells_its_cost() -> None:
    history = History().after(facts(10, noise=None, noise_cost_s=0.002, finite=False), POLICY)
    assert history.noise_interval is not None
    assert history.noise_scale is None


def test_json_gives_the_history_back() -> None:
    run = Simulation(GoodputPolicy(POLICY, Reach())).run(400)
    assert run.history.change is not None
    assert run.history.noise_scale is not None
    assert History.from_dict(json.loads(json.dumps(run.history.to_dict()))) == run.history
