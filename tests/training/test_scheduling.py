"""Decisions inside the loop: all ranks take them together, the records tell them, and a restart changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gloo import GlooGroup
from gloo_jobs import Ended, Rows, Toy, mlp, new_run, optimizer_after, run_loop, toy_config
from orchestrator.config import SGD, AdamW, CheckpointConfig, Cosine, Fixed, Goodput, Penalties, Ramp, RunConfig, Stop
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.learning_rate import Scaling
from orchestrator.scheduling.observation import KINDS, Decision
from orchestrator.telemetry.records import read
from orchestrator.training.checkpoint import list_checkpoints
from orchestrator.training.loop import _act
from orchestrator.training.optimizer import carry_second_moment
from orchestrator.training.scheduler import spoken, understood
from orchestrator.training.state import TrainState

slow = pytest.mark.slow
TASK = Toy(mlp, Rows.made_up(960))
RAMP = Ramp(at=(0.0, 0.25, 0.5, 0.75), batches=(16, 32, 24, 64))
ADAMW = {
    "optimizer": AdamW(learning_rate=0.01),
    "penalties": Penalties(weight_decay=0.1),
    "schedule": Cosine(warmup=0.1),
}


def config(policy: Any, stage: int = 1, steps: int = 40, **fields: Any) -> RunConfig:
    recipe = {**ADAMW, "stop": Stop(steps=steps), **fields.pop("recipe", {})}
    return toy_config(recipe=recipe, layout={"zero_stage": stage}, policy=policy, **fields)


def agreed(ends: list[Ended]) -> Ended:
    """What both ranks say, to the last number of their histories."""
    first, second = (end.state for end in ends)
    assert first is not None
    assert second is not None
    assert first.to_dict() == second.to_dict()
    return ends[0]


# -- in the loop -------------------------------------------------------------------------------


@slow
def test_a_ramp_changes_the_batch_and_the_records_tell_it(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    ended = agreed(two.run(run_loop, config(RAMP), TASK, root, driver))
    assert ended.reason == "length reached"
    steps, decisions = read(root / "metrics.jsonl"), read(root / "decisions.jsonl")
    assert list(dict.fromkeys(step["global_batch"] for step in steps)) == [16, 32, 24, 64]
    assert [step["samples"] for step in steps] == list(cumulated(step["global_batch"] for step in steps))
    decided = [d for d in decisions if d["event"] == "decided"]
    assert [d["kind"] for d in decided] == ["ramp"] * 3
    for decision in decided:
        before, after = steps[decision["step"] - 1], steps[decision["step"]]
        assert before["global_batch"] == batch(decision["before"])
        assert after["global_batch"] == batch(decision["layout"])
        assert decision["seen"]["timings"]
    rates = {step["global_batch"]: step["learning_rate_factor"] for step in steps}
    assert rates[16] == 1.0
    assert rates[32] > 1.0  # the rule for AdamW: the root of the gain, on a ramp


def cumulated(batches: Any) -> Any:
    total = 0
    for one in batches:
        total += one
        yield total


def batch(layout: dict[str, int]) -> int:
    return layout["workers"] * layout["micro_batch"] * layout["accumulation"]


@slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stopped_amid_a_ramp_and_gone_on_is_the_run_left_alone(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    """To the bit, in losses, rates and weights, though the noise is measured and beta2 and decay follow the batch.

    The noise is measured at every fifth step here: how often is otherwise a question of time, which no two runs share.
    """
    policy = RAMP.model_copy(update={"noise_interval_steps": 5, "noise_cost": 1.0})
    runs = {}
    for name, stops in {"whole": [None], "parts": [17, 9, None]}.items():
        root, driver = new_run(tmp_path / name)
        for stop in stops:
            ended = two.run(run_loop, config(policy, stage), TASK, root, driver, stop)[0]
        keys = ("step", "loss", "learning_rate", "global_batch")
        runs[name] = [[step[key] for key in keys] for step in read(root / "metrics.jsonl")], ended.weights
    same_history = runs["whole"][0] == runs["parts"][0]
    assert same_history
    assert all(torch.equal(runs["whole"][1][n], runs["parts"][1][n]) for n in runs["whole"][1])


@slow
def test_goodput_decides_alike_on_all_ranks_and_its_history_survives(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    # How often the noise is measured is no question of time here: one slow measurement may be the only one for long.
    policy = Goodput(min_interval_steps=10, max_batch=128, noise_interval_steps=5, noise_cost=1.0)
    wanted = config(policy, steps=600, checkpoint=CheckpointConfig(interval_steps=50))
    ended = agreed(two.run(run_loop, wanted, TASK, root, driver, 60))
    assert ended.stopped
    assert ended.state is not None
    assert ended.state.history.noise_scale is not None
    manifest = json.loads((list_checkpoints(root / "checkpoints")[-1] / "manifest.json").read_text())
    assert repr(TrainState.from_dict(manifest["state"])) == repr(ended.state)
    again = agreed(two.run(run_loop, wanted, TASK, root, driver))
    assert again.reason == "length reached"
    steps = read(root / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert max(step["global_batch"] for step in steps) <= 128
    assert any("noise" in step for step in steps)
    events = [d["event"] for d in read(root / "decisions.jsonl") if d.get("kind") != "settle"]
    assert "measured" in events, "what came of a new layout is never written down"
    progress = [step["progress"] for step in steps]
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(16 * 600, abs=128)


@slow
def test_the_reference_batch_kept_fixed_measures_nothing(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    ended = agreed(two.run(run_loop, config(Fixed(), steps=12), TASK, root, driver))
    assert ended.state is not None
    assert ended.state.history == type(ended.state.history)()
    assert not any("noise_cost_s" in step for step in read(root / "metrics.jsonl"))


@slow
def test_another_fixed_batch_measures_and_follows_the_rule(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    wanted = toy_config(
        recipe={"stop": Stop(steps=60), "optimizer": SGD(learning_rate=0.01)}, layout={"global_batch": 64}
    )
    agreed(two.run(run_loop, wanted, TASK, root, driver))
    steps = read(root / "metrics.jsonl")
    assert {step["global_batch"] for step in steps} == {64}
    assert steps[0]["learning_rate_factor"] == 4.0
    assert any("noise" in step for step in steps)


def test_memory_is_filed_under_the_layout_that_ran() -> None:
    """Also at the step after which it is left: otherwise a large micro batch's peak would count for a small one."""
    noted: list[int] = []
    scheduler = SimpleNamespace(memory=SimpleNamespace(note=noted.append), outcome=lambda *_: None)
    run: Any = SimpleNamespace(scheduler=scheduler, recorder=SimpleNamespace(decision=lambda *_: None))
    state = TrainState(layout=Layout(2, 8, 1))
    left = _act(run, state, state, None, spoken(Decision("explore", Layout(2, 4, 2), "because")))
    _act(run, left, left, None, spoken(None))
    assert noted == [8, 4]


# -- what goes with the rate -------------------------------------------------------------------


@slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_settings_reach_the_optimizer_in_every_stage(two: GlooGroup, stage: int) -> None:
    scaling = Scaling(learning_rate=2.0, beta2=0.99, eps=0.5, weight_decay=3.0)
    wanted = config(Fixed(), stage)
    groups = two.run(optimizer_after, wanted, TASK, [scaling])[0]["groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.99)] * 2
    assert [group["eps"] for group in groups] == [0.5e-8] * 2
    assert sorted(group["decay"] for group in groups) == pytest.approx([0.0, 0.3])
    momentum = two.run(optimizer_after, toy_config(layout={"zero_stage": stage}), TASK, [Scaling(momentum=0.5)])[0][
        "groups"
    ]
    assert {group["momentum"] for group in momentum} == {0.5}


@slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_second_moment_is_carried_over_in_every_stage(two: GlooGroup, stage: int) -> None:
    """After three steps of beta2 = 0.999, the bias-corrected moment is the same under 0.99."""
    kept, carried = (
        two.run(optimizer_after, config(Fixed(), stage), TASK, scalings, 3)[0]["second"]
        for scalings in ([], [Scaling(beta2=0.99)])
    )
    assert kept
    for before, after in zip(kept, carried, strict=True):
        assert torch.allclose(before / (1 - 0.999**3), after / (1 - 0.99**3), rtol=1e-5)


@given(st.floats(0.5, 0.9999), st.floats(0.5, 0.9999), st.integers(1, 500))
def test_carrying_keeps_the_corrected_moment(old: float, new: float, steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    moment = torch.tensor([1.0, 2.0, 3.0])
    optimizer.state[parameter] = {"step": torch.tensor(float(steps)), "exp_avg_sq": moment.clone()}
    carry_second_moment(optimizer, old, new)
    after = optimizer.state[parameter]["exp_avg_sq"]
    assert torch.allclose(after / (1 - new**steps), moment / (1 - old**steps), rtol=1e-4)


# -- words -------------------------------------------------------------------------------------


@given(st.sampled_from(KINDS), st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 64))
def test_what_is_spoken_is_understood(kind: Any, micro_batch: int, accumulation: int, workers: int) -> None:
    layout = Layout(workers, micro_batch, accumulation)
    assert understood(spoken(Decision(kind, layout, "because")), workers) == (kind, layout)
    assert understood(spoken(None), workers) is None
