"""A plan as text: what will run, why, what it takes, and what else was weighed."""

from __future__ import annotations

from dataclasses import asdict

from orchestrator.planning.costing import Alternative, Costing
from orchestrator.planning.memory import FRAGMENTATION
from orchestrator.planning.plan import Plan
from orchestrator.planning.roofline import UNSEEN
from orchestrator.telemetry import human

__all__ = ["alternative_rows", "explain_lines", "memory_rows", "plan_lines"]

PARTS = {
    "parameters": "parameters, in the type they are computed in",
    "gradients": "gradients at the end of the backward pass",
    "masters": "fp32 masters",
    "optimizer": "optimizer state",
    "gathered": "layers gathered by stage 3",
    "buckets": "communication buckets",
    "activations": "kept for the backward pass",
    "temporaries": "loss, temporaries, recomputed block",
    "fragmentation": "allowed for fragmentation",
    "context": "context of the device",
    "libraries": "allowed for NCCL and cuBLAS",
    "measured": "found by the probe beside the rest",
}


def plan_lines(plan: Plan) -> list[str]:
    """The plan as aligned lines, one decision each, reasons last."""
    epochs = f", {human.number(plan.length / plan.train_samples)} epochs" if plan.length and plan.train_samples else ""
    length = (
        "until its target or time" if plan.length is None else f"{human.count(plan.length)} reference samples{epochs}"
    )
    held_out = human.count(plan.evaluation_samples) if plan.evaluation_samples else "no"
    data = f"{human.count(plan.train_samples)} training samples, {held_out} held out"
    rows = [
        ("data", data if plan.train_samples else "not there: one sample's columns are known"),
        ("batch", str(plan.layout)),
        ("length", length if plan.length or plan.train_samples else "not known without the data"),
        ("device", f"{plan.device}, {plan.precision}"),
        ("ZeRO", f"stage {plan.zero_stage}{'' if plan.offload == 'none' else f', offload {plan.offload}'}"),
    ]
    if str(plan.computing):
        rows.append(("compute", str(plan.computing)))
    if plan.activation_checkpointing:
        rows.append(("memory", "activation checkpointing"))
    if plan.costing is not None:
        rows += _costs(plan.costing, timed=plan.device == "cuda" or plan.costing.timed)
    rows += [("because" if index == 0 else "", reason) for index, reason in enumerate(plan.reasons)]
    return [f"plan for {human.printable(plan.name)}", *(f"  {label:<8} {text}" for label, text in rows)]


def _costs(costing: Costing, *, timed: bool) -> list[tuple[str, str]]:
    """Time and money, on CPUs left out as a guess, and whether it fits where it does not."""
    rows = []
    if timed:
        rate = human.rate(costing.samples_per_s, "samples")
        step = f"{human.duration(costing.step_time_s)} a step, {rate}, MFU {costing.mfu:.0%} ({costing.confidence})"
        rows.append(("speed", step))
    if timed and costing.run_time_s is not None:
        bound = "" if costing.run_time_bound == "exact" else f"{costing.run_time_bound} "
        price = "" if costing.cost is None else f", {bound}{human.number(costing.cost)} at the price of the config"
        rows.append(("run", f"{bound}{human.duration(costing.run_time_s)} if the batch stays{price}"))
    if not costing.fits:
        changes = ", or ".join(costing.changes)
        rows.append(("fits", f"NO; it would with {changes}" if changes else "NO, and no change of layout would help"))
    elif costing.tight:
        rows.append(("fits", "tight: it may run out of memory, as said below"))
    return rows


def memory_rows(costing: Costing) -> list[tuple[str, str, str]]:
    """Part, bytes and what it is, of all that is not nothing; the total and the device last."""
    breakdown = asdict(costing.memory)
    rows = [(name, human.size(breakdown[name]), text) for name, text in PARTS.items() if breakdown[name]]
    rows.append(("total", human.size(costing.memory.total), "on each device"))
    rows.append(("device", human.size(costing.device_memory_bytes), costing.accelerator))
    if costing.memory.host:
        rows.append(("host", human.size(costing.memory.host), "offloaded, for each worker"))
    return rows


def alternative_rows(plan: Plan) -> list[tuple[str, str, str, str, str, str]]:
    """The best of each ZeRO stage: stage, micro batch x accumulation, extras, memory, step time, whether it fits."""
    assert plan.costing is not None
    rows = []
    for other in plan.costing.alternatives:
        extras = [] if other.offload == "none" else [f"offload {other.offload}"]
        extras += ["checkpointing"] if other.activation_checkpointing else []
        rows.append(
            (
                str(other.zero_stage),
                f"{other.micro_batch} x {other.accumulation}",
                ", ".join(extras) or "-",
                human.size(other.memory_bytes),
                human.duration(other.step_time_s),
                _verdict(other, chosen=other.zero_stage == plan.zero_stage),
            )
        )
    return rows


def _verdict(other: Alternative, *, chosen: bool) -> str:
    if not other.fits:
        return "no"
    words = ["chosen"] if chosen else []
    return ", ".join([*words, "tight"] if other.tight else words) or "yes"


def explain_lines(plan: Plan) -> list[str]:
    """Every formula of the costs with its numbers."""
    costing = plan.costing
    if costing is None:
        return ["nothing was costed: the reasons above say why"]
    memory, step, layout = costing.memory, costing.step, plan.layout
    states = memory.parameters + memory.gradients + memory.masters + memory.optimizer
    peak = memory.activations + memory.temporaries
    rows = {
        "parameters": f"P = {human.count(costing.parameters)}, N = {layout.workers} workers on {plan.nodes} node(s)",
        "states": f"stage {plan.zero_stage}: parameters, gradients, masters, optimizer = "
        f"{states / costing.parameters:.2f} bytes x P = {human.size(states)}",
        "activations": f"linear in the micro batch of {layout.micro_batch}: kept {human.size(memory.activations)}, "
        f"peak {human.size(peak)}",
        "fragmentation": f"{FRAGMENTATION:g} x peak = {human.size(memory.fragmentation)}",
        "fits": f"{human.size(memory.needed)} needed {'<=' if costing.fits else '>'} "
        f"{human.size(costing.device_memory_bytes)}; with all that is allowed for {human.size(memory.total)}",
        "compute": f"{layout.accumulation} x sum over kernels of max(FLOPs / reached rate, bytes / bandwidth, launch)"
        f" = {human.duration(step.compute)}",
        "communication": f"what is not hidden, and what hiding costs = {human.duration(step.exposed_communication)}",
        "optimizer": f"states read and written once = {human.duration(step.optimizer)}",
        "offload": f"over PCIe = {human.duration(step.offload)}",
        "unseen": f"{UNSEEN:.0%} of the four above = {human.duration(step.unseen)}",
        "step": f"their sum = {human.duration(costing.step_time_s)}; {layout.global_batch} samples in it: "
        f"{human.number(costing.samples_per_s)} samples/s",
        "MFU": f"{human.number(costing.flops_per_sample)} FLOPs a sample x samples/s / peak = {costing.mfu:.3f}",
    }
    return [f"{name:<13} {text}" for name, text in rows.items()]
