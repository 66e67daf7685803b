"""The guard's judgement: silent on losses that go on as they did, loud on losses that do not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduling.loss_trend import Deviation, LossTrend


def curve(progress: float) -> float:
    """A power law, as training curves are."""
    return 0.5 + 4.0 * progress**-0.3


def trained(
    steps: int, batch: int = 16, seed: int = 0, noise: float = 1.0
) -> tuple[LossTrend, float, np.random.Generator]:
    generator = np.random.default_rng(seed)
    trend, progress = LossTrend(), 0.0
    for _ in range(steps):
        progress += batch
        loss = curve(progress) + noise * generator.standard_normal() / math.sqrt(batch)
        trend = trend.after(progress, loss, batch)
    return trend, progress, generator


def deviate(seed: int, above: float, steps: int = 40, batch: int = 32) -> Deviation:
    """Train on at twice the batch, with the loss ``above`` where it would have been."""
    trend, progress, generator = trained(400, seed=seed)
    deviation = Deviation(trend)
    for _ in range(steps):
        progress += 0.9 * batch
        loss = curve(progress) + above + generator.standard_normal() / math.sqrt(batch)
        deviation = deviation.after(progress, loss, batch)
    return deviation


def test_a_straight_line_is_recovered() -> None:
    trend, generator = LossTrend(), np.random.default_rng(1)
    for step in range(1, 300):
        trend = trend.after(16.0 * step, 3.0 + 0.2 * math.log(16.0 * step) + 0.01 * generator.standard_normal(), 16)
    expected = trend.expected(16.0 * 350)
    assert expected is not None
    value, variance = expected
    assert value == pytest.approx(3.0 + 0.2 * math.log(16.0 * 350), abs=0.01)
    assert 0 < math.sqrt(variance) < 0.01
    assert trend.residual_variance == pytest.approx(1e-4, rel=0.3)


@pytest.mark.parametrize(("slope", "believed"), [(-0.5, 0.5), (0.5, 1.0)])
def test_a_fall_is_believed_by_half_and_a_rise_in_full(slope: float, believed: float) -> None:
    """Curves bend: of a promised fall only half may be held against a change."""
    trend = LossTrend()
    for step in range(1, 300):
        trend = trend.after(16.0 * step, 3.0 + slope * math.log(16.0 * step), 16)
    last, ahead = 16.0 * 299, 16.0 * 400
    expected = trend.expected(ahead)
    assert expected is not None
    promised = slope * math.log(ahead / last)
    assert expected[0] - (3.0 + slope * math.log(last)) == pytest.approx(believed * promised, rel=1e-6)


def test_a_single_samples_variance_is_told_from_batches() -> None:
    for batch in (4, 64):
        trend, _, _ = trained(600, batch, noise=2.0)
        assert trend.sample_variance == pytest.approx(4.0, rel=0.3)


def test_losses_that_go_on_are_seldom_called_worse() -> None:
    false_alarms = sum(deviate(seed, above=0.0).sigmas > 3.0 for seed in range(200))
    assert false_alarms <= 2


def test_losses_that_jump_are_called_worse() -> None:
    assert sum(deviate(seed, above=0.25).sigmas > 3.0 for seed in range(100)) >= 95
    assert deviate(0, above=0.25).mean == pytest.approx(0.25, abs=0.1)


def test_better_losses_are_no_alarm() -> None:
    assert max(deviate(seed, above=-0.3).sigmas for seed in range(20)) < 0


def test_without_a_trend_nothing_is_said() -> None:
    deviation = Deviation(LossTrend().after(16.0, 3.0, 16)).after(32.0, 100.0, 16)
    assert (deviation.steps, deviation.sigmas, deviation.mean) == (0, 0.0, 0.0)


@given(st.lists(st.tuples(st.floats(1, 1000), st.floats(-10, 10), st.integers(1, 512)), min_size=1, max_size=30))
def test_any_losses_leave_finite_numbers_and_json_gives_them_back(steps) -> None:
    trend, progress = LossTrend(), 0.0
    for more, loss, batch in steps:
        progress += more
        trend = trend.after(progress, loss, batch)
    deviation = Deviation(trend).after(progress + 1.0, 0.0, 8)
    assert math.isfinite(deviation.sigmas)
    assert trend.residual_variance >= 0
    assert Deviation.from_dict(json.loads(json.dumps(deviation.to_dict()))) == deviation
