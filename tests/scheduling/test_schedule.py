"""Laws of the learning-rate schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.config import Constant, Cosine, Exponential, Linear, Step, WarmupStableDecay
from orchestrator.scheduling.schedule import factor

shares = st.floats(0.0, 1.0)
warmups = st.one_of(st.just(0.0), st.floats(0.01, 0.9))
finals = st.floats(0.0, 1.0)


@st.composite
def stable_decays(draw: st.DrawFn) -> WarmupStableDecay:
    warmup = draw(warmups)
    decay = draw(st.floats(0.01, 1.0)) * (1.0 - warmup) * 0.999
    return WarmupStableDecay(warmup=warmup, decay=decay, final=draw(finals))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    at = tuple(sorted(draw(st.sets(shares, max_size=4))))
    return Step(warmup=draw(warmups), at=at, factor=draw(st.floats(0.01, 1.0)))


smooth = st.one_of(
    st.builds(Linear, warmup=warmups, final=finals),
    st.builds(Cosine, warmup=warmups, final=finals),
    st.builds(Exponential, warmup=warmups, final=st.floats(0.001, 1.0)),
    stable_decays(),
)
schedules = st.one_of(st.builds(Constant, warmup=warmups), steps(), smooth)


@given(schedules, st.floats(-1.0, 2.0), st.floats(-1.0, 2.0))
def test_a_factor_lies_between_0_and_1(schedule, start, end):
    assert 0.0 <= factor(schedule, start, end) <= 1.0


@given(schedules, st.floats(1e-6, 0.1))
def test_the_first_step_learns(schedule, length):
    assert factor(schedule, 0.0, length) > 0.0


@given(smooth)
def test_the_first_step_after_the_warmup_is_at_the_peak(schedule):
    assert factor(schedule, schedule.warmup, schedule.warmup + 0.01) == pytest.approx(1.0)


@given(schedules, shares, shares)
def test_the_warmup_is_a_straight_line_in_the_end_of_the_step(schedule, a, b):
    assume(schedule.warmup > 0)
    start, end = sorted((a * schedule.warmup * 0.999, b * schedule.warmup))
    assert factor(schedule, start, end) == pytest.approx(end / schedule.warmup)


@given(schedules, shares, shares, st.floats(0.0, 0.1))
def test_the_rate_never_rises_after_the_warmup(schedule, a, b, length):
    early, late = (schedule.warmup + x * (1.0 - schedule.warmup) for x in sorted((a, b)))
    assert factor(schedule, early, early + length) >= factor(schedule, late, late + length)


@given(smooth)
def test_the_end_is_at_final(schedule):
    assert factor(schedule, 1.0, 1.0) == pytest.approx(schedule.final, abs=1e-12)


@given(st.builds(Constant, warmup=warmups), shares)
def test_constant_stays_at_the_peak(schedule, share):
    assert factor(schedule, max(share, schedule.warmup), 1.0) == 1.0


@given(smooth, shares)
def test_smooth_schedules_have_no_jump(schedule, share):
    width = 1e-7
    start = schedule.warmup + share * (1.0 - schedule.warmup - width)
    before, after = factor(schedule, start, start), factor(schedule, start + width, start + width)
    # The steepest slope: a straight line over the shortest decay above (0.001), or ln(0.001) of an exponential.
    assert abs(before - after) <= width * 1e4


@given(steps(), shares)
def test_step_is_a_power_of_its_factor(schedule, share):
    start = max(share, schedule.warmup)
    drops = len([at for at in schedule.at if at <= start])
    assert factor(schedule, start, start) == pytest.approx(schedule.factor**drops)


@given(st.sampled_from([Linear, Cosine]), shares)
def test_decays_are_symmetric_about_the_middle(kind, p):
    assert factor(kind(), p, p) + factor(kind(), 1.0 - p, 1.0 - p) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "start", "expected"),
    [
        (Linear(warmup=0.2, final=0.1), 0.6, 0.55),
        (Cosine(warmup=0.2), 0.6, 0.5),
        (Cosine(), 0.25, (1 + math.sqrt(0.5)) / 2),
        (Exponential(final=0.01), 0.5, 0.1),
        (Step(at=(0.5, 0.75), factor=0.1), 0.5, 0.1),
        (Step(at=(0.5, 0.75), factor=0.1), 0.4999, 1.0),
        (WarmupStableDecay(warmup=0.1, decay=0.2), 0.8, 1.0),
        (WarmupStableDecay(warmup=0.1, decay=0.2, final=0.2), 0.9, 0.6),
        (WarmupStableDecay(decay=0.0), 1.0, 1.0),
        (Cosine(warmup=1.0), 1.0, 1.0),
    ],
)
def test_known_values(schedule, start, expected):
    assert factor(schedule, start, start) == pytest.approx(expected)
