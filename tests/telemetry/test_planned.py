"""A plan as text: whole, against a recorded file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gloo_jobs import toy_config
from orchestrator.config import AdamW
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Kernel, Linear, Pass, Profile
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.telemetry.planned import alternative_rows, explain_lines, memory_rows, plan_lines

GOLDEN = Path(__file__).parents[1] / "golden" / "plan.txt"
KERNELS = (
    Kernel("matmul", 1000, Linear(0, 6.6e10), Linear(3e7, 3e7), Linear(4096, 0)),
    Kernel("memory", 2000, Linear(0, 0), Linear(0, 3e7), Linear(0, 0)),
)
PLAIN = Pass(KERNELS, Linear(0, 2.2e13), Linear(0, 4.4e13), Linear(0, 9e9), Linear(2e9, 1e10))
AGAIN = replace(PLAIN, kept_bytes=Linear(0, 6e8), peak_bytes=Linear(2e9, 9e8))


def planned(*, price: float | None = 2.5, **layout: object) -> Plan:
    config = toy_config(
        8,
        recipe={"batch": 64, "optimizer": AdamW(learning_rate=1e-4)},
        layout={"zero_stage": "auto", "precision": "auto", **layout},
    )
    config = config.model_copy(update={"planning": config.planning.model_copy(update={"price_per_hour": price})})
    shape = ClusterShape.imagine(config.scale, accelerator_named("a100-40gb"), workers=8)
    profile = Profile(6_651_121_664, 0, 206_307_328, 266_240, 226, 0, 2049, "bf16", PLAIN, AGAIN)
    return make_plan(config, shape, train_samples=0, evaluation_samples=0, profile=profile, refuse=False)


def text(plan: Plan) -> str:
    assert plan.costing is not None
    tables = [*memory_rows(plan.costing), *alternative_rows(plan)]
    return "\n".join([*plan_lines(plan), "", *(" | ".join(row) for row in tables), "", *explain_lines(plan), ""])


def test_a_plan_that_fits_and_one_that_does_not() -> None:
    assert text(planned()) + text(planned(zero_stage=0, price=None)) == GOLDEN.read_text(encoding="utf-8")


def test_a_plan_without_costs_says_so() -> None:
    assert explain_lines(replace(planned(), costing=None)) == ["nothing was costed: the reasons above say why"]
