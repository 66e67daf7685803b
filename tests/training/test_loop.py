"""The loop: what ends a run, what it says, and what a step without a finite gradient leaves behind."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo import GlooGroup
from gloo_jobs import Ended, Looking, Rows, Steep, Toy, looking_loop, mlp, new_run, run_loop, take_steps, toy_config
from orchestrator.config import (
    SGD,
    AdamW,
    CheckpointConfig,
    Cosine,
    EvaluationConfig,
    FailureConfig,
    Penalties,
    RunConfig,
    Stop,
)
from orchestrator.planning.layout import Layout
from orchestrator.telemetry.records import Record, read
from orchestrator.training.checkpoint import list_checkpoints
from orchestrator.training.data import Stream

pytestmark = pytest.mark.slow

STAGES = [0, 1, 2, 3]
EIGHT_EACH = Layout(workers=2, micro_batch=8, accumulation=1)
ADAMW = {"optimizer": AdamW(learning_rate=0.01), "penalties": Penalties(weight_decay=0.1), "clip_norm": 0.3}


def config_of(stage: int = 1, precision: str = "fp32", **fields: Any) -> RunConfig:
    recipe = {"stop": Stop(steps=6), **fields.pop("recipe", {})}
    return toy_config(recipe=recipe, layout={"zero_stage": stage, "precision": precision}, **fields)


def poisoned(*steps: int, rank: int = 1, task: type[Toy] = Toy) -> Toy:
    """A task with a NaN among the inputs of one rank in some steps of 16, counted from 1."""
    rows = Rows.made_up(96)
    for step in steps:
        rows.x[Stream(96, 0).indices((step - 1) * 16 + rank * 8, 8)[3]] = math.nan
    return task(mlp, rows)


def metrics(root: Path) -> list[Record]:
    return read(root / "metrics.jsonl")


def agreed(ends: list[Ended]) -> Ended:
    """What both ranks say, which is the same."""
    first, second = (dataclasses.replace(end, weights={}, buffers={}) for end in ends)
    if first.state is not None and second.state is not None:
        assert first.state.to_dict() == second.state.to_dict()
        first, second = (dataclasses.replace(end, state=None) for end in (first, second))
    assert first == second
    return ends[0]


# -- steps without a finite gradient -----------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("precision", "rank"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("fp16", 1)])
def test_a_nan_stops_the_run_and_names_the_last_good_checkpoint(
    two: GlooGroup, tmp_path: Path, stage: int, precision: str, rank: int
) -> None:
    """On all ranks at once, whichever had it in its data."""
    root, driver = new_run(tmp_path / "run")
    config = config_of(stage, precision, recipe=ADAMW, checkpoint=CheckpointConfig(interval_steps=1))
    ended = agreed(two.run(run_loop, config, poisoned(3, rank=rank), root, driver))
    assert ended.error == "NonFiniteLossError"
    last = root / "checkpoints" / "step-00000002"
    assert re.fullmatch(
        r"step 3: loss nan, gradient norm (nan|inf|-1) at learning rate 0\.01; "
        + re.escape(f"the last good checkpoint is {last}. ")
        + r"Lower recipe\.optimizer\.learning_rate, set recipe\.clip_norm, check the data, or allow skipping with "
        r"failures\.skip_nonfinite_steps \(now 0\)",
        ended.message,
    )
    assert list_checkpoints(root / "checkpoints")[-1] == last
    assert [record["skipped"] for record in metrics(root)] == [False, False, True]
    assert all(weight.isfinite().all() for weight in ended.weights.values())


def test_a_nan_before_any_checkpoint(two: GlooGroup, tmp_path: Path) -> None:
    ended = agreed(two.run(run_loop, config_of(), poisoned(1), *new_run(tmp_path / "run")))
    assert "; there is no checkpoint yet. " in ended.message


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("fp32", 2), ("bf16", 2)])
def test_a_skipped_step_leaves_no_trace(two: GlooGroup, stage: int, precision: str, accumulation: int) -> None:
    """Weights, moments, gradients: the steps after it are those of a run that never took it."""
    layout = Layout(2, 8 // accumulation, accumulation)
    config = config_of(stage, precision, recipe=ADAMW)
    ours, clean = (
        two.run(take_steps, config, task, [layout] * 6, [0.01] * 6, leave_out)[0]
        for task, leave_out in ((poisoned(3), None), (Toy(mlp), 2))
    )
    assert ours.applied == [True, True, False, True, True, True]
    assert ours.losses[:2] + ours.losses[3:] == clean.losses
    assert ours.norms[:2] + ours.norms[3:] == clean.norms
    assert not math.isfinite(ours.losses[2])
    assert all(torch.equal(ours.weights[name], weight) for name, weight in clean.weights.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_in_fp16(two: GlooGroup, stage: int) -> None:
    """Leaves another loss scale, and so the same weights but for rounding."""
    config = config_of(stage, "fp16", recipe=ADAMW)
    ours, clean = (
        two.run(take_steps, config, task, [EIGHT_EACH] * 6, [0.01] * 6, leave_out)[0]
        for task, leave_out in ((poisoned(3), None), (Toy(mlp), 2))
    )
    assert ours.applied == [True, True, False, True, True, True]
    assert ours.losses[3:] == pytest.approx(clean.losses[2:], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_allowed_steps_are_skipped(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    root, driver = new_run(tmp_path / "run")
    config = config_of(
        stage,
        recipe=ADAMW,
        failures=FailureConfig(skip_nonfinite_steps=2),
        checkpoint=CheckpointConfig(interval_steps=1),
    )
    ended = agreed(two.run(run_loop, config, poisoned(2, 3, 5), root, driver))
    assert (ended.error, ended.reason) == ("", "length reached")
    assert [record["skipped"] for record in metrics(root)] == [False, True, True, False, True, False]
    assert ended.state is not None
    assert (ended.state.step, ended.state.samples, ended.state.nonfinite_in_a_row) == (6, 96, 0)
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step-00000004", "step-00000006"]


def test_too_many_in_a_row(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    config = config_of(failures=FailureConfig(skip_nonfinite_steps=1))
    ended = agreed(two.run(run_loop, config, poisoned(1, 3, 4), root, driver))
    assert ended.message.startswith("step 4: loss nan, ")
    assert ended.message.endswith("failures.skip_nonfinite_steps (now 1)")


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_may_search_for_its_loss_scale(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    """A finite loss whose scaled gradient overflows is no failure: the scale is halved until it fits."""
    root, driver = new_run(tmp_path / "run")
    config = config_of(stage, "fp16", recipe={"optimizer": SGD(learning_rate=1e-4), "stop": Stop(steps=20)})
    ended = agreed(two.run(run_loop, config, Steep(mlp), root, driver))
    assert (ended.error, ended.reason) == ("", "length reached")
    skipped = [record["skipped"] for record in metrics(root)]
    assert skipped[0]
    assert not any(skipped[14:])
    assert all(record["grad_norm"] > 0 for record in metrics(root) if not record["skipped"])
    assert metrics(root)[-1]["loss"] < metrics(root)[0]["loss"]


# -- what ends a run ---------------------------------------------------------------------------


def test_the_length_ends_a_run_with_an_evaluation_and_a_checkpoint(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    config = config_of(recipe={"stop": Stop(steps=8)})
    ended = agreed(two.run(run_loop, config, task, root, driver))
    assert (ended.reason, ended.stopped) == ("length reached", False)
    assert [(record["step"], record["epoch"]) for record in read(root / "evaluations.jsonl")] == [(6, 1), (8, 8 / 6)]
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step-00000008"]
    assert ended.state is not None
    assert ended.state.evaluation == read(root / "evaluations.jsonl")[-1]["metrics"]
    assert ended.state.evaluated_at == ended.state.progress == 128


def test_an_evaluation_falls_on_the_step_that_passes_its_time(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    config = config_of(recipe={"stop": Stop(steps=8)}, evaluation=EvaluationConfig(every_epochs=0.4))
    two.run(run_loop, config, task, root, driver)
    assert [record["step"] for record in read(root / "evaluations.jsonl")] == [3, 5, 8]  # 2.4, 4.8, 7.2 steps


def test_a_finished_run_that_is_run_again_does_nothing(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    first = two.run(run_loop, config_of(), Toy(mlp), root, driver)[0]
    lines = (root / "metrics.jsonl").read_text()
    second = agreed(two.run(run_loop, config_of(), Toy(mlp), root, driver))
    assert (second.reason, second.state) == ("length reached", first.state)
    assert (root / "metrics.jsonl").read_text() == lines


def test_a_stop_request_finishes_the_step_and_saves(two: GlooGroup, tmp_path: Path) -> None:
    """It reaches rank 0 alone, and all ranks stop after the same step."""
    root, driver = new_run(tmp_path / "run")
    ended = agreed(two.run(run_loop, config_of(), Toy(mlp), root, driver, 3))
    assert (ended.reason, ended.stopped) == ("stop requested", True)
    assert ended.state is not None
    assert ended.state.step == 3
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step-00000003"]


def test_wall_time_ends_a_run(two: GlooGroup, tmp_path: Path) -> None:
    """It is counted over all attempts."""
    root, driver = new_run(tmp_path / "run")
    config = config_of(recipe={"stop": Stop(wall_time_s=0.05)})
    ended = agreed(two.run(run_loop, config, Toy(mlp), root, driver))
    assert (ended.reason, ended.stopped) == ("wall time of 0.05 s reached", False)
    assert ended.state is not None
    times = [record["step_time_s"] for record in metrics(root)]
    assert sum(times[:-1]) < 0.05 <= sum(times) == pytest.approx(ended.state.train_time_s)
    again = agreed(two.run(run_loop, config, Toy(mlp), root, driver))
    assert again.state == ended.state


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({"metric": "loss", "at_most": 100.0}, r"target reached: loss \d\.\d+ <= 100"),
        ({"metric": "accuracy", "at_least": 0.0}, r"target reached: accuracy 0\.\d+ >= 0"),
    ],
)
def test_a_target_ends_a_run(two: GlooGroup, tmp_path: Path, target: dict[str, Any], reason: str) -> None:
    root, driver = new_run(tmp_path / "run")
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    ended = agreed(two.run(run_loop, config_of(recipe={"stop": Stop(steps=100, **target)}), task, root, driver))
    assert re.fullmatch(reason, ended.reason)
    assert ended.state is not None
    assert ended.state.step == 6
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step-00000006"]


def test_a_target_that_is_not_met_does_not(two: GlooGroup, tmp_path: Path) -> None:
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    stop = Stop(steps=7, metric="accuracy", at_least=1.5)
    ended = agreed(two.run(run_loop, config_of(recipe={"stop": stop}), task, *new_run(tmp_path / "run")))
    assert ended.reason == "length reached"


def test_a_target_on_a_metric_that_is_not_there(two: GlooGroup, tmp_path: Path) -> None:
    """Without this a run that only the target ends would never end."""
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    stop = Stop(metric="acuracy", at_least=0.9)
    ended = agreed(two.run(run_loop, config_of(recipe={"stop": stop}), task, *new_run(tmp_path / "run")))
    assert (ended.error, ended.message) == (
        "ConfigError",
        "recipe.stop.metric='acuracy' is none of the task's metrics; did you mean 'accuracy'? valid: accuracy, loss",
    )


# -- what it writes ----------------------------------------------------------------------------


def test_each_step_is_recorded_with_the_rate_it_was_taken_at(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    config = config_of(recipe={"stop": Stop(epochs=1.0), "schedule": Cosine(warmup=1 / 3)})
    two.run(run_loop, config, Toy(mlp), root, driver)
    expected = [0.05, 0.1, *(0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
    assert [record["learning_rate"] for record in metrics(root)] == pytest.approx(expected)
    last = metrics(root)[-1]
    assert {name: last[name] for name in ("step", "samples", "progress", "epoch", "length", "attempt", "skipped")} == {
        "step": 6,
        "samples": 96,
        "progress": 96.0,
        "epoch": 1.0,
        "length": 96.0,
        "attempt": 1,
        "skipped": False,
    }
    assert {name: last[name] for name in ("global_batch", "micro_batch", "accumulation", "workers")} == {
        "global_batch": 16,
        "micro_batch": 8,
        "accumulation": 1,
        "workers": 2,
    }
    assert last["samples_per_s"] == pytest.approx(16 / last["step_time_s"])


def test_steps_that_were_lost_are_recorded_once(two: GlooGroup, tmp_path: Path) -> None:
    """Step 5 was taken after the last checkpoint, and is taken again."""
    root, driver = new_run(tmp_path / "run")
    saves = CheckpointConfig(interval_steps=2)
    broken = poisoned(5)
    two.run(run_loop, config_of(checkpoint=saves), broken, root, driver)
    assert [record["step"] for record in metrics(root)] == [1, 2, 3, 4, 5]
    two.run(run_loop, config_of(checkpoint=saves), Toy(mlp), root, driver)
    assert [record["step"] for record in metrics(root)] == [1, 2, 3, 4, 5, 6]
    assert metrics(root)[4]["skipped"] is False
    assert [(record["event"], record["step"]) for record in read(root / "attempts.jsonl")] == [
        ("started", 0),
        ("started", 4),
    ]


def test_an_attempt_is_on_record_before_any_rank_can_fail_in_it(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    task = Looking(mlp, file=root / "kept.jsonl")
    for seen in two.run(looking_loop, config_of(), task, root, driver):
        assert all(seen), "also where rank 0 is slow to write it"
