"""When a run saves: as set, or where saving and repeating together cost the least."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gloo import GlooGroup
from gloo_jobs import Rows, Toy, mlp, new_run, run_loop, toy_config
from orchestrator.config import CheckpointConfig, EvaluationConfig, Stop
from orchestrator.storage.folder import read_json
from orchestrator.telemetry.records import read
from orchestrator.training.cadence import PRIOR_S, Cadence, optimal_interval_s
from orchestrator.training.checkpoint import list_checkpoints

AUTO = CheckpointConfig(interval_s="auto")


def wasted(interval_s: float, cost_s: float, between_failures_s: float) -> float:
    """Expected time over useful time of an endless run (Daly 2006, equation 20, without restart time)."""
    return between_failures_s * math.expm1((interval_s + cost_s) / between_failures_s) / interval_s


@given(st.floats(0.01, 100.0), st.floats(600.0, 1e7))
def test_no_other_interval_loses_notably_less(cost_s: float, between_failures_s: float) -> None:
    ours = wasted(optimal_interval_s(cost_s, between_failures_s), cost_s, between_failures_s)
    for factor in (0.5, 0.8, 1.25, 2.0):
        other = wasted(factor * optimal_interval_s(cost_s, between_failures_s), cost_s, between_failures_s)
        assert ours <= other * (1.0 + 1e-6)


def test_a_save_that_costs_more_than_it_can_save() -> None:
    assert optimal_interval_s(100.0, 50.0) == 50.0


def test_the_interval_follows_cost_and_failures() -> None:
    fresh = Cadence.begin(AUTO, 1000.0, failures=0, lived_s=0.0)
    assert fresh.interval_s(1000.0) == 60.0
    known = fresh.saved(1060.0, 2.0, 0.0)
    assert known.interval_s(1060.0) == pytest.approx(math.sqrt(2 * 2.0 * PRIOR_S), rel=0.02)
    often = Cadence.begin(AUTO, 1000.0, failures=23, lived_s=3600.0).saved(1060.0, 2.0, 0.0)
    assert often.interval_s(1060.0) == pytest.approx(math.sqrt(2 * 2.0 * PRIOR_S / 24), rel=0.03)
    assert known.saved(2000.0, 4.0, 0.0).cost_s == 3.0
    assert not known.due(7, 0.0, 1600.0)
    assert known.due(7, 0.0, 1700.0)


def test_what_is_set_is_kept() -> None:
    cadence = Cadence.begin(CheckpointConfig(interval_s=5.0, interval_steps=10), 0.0, failures=9, lived_s=9.0)
    assert [cadence.due(step, 0.0, 1.0) for step in (9, 10, 11)] == [False, True, False]
    assert cadence.saved(1.0, 100.0, 0.0).due(3, 0.0, 6.0)


def test_by_progress_each_multiple_is_saved_once_whatever_the_steps() -> None:
    settings = CheckpointConfig(interval_s=1000.0, interval_samples=100)
    cadence = Cadence.begin(settings, 0.0, failures=0, lived_s=0.0, progress=130.0)
    seen = []
    for step, progress in enumerate((130.0, 190.0, 205.0, 260.0, 530.0, 590.0, 600.0), start=1):
        if cadence.due(step, progress, 1.0):
            seen.append(progress)
            cadence = cadence.saved(1.0, 0.1, progress + 16.0)  # it is saved after the step
    assert seen == [205.0, 530.0, 600.0]
    assert not cadence.due(9, 695.0, 1.0)
    assert cadence.due(9, 700.0, 1.0)
    assert not cadence.due(9, 700.0, 1.0, uploading=True), "the save before comes first"


def test_a_best_without_a_direction_is_refused() -> None:
    with pytest.raises(ValidationError, match="names no metric and direction: write accuracy:max or loss:min"):
        CheckpointConfig(best="accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("best", ["loss:min", "loss:max"])
def test_the_best_is_saved_and_outlives_the_newer_ones(two: GlooGroup, tmp_path: Path, best: str) -> None:
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    config = toy_config(
        recipe={"stop": Stop(steps=24)},
        evaluation=EvaluationConfig(every_epochs=0.5),
        checkpoint=CheckpointConfig(interval_steps=4, keep=1, best=best),
    )
    root, driver = new_run(tmp_path / "run")
    two.run(run_loop, config, task, root, driver)
    states = [read_json(path / "manifest.json")["state"] for path in list_checkpoints(root / "checkpoints")]
    found = {record["metrics"]["loss"]: record["step"] for record in read(root / "evaluations.jsonl")}
    best_loss = (min if best.endswith("min") else max)(found)
    assert states[-1]["step"] == 24
    assert {state["step"] for state in states} == {24, found[best_loss]}
    assert states[0]["evaluation"]["loss"] == states[0]["best"] == states[-1]["best"] == best_loss


@pytest.mark.slow
def test_a_run_that_pauses_stops_at_an_evaluation_and_goes_on_as_if_it_had_not(two: GlooGroup, tmp_path: Path) -> None:
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    config = toy_config(recipe={"stop": Stop(epochs=2)}, evaluation=EvaluationConfig(every_epochs=0.5))
    whole, driver = new_run(tmp_path / "whole")
    two.run(run_loop, config, task, whole, driver)
    evaluated = [record["progress"] for record in read(whole / "evaluations.jsonl")]
    root, driver = new_run(tmp_path / "paused")
    between = (evaluated[1] + evaluated[2]) / 2
    (paused, _) = two.run(run_loop, config, task, root, driver, None, between)
    assert (paused.stopped, paused.state.progress) == (True, evaluated[2])
    (ended, _) = two.run(run_loop, config, task, root, driver)
    assert not ended.stopped
    assert [record["progress"] for record in read(root / "evaluations.jsonl")] == evaluated
    first, again = ([record["loss"] for record in read(each / "metrics.jsonl")] for each in (whole, root))
    assert again == first


@pytest.mark.slow
def test_a_best_of_no_metric(two: GlooGroup, tmp_path: Path) -> None:
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    ends = two.run(
        run_loop, toy_config(checkpoint=CheckpointConfig(best="acuracy:max")), task, *new_run(tmp_path / "run")
    )
    assert ends[0].message == (
        "checkpoint.best='acuracy' is none of the task's metrics; did you mean 'accuracy'? valid: accuracy, loss"
    )
