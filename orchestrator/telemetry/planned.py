"""A plan as text: what will run, and why."""

from __future__ import annotations

from orchestrator.planning.plan import Plan
from orchestrator.telemetry import human

__all__ = ["plan_lines"]


def plan_lines(plan: Plan) -> list[str]:
    """The plan as aligned lines, one decision each, reasons last."""
    epochs = "" if plan.length is None else f", {human.number(plan.length / plan.train_samples)} epochs"
    length = (
        "until its target or time" if plan.length is None else f"{human.count(plan.length)} reference samples{epochs}"
    )
    held_out = human.count(plan.evaluation_samples) if plan.evaluation_samples else "no"
    rows = [
        ("data", f"{human.count(plan.train_samples)} training samples, {held_out} held out"),
        ("batch", str(plan.layout)),
        ("length", length),
        ("device", f"{plan.device}, {plan.precision}"),
        ("ZeRO", f"stage {plan.zero_stage}{'' if plan.offload == 'none' else f', offload {plan.offload}'}"),
    ]
    if plan.activation_checkpointing:
        rows.append(("memory", "activation checkpointing"))
    rows += [("because" if index == 0 else "", reason) for index, reason in enumerate(plan.reasons)]
    return [f"plan for {human.printable(plan.name)}", *(f"  {label:<8} {text}" for label, text in rows)]
