"""The story of a run's decisions: what was seen, what was done about it, what was promised and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.telemetry import human

if TYPE_CHECKING:
    from orchestrator.scheduling.replay import Replayed
    from orchestrator.telemetry.report import RunData

__all__ = ["decisions_told", "layout_change", "replay_lines", "story_lines"]

Told = tuple[str, str, str, str, str, str]
"""Step, kind, batch, reason, promised goodput, measured goodput."""


def story_lines(run: RunData) -> list[str]:
    """The story of a run as lines: where it began, each decision with its alternatives, and what it amounts to."""
    if not run.metrics:
        return ["no steps yet: there is nothing to explain"]
    policy = run.config.get("policy") or {}
    reference = run.plan.get("reference_batch", run.metrics[0]["global_batch"])
    lines = [
        (
            f"{human.printable(run.config.get('name') or 'run')}: policy {policy.get('name', 'fixed')}, "
            f"learning-rate rule {policy.get('rule', 'none')}, reference batch {human.count(reference)}"
        )
    ]
    told = decisions_told(run.decisions)
    decided = [record for record in run.decisions if record.get("event") == "decided"]
    for (step, kind, change, reason, promised, measured), record in zip(told, decided, strict=True):
        lines.append(f"step {step}: {kind}, batch {change}")
        lines.append(f"  because   {reason}")
        lines += _seen(record)
        if promised:
            lines.append(f"  promised  {promised} reference samples/s" + (f", measured {measured}" if measured else ""))
        lines += _alternatives(record)
    return [*lines, *_amounts_to(run, len(decided))]


def decisions_told(decisions: Sequence[Mapping[str, Any]]) -> list[Told]:
    """Each decision, with what was then measured of it."""
    told: list[Told] = []
    for record in decisions:
        if record.get("event") == "decided":
            promised = (record.get("then") or {}).get("goodput")
            told.append(
                (
                    human.count(record["step"]),
                    str(record["kind"]),
                    layout_change(record),
                    human.printable(record["reason"]),
                    "" if promised is None else human.number(promised),
                    "",
                )
            )
        elif told:  # a layout is measured before it is left
            told[-1] = (*told[-1][:-1], human.number(record["goodput"]))
    return told


def layout_change(record: Mapping[str, Any]) -> str:
    """What a decision changes, as in ``16 (2x8x1) -> 32 (2x16x1)``: workers x micro batch x accumulation."""
    before, after = (_layout(record[key]) for key in ("before", "layout"))
    return f"{before} -> {after}" if before != after else f"stays at {after}"


def _layout(layout: Mapping[str, Any]) -> str:
    return f"{human.count(_batch(layout))} ({layout['workers']}x{layout['micro_batch']}x{layout['accumulation']})"


def _batch(layout: Mapping[str, Any]) -> int:
    return int(layout["workers"] * layout["micro_batch"] * layout["accumulation"])


def _seen(record: Mapping[str, Any]) -> list[str]:
    seen = record.get("seen") or {}
    noise = seen.get("noise_scale")
    if not noise:
        return []
    high = noise.get("high")
    text = f"at least {human.number(noise['low'])}"
    if high is not None:
        text = f"{human.number(noise['value'])} ({human.number(noise['low'])} to {human.number(high)})"
    ambition = seen.get("ambition", 1.0)
    return [f"  seen      noise scale {text}" + (f", ambition {ambition:g}" if ambition != 1.0 else "")]


def _alternatives(record: Mapping[str, Any]) -> list[str]:
    return [
        f"  {'weighed' if index == 0 else '':<9} {_layout(one['layout'])}: {human.duration(one['step_time_s'])}, "
        f"a sample worth {one['efficiency']:.0%}, {human.number(one['goodput'])} reference samples/s"
        for index, one in enumerate(record.get("alternatives") or ())
    ]


def _amounts_to(run: RunData, decisions: int) -> list[str]:
    last, batches = run.metrics[-1], [r["global_batch"] for r in run.metrics]
    spent = sum(r["step_time_s"] for r in run.metrics)
    lines = [
        (
            f"in all: {decisions} decision{'' if decisions == 1 else 's'} in {human.count(last['step'])} steps, batch "
            f"{human.count(batches[0])} to {human.count(batches[-1])} (largest {human.count(max(batches))}), "
            f"{human.number(last['progress'] / spent)} reference samples/s over {human.duration(spent)} of steps"
        )
    ]
    reference = run.plan.get("reference_batch")
    at_reference = sorted(r["step_time_s"] for r in run.metrics if r["global_batch"] == reference)
    if reference and len(at_reference) >= 4 and max(batches) > reference:
        alone = last["progress"] / reference * at_reference[len(at_reference) // 2]
        lines.append(
            f"at the reference batch, at its own steps' median time, the same progress would have taken "
            f"{human.duration(alone)}: {alone / spent:.2f} times as long"
        )
    return lines


def replay_lines(replayed: Replayed, recorded_s: float) -> list[str]:
    """A replay as lines: its decisions, and its time against the recorded run's."""
    lines = [f"step {human.count(d.step)}: {d.kind}, batch {d.batch}: {d.reason}" for d in replayed.decisions]
    return [
        *lines,
        (
            f"{human.count(replayed.steps)} steps, {human.count(replayed.samples)} samples, "
            f"{human.duration(replayed.time_s)} predicted; recorded: {human.duration(recorded_s)}"
        ),
    ]
