"""What a run's devices earn, in devices of its own smallest size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleets import model
from orchestrator.fleet.book import Entry, Registration, Report
from orchestrator.fleet.earned import earned_devices
from orchestrator.fleet.view import Allocation
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.goodput import rate

FACTS = Registration("a", 64, (64, 64), (1, 64), (1, 8))


def entry(devices: int, *, timed: bool = True) -> Entry:
    here = Allocation("gpu", {"n1": devices}, Layout(devices, 64 // devices, 1)) if devices else None
    report = Report(0.0, None, 500.0, {"gpu": model()} if timed else None)
    return Entry(FACTS, 0.0, 0.0, 0.0, 0.0, report=report, current=here)


def test_a_waiting_run_earns_nothing_and_a_single_device_earns_itself() -> None:
    assert earned_devices(entry(0)) == 0.0
    assert earned_devices(entry(1)) == 1.0


def test_what_was_never_timed_earns_what_it_has() -> None:
    assert earned_devices(entry(4, timed=False)) == 4.0


def test_more_devices_earn_as_much_as_they_speed_the_run_up() -> None:
    goodputs = [rate(model(), 500.0, 64, 1, Layout(n, 64 // 4, 4 // n)).goodput for n in (1, 4)]
    assert earned_devices(entry(4)) == pytest.approx(goodputs[1] / goodputs[0])
    assert 1.0 < earned_devices(entry(4)) < 4.0


def test_a_run_that_needs_several_devices_is_measured_by_those() -> None:
    gang = replace(entry(4), facts=replace(FACTS, workers_range=(4, 8)))
    assert earned_devices(gang) == 4.0
