"""From records to metrics: what each says, and what is there before the first event."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from orchestrator.launching.recovery import Cause
from orchestrator.telemetry.accounting import Account
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.metrics import RESTARTS, STATES
from orchestrator.telemetry.observing import (
    FleetFacts,
    RunFacts,
    RunObserver,
    observe_account,
    observe_blocked,
    observe_checkpoint_failure,
    observe_fleet,
    observe_memory,
    observe_parts,
    observe_requests,
    observe_state,
)

FACTS = RunFacts(reference_batch=16, tokens_per_sample=10.0, flops_per_sample=5.0, peak_flops_per_s=1000.0)
PARTS = {"data_wait": 0.1, "forward": 0.2, "backward": 0.3, "communication": 0.4, "checkpoint": 2.0}


def record(step: int, **fields: Any) -> dict[str, Any]:
    values = {
        "step": step, "samples": 32 * step, "progress": 16.0 * step, "epoch": 0.1 * step, "time": 1e9 + 0.5 * step,
        "attempt": 1, "length": 320.0, "loss": 1.0 / step, "learning_rate": 0.1, "global_batch": 32, "micro_batch": 8,
        "accumulation": 2, "workers": 2, "grad_norm": 3.0, "step_time_s": 0.4, "skipped": False, "parts": PARTS,
    }  # fmt: skip
    return {**values, **fields}


def observed(*records: dict[str, Any]) -> Meter:
    meter, observer = Meter(), RunObserver(FACTS)
    observer.begin(meter, {"step": 0, "samples": 0, "progress": 0.0}, repeated=(2, 64))
    for each in records:
        observer.step(meter, each, 1.0)
    return meter


def gauges(meter: Meter) -> dict[str, float]:
    return {"|".join([name.removeprefix("orchestrator_"), *labels]): v for (name, labels), v in meter.gauges().items()}


def counters(meter: Meter) -> dict[str, float]:
    counted = meter.counted().counters | meter.totals()
    return {"|".join([name.removeprefix("orchestrator_"), *labels]): value for (name, labels), value in counted.items()}


def test_steps_are_counted_and_placed() -> None:
    meter = observed(record(1), record(2), record(3, skipped=True, loss=None))
    counted, found = counters(meter), gauges(meter)
    assert counted["steps_total"] == 3 + 2
    assert counted["samples_total"] == 96 + 64
    assert counted["tokens_total"] == 1600
    assert counted["skipped_steps_total"] == 1
    assert counted["repeated_samples_total"] == 64
    assert math.isnan(found["loss"])
    assert (found["run_step"], found["run_samples"], found["run_progress_ratio"]) == (3, 96, pytest.approx(0.15))
    assert found["goodput_samples_per_second"] == pytest.approx(16 / 0.4)


def test_speed_flops_and_time_left_follow_the_wall_clock() -> None:
    found = gauges(observed(*(record(step) for step in range(1, 11))))
    assert found["samples_per_second"] == pytest.approx(64)
    assert found["device_samples_per_second"] == pytest.approx(32)
    assert found["model_flops_per_second"] == pytest.approx(160)
    assert found["mfu_ratio"] == pytest.approx(0.16)
    assert found["eta_seconds"] == pytest.approx((320 - 160) / 32)


def test_what_is_not_known_is_not_claimed() -> None:
    meter, observer = Meter(), RunObserver(RunFacts(16))
    for step in (1, 2):
        observer.step(meter, record(step, length=None), 1.0)
    absent = {"mfu_ratio", "model_flops_per_second", "eta_seconds", "run_progress_ratio", "noise_scale_samples"}
    assert not absent & set(gauges(meter))


def test_noise_scale_with_an_open_bound() -> None:
    known = {"noise_scale": 40.0, "noise_scale_low": 16.0, "noise_scale_high": None}
    found = gauges(observed(record(1, **known)))
    assert found["noise_scale_high_samples"] == math.inf
    # Without an upper bound the lower one counts: (16 + 16) / (16 + 32).
    assert found["statistical_efficiency_ratio"] == pytest.approx(2 / 3)


def test_times_of_a_step_leave_out_what_is_beside_it() -> None:
    found = observed(record(1)).counted().histograms
    assert found["orchestrator_step_seconds", ()][-1] == pytest.approx(1.0)
    assert found["orchestrator_step_part_seconds", ("checkpoint",)][-1] == 2.0


def test_a_ranks_own_time_is_where_it_does_not_wait() -> None:
    meter = Meter()
    observe_parts(meter, PARTS)
    observe_parts(meter, {"other": 5.0}, a_step=False)
    assert gauges(meter)["rank_step_seconds"] == pytest.approx(0.6)
    assert counters(meter)["rank_seconds_total|communication"] == 0.4
    assert counters(meter)["rank_seconds_total|other"] == 5.0


def test_what_can_happen_is_there_before_it_does() -> None:
    counted = counters(observed())
    for name in ("checkpoint_failures_total", "storage_errors_total|checkpoint", "decisions_total|grow"):
        assert counted[name] == 0


def test_events() -> None:
    meter, observer = Meter(), RunObserver(FACTS)
    observer.decision(meter, {"kind": "grow", "then": {"goodput": 70.0}})
    observer.evaluation(meter, {"duration_s": 0.5, "metrics": {"accuracy": 0.9, "loss": None}})
    observe_blocked(meter, 1.0)
    observer.checkpoint(meter, duration_s=3.0, size_bytes=7)
    observe_checkpoint_failure(meter, of_storage=True)
    observe_memory(meter, used=1, reserved=2, peak=3, limit=4)
    counted, found = counters(meter), gauges(meter)
    assert counted["decisions_total|grow"] == 1
    assert found["predicted_goodput_samples_per_second"] == 70.0
    assert found["evaluation|accuracy"] == 0.9
    assert math.isnan(found["evaluation|loss"])
    assert (counted["checkpoint_blocked_seconds_total"], found["checkpoint_seconds"]) == (1.0, 3.0)
    assert (counted["checkpoint_failures_total"], counted["storage_errors_total|checkpoint"]) == (1, 1)
    assert found["device_memory_peak_bytes"] == 3


def test_storage_is_counted_where_it_is_used_and_only_told_here() -> None:
    meter = Meter()
    for retries in (3, 5):
        observe_requests(meter, "write", retries=retries, errors=1)
    counted = counters(meter)
    assert (counted["storage_retries_total|write"], counted["storage_errors_total|write"]) == (5, 1)


def test_exactly_one_state_holds() -> None:
    meter = Meter()
    observe_state(meter, "restarting")
    found = gauges(meter)
    assert {state: found[f"run_state|{state}"] for state in STATES} == {s: float(s == "restarting") for s in STATES}


def test_the_account_has_a_zero_for_what_did_not_happen() -> None:
    meter = Meter()
    observe_account(meter, Account(began=1.0, useful_s=5.0, attempts=2, lost_s={"memory": 3.0}, restarts={"memory": 1}))
    counted = counters(meter)
    assert counted["lost_seconds_total|memory"] == 3.0
    assert counted["lost_seconds_total|checkpoint"] == 0.0
    assert all(counted[f"restarts_total|{cause}"] == 0 for cause in RESTARTS if cause != "memory")
    assert counted["restarts_total|memory"] == 1


def test_whatever_ends_an_attempt_is_counted_from_0_on() -> None:
    """`increase` does not see a series that begins at 1."""
    assert set(get_args(Cause)) <= set(RESTARTS)


def test_a_fleet_says_who_has_what_and_forgets_who_is_gone() -> None:
    meter = Meter()
    runs = (("a", "team-a", 2, 0.0), ("b", "team-b", 0, 12.0))
    observe_fleet(meter, FleetFacts(runs, capacity=4, earned=1.8, decisions=3, moves=1, move_s=20.0))
    gauges = meter.gauges()
    assert gauges["orchestrator_fleet_devices", ("a", "team-a")] == 2.0
    assert gauges["orchestrator_fleet_waiting_seconds", ("b", "team-b")] == 12.0
    whole = {name: gauges[f"orchestrator_fleet_{name}_devices", ()] for name in ("capacity", "used", "earned")}
    assert whole == {"capacity": 4.0, "used": 2.0, "earned": 1.8}
    observe_fleet(meter, FleetFacts(runs[:1], capacity=4, decisions=4, moves=1, move_s=20.0))
    assert [labels for name, labels in meter.gauges() if name == "orchestrator_fleet_devices"] == [("a", "team-a")]
    counters = meter.counted().counters
    assert counters["orchestrator_fleet_decisions_total", ()] == 4.0
    assert counters["orchestrator_fleet_move_seconds_total", ()] == 20.0


def test_a_fleet_of_many_runs_still_fits_into_a_snapshot() -> None:
    meter = Meter()
    observe_fleet(meter, FleetFacts(tuple((f"run-{number}", "q", 1, 0.0) for number in range(2000)), capacity=2000))
    assert len(meter.gauges()) < 1000
    assert meter.gauges()["orchestrator_fleet_used_devices", ()] == 2000.0
