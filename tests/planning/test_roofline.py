"""Step time before any timing: published runs, and laws that any estimate must keep."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job import load
from orchestrator.planning.accelerators import TABLE, accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Kernel, Linear, Pass, Profile
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.roofline import StepParts, step_parts

WORK = Pass(
    kernels=(
        Kernel("matmul", 400, Linear(0, 4e10), Linear(1e7, 4e6), Linear(2048, 0)),
        Kernel("attention", 24, Linear(0, 2e10), Linear(0, 8e6), Linear(64, 0)),
        Kernel("memory", 900, Linear(0, 0), Linear(0, 8e6), Linear(0, 0)),
    ),
    forward_flops=Linear(0, 6e12),
    backward_flops=Linear(0, 12e12),
    kept_bytes=Linear(0, 2e9),
    peak_bytes=Linear(0, 2.2e9),
)
PROFILE = Profile(1_300_000_000, 0, 100_000_000, 100_000, 200, 0, 4096, "bf16", WORK, WORK)


def parts(name: str = "a100-40gb", *, stage: int = 3, workers: int = 8, nodes: int = 1, **fields: Any) -> StepParts:
    chosen = {"offload": "none", "checkpointing": False, "micro_batch": 4, "accumulation": 2, **fields}
    return step_parts(
        PROFILE,
        accelerator_named(name),
        zero_stage=stage,
        workers=workers,
        nodes=nodes,
        optimizer_bytes=8,
        **chosen,
    )


@given(st.integers(0, 3), st.integers(1, 64), st.integers(1, 64), st.sampled_from([a for a in TABLE if a.bf16_flops]))
def test_more_work_takes_longer(stage: int, micro_batch: int, accumulation: int, accelerator) -> None:
    def total(**fields: Any) -> float:
        return parts(accelerator.name, stage=stage, **fields).total

    now = total(micro_batch=micro_batch, accumulation=accumulation)
    assert 0 < now < total(micro_batch=micro_batch + 1, accumulation=accumulation)
    assert now < total(micro_batch=micro_batch, accumulation=accumulation + 1)
    # A second micro batch costs at most what the first did, and one of twice the size no more than two.
    assert total(micro_batch=2 * micro_batch, accumulation=accumulation) <= total(
        micro_batch=micro_batch, accumulation=2 * accumulation
    ) * (1 + 1e-9)


def test_zero_1_is_no_slower_than_zero_2_once_there_is_accumulation() -> None:
    """Where the network is slow enough to be seen: 3 volumes against 2 a + 1, though those of stage 1 are in fp32."""
    slow = {"nodes": 8, "workers": 8, "accumulation": 8}
    assert parts("l4", stage=1, **slow).total < parts("l4", stage=2, **slow).total


def test_nothing_is_sent_by_one_worker_and_more_across_nodes() -> None:
    assert parts(workers=1).exposed_communication == 0
    inside, across = parts("l4", workers=8, nodes=1), parts("l4", workers=8, nodes=8)
    assert inside.total < across.total


def test_arrays_are_answered_one_by_one() -> None:
    several = parts(micro_batch=np.array([1, 2, 4]), accumulation=np.array([8, 4, 2]))
    assert several.at(2).total == pytest.approx(parts(micro_batch=4, accumulation=2).total)


def test_no_estimate_beats_the_peak() -> None:
    for accelerator in TABLE:
        if accelerator.bf16_flops:
            seconds = parts(accelerator.name, micro_batch=64, accumulation=1).total
            assert 64 * PROFILE.flops_per_sample / seconds < accelerator.bf16_flops


# -- published runs ----------------------------------------------------------------------------


class Row(NamedTuple):
    """A published run of an MPT model: FSDP full shard, bf16, 2,048 tokens, flash attention."""

    layers: int
    width: int
    heads: int
    workers: int
    accelerator: str
    micro_batch: int
    checkpointing: bool
    tokens_per_s: float
    """Of each device."""


# MosaicML, llm-foundry, benchmarks of training throughput.
ROWS = {
    "7B-a100": Row(32, 4096, 32, 8, "a100-40gb", 12, True, 3679),
    "13B-a100": Row(40, 5120, 40, 16, "a100-40gb", 10, True, 1993),
    "30B-a100": Row(48, 7168, 56, 32, "a100-40gb", 4, True, 857),
    "70B-h100": Row(80, 8192, 64, 256, "h100-80gb", 8, True, 1035),
    "7B-h100": Row(32, 4096, 32, 8, "h100-80gb", 6, False, 10643),
    "1B-h100": Row(24, 2048, 16, 8, "h100-80gb", 14, False, 45455),
}


def planned(row: Row, *pins: str) -> Plan:
    from orchestrator.launching.profiling import profile_job

    sizes = {"layers": row.layers, "width": row.width, "heads": row.heads, "sequence": 2048, "vocabulary": 50368}
    job = load("jobs.language:gpt", [f"{n}={v}" for n, v in sizes.items()], [f"scale.workers={row.workers}", *pins])
    shape = ClusterShape.imagine(job.config.scale, accelerator_named(row.accelerator), workers=row.workers)
    profile, why = profile_job(job, shape)
    assert profile is not None, why
    return make_plan(job.config, shape, train_samples=0, evaluation_samples=0, profile=profile, refuse=False)


@pytest.mark.slow
def test_published_runs_fit_and_are_as_fast_as_published() -> None:
    """Each within 15 %, so their median too, and in their order on each device."""
    ratios: dict[str, float] = {}
    for name, row in ROWS.items():
        checkpointing = str(row.checkpointing).lower()
        plan = planned(
            row,
            "layout.zero_stage=3",
            f"layout.micro_batch={row.micro_batch}",
            f"layout.activation_checkpointing={checkpointing}",
        )
        assert plan.costing is not None
        assert plan.costing.fits, name
        assert (plan.layout.micro_batch, plan.layout.accumulation) == (row.micro_batch, 1)
        ratios[name] = plan.costing.samples_per_s * 2048 / row.workers / row.tokens_per_s
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios
    assert 0.95 < statistics.median(ratios.values()) < 1.05


@pytest.mark.slow
def test_a_7b_model_in_plain_data_parallel_does_not_fit_40_gb() -> None:
    plan = planned(ROWS["7B-a100"], "layout.zero_stage=0")
    assert plan.costing is not None
    assert not plan.costing.fits
    assert plan.costing.memory.total > 16 * 6.6e9
    assert plan.costing.changes[0].startswith("layout.zero_stage=")
