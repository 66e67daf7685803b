"""Axes, thinning and smoothing as laws; drawing as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.charts import Chart, Curve, Marker, draw, linear_axis, log_axis, smooth, thin

finite = st.floats(-1e9, 1e9)


@given(finite, finite)
def test_a_linear_axis_holds_its_values_between_nice_ticks(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    axis = linear_axis(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert axis.low <= low + slack
    assert high - slack <= axis.high
    assert axis.low < axis.high
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert 2 <= len(axis.ticks) <= 9
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == 1


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.5, 1)),
        (0.43, 0.987, (0.4, 0.6, 0.8, 1)),
        (0, 2143, (0, 1000, 2000, 3000)),
        (0, 0.002, (0, 0.0005, 0.001, 0.0015, 0.002)),
        (64, 64, (55, 60, 65, 70, 75)),
    ],
)
def test_linear_ticks(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert linear_axis(low, high).ticks == ticks


def test_an_exact_axis_keeps_its_ends() -> None:
    axis = linear_axis(0, 87_431, ticks=5, exact=True)
    assert (axis.low, axis.high, axis.ticks) == (0, 87_431, (0, 20_000, 40_000, 60_000, 80_000))


@given(st.floats(1e-30, 1e30), st.floats(1.0, 1e30))
def test_a_log_axis_holds_its_values(low: float, ratio: float) -> None:
    axis = log_axis(low, low * ratio)
    assert axis.low <= low * (1 + 1e-6)
    assert low * ratio <= axis.high * (1 + 1e-6)
    assert 1 <= len(axis.ticks) <= 7
    assert axis.at(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5, abs=1e-6)


def test_log_ticks() -> None:
    assert log_axis(0.3, 2.4).ticks == (0.2, 0.5, 1, 2, 5)
    assert log_axis(0.004, 2.4).ticks == (0.01, 0.1, 1)


@given(st.lists(finite, max_size=300), st.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes_in_order(values: list[float], limit: int) -> None:
    points = [(float(i), y, i) for i, y in enumerate(values)]
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 0)
    assert kept == sorted(set(kept))
    if points:
        assert kept[0] == points[0]
        assert kept[-1] == points[-1]
        assert {min(values), max(values)} <= {y for _, y, _ in kept}


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0.5, 20))
def test_smoothing_stays_within_the_values_and_has_no_lag(values: list[float], memory: float) -> None:
    points = [(float(i), y, i) for i, y in enumerate(values)]
    smoothed = [y for _, y, _ in smooth(points, memory)]
    slack = 1e-6 * max(map(abs, [*values, 1.0]))
    assert min(values) - slack <= min(smoothed)
    assert max(smoothed) <= max(values) + slack
    backwards = [y for _, y, _ in smooth(points[::-1], memory)]
    assert backwards[::-1] == pytest.approx(smoothed, abs=slack)


def test_smoothing_is_the_two_sided_exponential_mean() -> None:
    values, memory = [3.0, 1.0, 4.0, 1.0, 5.0], 2.0
    weights = [[math.exp(-abs(i - j) / memory) for j in range(5)] for i in range(5)]
    expected = [sum(w * v for w, v in zip(row, values, strict=True)) / sum(row) for row in weights]
    smoothed = [y for _, y, _ in smooth([(0.0, v, 0) for v in values], memory)]
    assert smoothed == pytest.approx(expected)


def test_draw() -> None:
    curve = Curve("batch", [(0.0, 64.0, 1), (50.0, 128.0, 2), (100.0, 128.0, 3)], "steps")
    html, hover = draw(Chart("Global batch", [curve], "samples", zero=True), (0, 100), [Marker(50, "attempt 2")])
    assert (
        html
        == """\
<figure class="chart" tabindex="0" aria-label="Global batch">
<figcaption><h3>Global batch<small>samples</small></h3>
<output>step 3 · 128</output></figcaption>
<div class="frame"><div class="up" aria-hidden="true"><span style="bottom:0.00%">0</span>\
<span style="bottom:33.33%">50</span><span style="bottom:66.67%">100</span><span style="bottom:100.00%">150</span></div>
<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img"><title>Global batch</title>\
<desc>batch: from 64 at step 1 to 128 at step 3; lowest 64 at step 1, highest 128 at step 2.</desc>\
<path class="grid" d="M0 1000H1000M0 666.7H1000M0 333.3H1000M0 0H1000"/><path class="attempt" d="M500 0V1000"/>\
<path class="steps c0" d="M0 573.3H500V146.7H1000V146.7"/></svg><b class="flag" style="left:50.00%">attempt 2</b>
<i class="cross" hidden></i></div>
<div class="across" aria-hidden="true"><span style="left:0.00%">0</span><span style="left:20.00%">20</span>\
<span style="left:40.00%">40</span><span style="left:60.00%">60</span><span style="left:80.00%">80</span>\
<span style="left:100.00%">100</span></div></div></figure>"""
    )
    points = {"name": "batch", "kind": "steps", "colour": 0, "x": [0, 50, 100], "y": [64, 128, 128], "step": [1, 2, 3]}
    assert hover == {"axis": [0.0, 150.0, False], "curves": [points]}


@pytest.mark.parametrize(
    ("last", "is_log"), [(2.0 / 10**1.4, False), (2.0 / 10**1.6, True), (0.0, False), (-1.0, False)]
)
def test_a_log_scale_needs_positive_values_over_a_decade_and_a_half(last: float, is_log: bool) -> None:
    curve = Curve("training", [(0.0, 2.0, 1), (1.0, last, 2)])
    html, hover = draw(Chart("Loss", [curve], log=True), (0, 1), [])
    assert hover["axis"][2] is is_log
    assert ("(log scale)" in html) is is_log
