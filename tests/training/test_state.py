"""TrainState: what a step and an evaluation change in it, and its way to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.config import (
    SGD,
    EvaluationConfig,
    Fixed,
    Goodput,
    LayoutConfig,
    Policy,
    Recipe,
    RunConfig,
    ScaleConfig,
    Stop,
)
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.layout import Layout
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.step_time import LayoutTimes, StepTimes
from orchestrator.scheduling.noise_scale import NoiseSample
from orchestrator.training.state import StepStats, TrainState

LAYOUT = Layout(workers=2, micro_batch=4, accumulation=2)
GOOD = StepStats(loss=0.5, grad_norm=1.0, learning_rate=0.1, applied=True, step_time_s=0.25)

numbers = st.floats(allow_infinity=False, allow_nan=False)
counts = st.integers(0, 10**9)
any_number = st.floats()
states = st.builds(
    TrainState,
    layout=st.builds(Layout, st.integers(1, 64), st.integers(1, 64), st.integers(1, 64)),
    step=counts,
    samples=counts,
    progress=numbers,
    learning_rate_factor=numbers,
    loss=any_number,
    train_time_s=numbers,
    nonfinite_in_a_row=counts,
    evaluation=st.none() | st.dictionaries(st.text(max_size=5), any_number, max_size=3),
    evaluated_at=numbers,
)


def config(policy: Policy | None = None, *, every_epochs: float = 1.0, **layout: Any) -> RunConfig:
    return RunConfig(
        name="a",
        recipe=Recipe(batch=16, optimizer=SGD(learning_rate=0.1), stop=Stop(epochs=4)),
        scale=ScaleConfig(workers=2),
        policy=policy or Fixed(),
        layout=LayoutConfig(**layout),
        evaluation=EvaluationConfig(every_epochs=every_epochs),
    )


def plan(wanted: RunConfig | None = None, *, evaluation_samples: int = 10) -> Plan:
    shape = ClusterShape(1, 2)
    return make_plan(wanted or config(), shape, train_samples=1000, evaluation_samples=evaluation_samples)


def after(state: TrainState, *steps: StepStats, of: RunConfig | None = None) -> TrainState:
    wanted = of or config()
    for stats in steps:
        state = state.after(stats, plan(wanted), wanted)
    return state


def test_a_run_starts_at_nothing_in_the_planned_layout() -> None:
    state = TrainState.start(plan(), config())
    assert state == TrainState(layout=Layout(2, 8, 1), loss=state.loss)
    assert math.isnan(state.loss)


def test_a_run_that_may_change_its_batch_starts_with_what_a_probe_timed() -> None:
    known = LayoutTimes(1, 2, 8, 2, steps=1, step_times_s=(0.1,), micro_batch_times_s=(0.04,))
    times, free = StepTimes((known,)), config(policy=Goodput())
    assert TrainState.start(plan(free), free, times).history.times == times
    assert TrainState.start(plan(), config(), times).history.times == StepTimes(), "a fixed batch has no use for it"


def test_a_step_moves_everything_on() -> None:
    before = TrainState(layout=LAYOUT, step=3, samples=48, progress=48.0, train_time_s=1.0, nonfinite_in_a_row=2)
    assert after(before, GOOD) == replace(
        before, step=4, samples=64, progress=64.0, loss=0.5, train_time_s=1.25, nonfinite_in_a_row=0
    )


@pytest.mark.parametrize(
    "stats",
    [
        replace(GOOD, applied=False),
        replace(GOOD, loss=math.nan),
        replace(GOOD, loss=math.inf),
        replace(GOOD, loss=math.nan, applied=False),
    ],
)
def test_a_step_that_was_not_applied_or_has_no_loss_is_counted(stats: StepStats) -> None:
    state = after(TrainState(layout=LAYOUT), GOOD, stats, stats)
    assert (state.step, state.samples, state.nonfinite_in_a_row) == (3, 48, 2)
    assert not stats.finite


def test_an_evaluation_is_dated_by_progress() -> None:
    state = after(TrainState(layout=LAYOUT), GOOD).evaluated({"accuracy": 0.5})
    assert (state.evaluation, state.evaluated_at) == ({"accuracy": 0.5}, 16.0)


@given(st.floats(0.3, 5.0), st.integers(1, 200))
def test_each_multiple_is_evaluated_once(every_epochs: float, steps: int) -> None:
    """At the first step that reaches or passes it; two in one step are one evaluation."""
    wanted = config(every_epochs=every_epochs)
    ours = plan(wanted)
    state, evaluated = TrainState.start(ours, wanted), []
    for _ in range(steps):
        state = state.after(GOOD, ours, wanted)
        if state.evaluation_due(ours):
            state = state.evaluated({})
            evaluated.append(state.progress)
    every = every_epochs * 1000
    expected = [
        16.0 * n for n in range(1, steps + 1) if math.floor(16.0 * n / every) > math.floor(16.0 * (n - 1) / every)
    ]
    assert evaluated == expected


def test_nothing_is_due_without_an_evaluation_set() -> None:
    assert not replace(TrainState.start(plan(), config()), progress=1e6).evaluation_due(plan(evaluation_samples=0))


# -- another batch than the recipe's -----------------------------------------------------------


NOISY = NoiseSample(gradient_sq=1.0, noise_trace=160.0, small_batch=8, small_batches=2)
"""A noise scale of 160 samples: ten reference batches."""


def test_at_the_reference_batch_progress_is_samples_and_the_rate_the_recipes_to_the_bit() -> None:
    wanted = config(Goodput())
    state = after(
        TrainState.start(plan(wanted), wanted), *[replace(GOOD, noise=NOISY, noise_cost_s=1e-3)] * 20, of=wanted
    )
    assert state.history.noise_scale is not None
    assert (state.progress, state.learning_rate_factor) == (320.0, 1.0)


def test_a_larger_batch_is_worth_its_gain_and_raises_the_rate_by_steps() -> None:
    wanted = config(Goodput())
    state = after(
        TrainState.start(plan(wanted), wanted), *[replace(GOOD, noise=NOISY, noise_cost_s=1e-3)] * 20, of=wanted
    )
    assert state.history.noise_scale is not None
    noise = state.history.noise_scale.counted
    assert noise == pytest.approx(160.0)
    state = state.changed("grow", Layout(2, 16, 1))
    gain = (1 + noise / 16) / (1 + noise / 32)
    first = after(state, GOOD, of=wanted)
    assert first.progress - state.progress == pytest.approx(16 * gain)
    assert 1.0 < first.learning_rate_factor < gain
    assert after(first, *[GOOD] * 30, of=wanted).learning_rate_factor == pytest.approx(gain)


def test_a_batch_fixed_elsewhere_starts_at_its_own_rate_and_counts_no_more_than_is_known() -> None:
    wanted = config(global_batch=128)
    state = TrainState.start(plan(wanted), wanted)
    assert state.learning_rate_factor == 4.0  # linear, capped until the noise is known
    assert after(state, GOOD, of=wanted).progress == 64.0


def test_a_change_that_was_taken_back_halves_the_ambition() -> None:
    state = TrainState(layout=LAYOUT).changed("grow", Layout(2, 8, 2)).changed("revert", LAYOUT)
    assert state.layout == LAYOUT
    assert state.history.ambition == 0.5
    assert state.history.change is not None
    assert state.history.change.before == Layout(2, 8, 2)


@given(states)
@example(TrainState(layout=LAYOUT, evaluation={"loss": math.nan, "accuracy": 0.5}))
def test_json_gives_back_what_was_put_in(state: TrainState) -> None:
    """But for infinities, which come back as NaN."""
    text = json.dumps(state.to_dict(), allow_nan=False)
    back = TrainState.from_dict(json.loads(text))
    assert repr(back) == repr(state).replace("-inf", "nan").replace("inf", "nan")
    assert back.to_dict() == state.to_dict()
