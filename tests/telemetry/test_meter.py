"""The meter: what is counted, remembered and averaged, and what is no metric of ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.meter import Counted, Meter
from orchestrator.telemetry.metrics import SECONDS

STEP, PART = "orchestrator_step_seconds", "orchestrator_step_part_seconds"


def test_counters_add_and_gauges_are_replaced() -> None:
    meter = Meter()
    meter.count("orchestrator_steps_total")
    meter.count("orchestrator_steps_total", 2.0)
    meter.count("orchestrator_decisions_total", 1.0, "grow")
    meter.set("orchestrator_loss", 2.0)
    meter.set("orchestrator_loss", 1.0)
    meter.set("orchestrator_eta_seconds", None)
    assert meter.counted().counters == {
        ("orchestrator_steps_total", ()): 3.0,
        ("orchestrator_decisions_total", ("grow",)): 1.0,
    }
    assert meter.gauges() == {("orchestrator_loss", ()): 1.0}


def test_a_mean_is_of_what_came_since_the_last_snapshot_and_stays() -> None:
    meter, key = Meter(), ("orchestrator_rank_step_seconds", ())
    meter.average("orchestrator_rank_step_seconds", 1.0)
    meter.average("orchestrator_rank_step_seconds", 3.0)
    assert meter.gauges()[key] == 2.0
    meter.average("orchestrator_rank_step_seconds", 5.0)
    assert meter.gauges()[key] == 5.0
    assert meter.gauges()[key] == 5.0


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_holds_every_observation_once(times: list[float]) -> None:
    meter = Meter()
    for seconds in times:
        meter.observe(STEP, seconds)
    if not times:
        assert not meter.counted().histograms
        return
    *counts, total = meter.counted().histograms[STEP, ()]
    assert sum(counts) == len(times)
    assert total == pytest.approx(sum(times))
    for index, bound in enumerate(SECONDS):
        assert sum(counts[: index + 1]) == sum(seconds <= bound for seconds in times)


def test_what_is_counted_before_and_now_adds_up() -> None:
    before, now = Meter(), Meter()
    before.count("orchestrator_steps_total", 2.0)
    now.count("orchestrator_steps_total", 3.0)
    now.count("orchestrator_samples_total", 5.0)
    before.observe(PART, 0.02, "forward")
    now.observe(PART, 0.2, "forward")
    both = before.counted().plus(now.counted())
    assert both.counters == {("orchestrator_steps_total", ()): 5.0, ("orchestrator_samples_total", ()): 5.0}
    assert both.histograms[PART, ("forward",)][-1] == pytest.approx(0.22)
    assert Counted().plus(both) == both


def test_a_name_that_is_not_in_the_table_is_a_mistake() -> None:
    meter = Meter()
    with pytest.raises(KeyError):
        meter.count("orchestrator_stepz_total")
    with pytest.raises(AssertionError, match="is a gauge"):
        meter.count("orchestrator_loss")
    with pytest.raises(AssertionError, match="has the labels"):
        meter.set("orchestrator_loss", 1.0, "extra")
