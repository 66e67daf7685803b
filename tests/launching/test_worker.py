"""What a worker exports without being told: FLOPs of the traced model, its device's peak, and storage's trouble."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gloo_jobs import toy_config
from orchestrator.config import TelemetryConfig
from orchestrator.launching.worker import _facts, _sample
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Kernel, Linear, Pass, Profile
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.storage import tally
from orchestrator.telemetry.meter import Meter
from orchestrator.training.memory import MemoryGauge

KERNEL = Kernel("matmul", 10, Linear(0, 6e9), Linear(3e5, 3e5), Linear(4096, 0))
STEP = Pass((KERNEL,), Linear(0, 2e10), Linear(0, 4e10), Linear(0, 9e5), Linear(2e6, 1e6))
CONFIG = toy_config(layout={"zero_stage": "auto", "precision": "auto"})


def planned(accelerator: str) -> Plan:
    scale = CONFIG.scale.model_copy(update={"accelerators_per_worker": 0 if accelerator == "cpu" else 1})
    config = CONFIG.model_copy(update={"scale": scale})
    shape = ClusterShape.imagine(scale, accelerator_named(accelerator), workers=2)
    profile = Profile(1_000_000, 0, 100_000, 64, 4, 0, 65, "bf16", STEP, STEP)
    return make_plan(config, shape, train_samples=96, evaluation_samples=0, profile=profile, refuse=False)


def test_flops_are_the_planners_and_the_peak_is_the_devices() -> None:
    facts = _facts(CONFIG, planned("a100-40gb"))
    assert (facts.flops_per_sample, facts.peak_flops_per_s) == (6e10, 312e12)


def test_of_a_cpu_no_peak_is_claimed() -> None:
    facts = _facts(CONFIG, planned("cpu"))
    assert (facts.flops_per_sample, facts.peak_flops_per_s) == (6e10, None)


def test_what_the_config_says_stands_over_both() -> None:
    telemetry = TelemetryConfig(flops_per_sample=5.0, peak_flops_per_s=7.0, tokens_per_sample=3.0)
    facts = _facts(CONFIG.model_copy(update={"telemetry": telemetry}), planned("a100-40gb"))
    assert (facts.flops_per_sample, facts.peak_flops_per_s, facts.tokens_per_sample) == (5.0, 7.0, 3.0)


def test_where_nothing_was_traced_nothing_is_claimed() -> None:
    facts = _facts(CONFIG, replace(planned("a100-40gb"), costing=None))
    assert (facts.flops_per_sample, facts.peak_flops_per_s) == (None, None)


def test_storages_trouble_is_told_with_each_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = tally.Tally()
    monkeypatch.setattr("orchestrator.launching.worker.REQUESTS", requests)
    meter, gauge = Meter(), MemoryGauge(torch.device("cpu"), 2**30)
    requests.open()
    for _ in range(3):
        requests.retried("write")
        _sample(gauge.observe, meter)
    counted = meter.counted().counters
    assert counted["orchestrator_storage_retries_total", ("write",)] == 3
    assert counted["orchestrator_storage_errors_total", ("read",)] == 0
    assert meter.gauges()["orchestrator_device_memory_limit_bytes", ()] == 2**30
