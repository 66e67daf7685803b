"""A plan as text: what will run, why, what it takes, and what else was weighed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from orchestrator.planning.costing import Alternative, Costing
from orchestrator.planning.memory import BUCKET_ELEMENTS, FLATTENED_ELEMENTS, FRAGMENTATION, LIVE_ELEMENTS
from orchestrator.planning.plan import Plan
from orchestrator.planning.roofline import CONTENTION, OVERLAP, UNSEEN, StepTerms, Traffic
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
    """Every formula of the costs with its numbers filled in."""
    if plan.costing is None:
        return ["nothing was costed: the reasons above say why"]
    rows = [*_memory_formulas(plan, plan.costing), *_step_formulas(plan, plan.costing)]
    return [f"{name:<13} {text}" for name, text in rows]


def _memory_formulas(plan: Plan, costing: Costing) -> Iterator[tuple[str, str]]:
    memory, terms, layout = costing.memory, costing.terms, plan.layout
    parameters, element = human.count(costing.parameters), terms.element_bytes
    yield (
        "P, N, m, a",
        (
            f"{parameters} parameters, {layout.workers} workers on {plan.nodes} node(s), micro batch "
            f"{layout.micro_batch}, accumulation {layout.accumulation}"
        ),
    )
    for name, term in terms.states.items():
        rest = terms.frozen_and_buffer_bytes if name == "parameters" else 0
        beside = f" + {human.size(rest)} frozen and buffers" if rest else ""
        found = getattr(memory, name)
        formula = f"{term.per_parameter:g} bytes x P / {term.shared_by}"
        if plan.offload != "none" and term.per_parameter and not found:
            yield name, f"{formula} with offload {plan.offload}: on the host"
            continue
        numbers = f"{term.per_parameter:g} x {parameters} / {term.shared_by}{beside}"
        yield name, f"{formula} = {numbers} = {human.size(found)}"
    if memory.gathered:
        yield (
            "gathered",
            (
                f"{element} bytes x (min(all parameters, {human.count(LIVE_ELEMENTS)} + largest layer "
                f"{human.count(terms.largest_layer)}) + {human.count(terms.small_parameters)} in small tensors) = "
                f"{human.size(memory.gathered)}"
            ),
        )
    yield "buckets", f"{_buckets(plan, element)} = {human.size(memory.buckets)}"
    for name, line, found in (
        ("activations", terms.kept_bytes, memory.activations),
        ("peak", terms.peak_bytes, memory.activations + memory.temporaries),
    ):
        factor = "" if terms.factor == 1 else f"{terms.factor:.3g} x "
        least = "" if name == "activations" else ", at least what is kept"
        yield (
            name,
            (
                f"{factor}({human.size(line.base)} + {layout.micro_batch} x {human.size(line.per_sample)}){least} = "
                f"{human.size(found)}"
            ),
        )
    yield "fragmentation", f"{FRAGMENTATION:g} x peak = {human.size(memory.fragmentation)}, allowed for"
    yield (
        "fits",
        (
            f"{human.size(memory.needed)} needed {'<=' if costing.fits else '>'} "
            f"{human.size(costing.device_memory_bytes)}; with all that is allowed for {human.size(memory.total)}"
        ),
    )


def _buckets(plan: Plan, element: int) -> str:
    if plan.zero_stage == 0 or (plan.zero_stage == 1 and plan.precision == "bf16"):
        return f"{element if plan.zero_stage == 0 else 4} bytes x min(P, {human.count(FLATTENED_ELEMENTS)})"
    twice = " x 2" if plan.zero_stage == 2 and plan.device == "cuda" else ""
    return f"{element} bytes x {human.count(BUCKET_ELEMENTS)}{twice}"


def _step_formulas(plan: Plan, costing: Costing) -> Iterator[tuple[str, str]]:
    step, terms, layout = costing.step, costing.terms.step, plan.layout
    yield from _compute_formulas(terms, layout.accumulation)
    total = layout.accumulation * sum(kernel.seconds for kernel in terms.kernels)
    if (traffic := terms.traffic) is not None:
        yield from _communication_formulas(traffic, terms.hidden_s)
        total += _communicated_s(traffic, terms.hidden_s)
    total += terms.update_bytes / terms.update_bytes_per_s + terms.offload_bytes / terms.offload_bytes_per_s
    yield from _update_formulas(terms)
    yield "unseen", f"{UNSEEN:.0%} of {_seconds(total)} = {_seconds(UNSEEN * total)}"
    predicted = (1 + UNSEEN) * total
    measured = f" x {step.total / predicted:.3g}, as the probe measured" if costing.timed else ""
    yield "step", f"{_seconds(total)} + {_seconds(UNSEEN * total)}{measured} = {_seconds(step.total)}"
    speed = f"{human.number(costing.samples_per_s)} samples/s"
    yield "speed", f"{layout.global_batch} samples / {_seconds(costing.step_time_s)} = {speed}"
    peak = f"({layout.workers} x {_flops(terms.peak_flops_per_s)}/s)"
    yield "MFU", f"{_flops(costing.flops_per_sample)} a sample x {speed} / {peak} = {costing.mfu:.3f}"


def _compute_formulas(terms: StepTerms, accumulation: int) -> Iterator[tuple[str, str]]:
    rate = human.size(terms.memory_bytes_per_s)
    for kernel in terms.kernels:
        reached = kernel.flops / kernel.seconds if kernel.seconds else 0.0
        share = f"{reached / terms.peak_flops_per_s:.1%} of {_flops(terms.peak_flops_per_s)}/s, "
        flops = f"{_flops(kernel.flops)} at {share}" if kernel.flops else ""
        moved = f"{human.size(kernel.moved_bytes)} at up to {rate}/s"
        took = f"the longest of each kernel's, with launches, is {_seconds(kernel.seconds)} a micro batch"
        yield kernel.kind, f"{flops}{moved}: {took}"
    once = sum(kernel.seconds for kernel in terms.kernels)
    yield "compute", f"{accumulation} x {_seconds(once)} = {_seconds(accumulation * once)}"


def _communication_formulas(traffic: Traffic, hidden_s: float) -> Iterator[tuple[str, str]]:
    rate = f"{human.size(traffic.bytes_per_s)}/s"
    for name, num_bytes in traffic.bytes_by_operation.items():
        yield "volume", f"{name}: {human.size(num_bytes)} / {rate} = {_seconds(num_bytes / traffic.bytes_per_s)}"
    messages = f"{human.number(traffic.messages)} messages x {_seconds(traffic.message_s)}"
    yield "latency", f"{messages} = {_seconds(traffic.messages * traffic.message_s)}"
    hidden = f"stages 2 and 3 hide at most {OVERLAP:.0%} of compute: {_seconds(hidden_s)} hidden"
    yield "overlap", f"{hidden}, of which compute pays {CONTENTION:.0%}"
    left = f"{_seconds(traffic.seconds)} - {1 - CONTENTION:g} x {_seconds(hidden_s)}"
    yield "communication", f"{left} = {_seconds(_communicated_s(traffic, hidden_s))}"


def _communicated_s(traffic: Traffic, hidden_s: float) -> float:
    return float(traffic.seconds - (1 - CONTENTION) * hidden_s)


def _update_formulas(terms: StepTerms) -> Iterator[tuple[str, str]]:
    moved = f"{human.size(terms.update_bytes)} read and written / {human.size(terms.update_bytes_per_s)}/s"
    yield "optimizer", f"{moved} = {_seconds(terms.update_bytes / terms.update_bytes_per_s)}"
    if terms.offload_bytes:
        moved = f"{human.size(terms.offload_bytes)} / {human.size(terms.offload_bytes_per_s)}/s over PCIe"
        yield "offload", f"{moved} = {_seconds(terms.offload_bytes / terms.offload_bytes_per_s)}"


def _flops(value: float) -> str:
    return f"{value / 1e12:.4g} TFLOP"


def _seconds(value: float) -> str:
    """Finer than elsewhere: the parts are to be added up by hand."""
    return f"{1000 * value:.4g} ms" if value < 1 else f"{value:.4g} s"
