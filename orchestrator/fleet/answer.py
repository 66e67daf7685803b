"""From places to the answer: the layout of each run, and why it has what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.placement import Placed
from orchestrator.fleet.rating import Options, options
from orchestrator.fleet.view import Allocation, Allocations, JobView
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.goodput import rate

__all__ = ["answer"]

WORTH_ANOTHER_LAYOUT = 1.05
"""Gain in goodput for which a run that keeps its devices is given another layout: it costs no restart, but a change."""


def answer(
    fleet: Fleet,
    rated: Options,
    placed: Mapping[int, Placed],
    notes: Mapping[int, Sequence[str]],
    waiting: Mapping[int, str],
) -> Allocations:
    """Say where every job runs, with which layout, and why; ``notes`` are further reasons."""
    layouts = _layouts(fleet, rated, placed)
    found: dict[str, Allocation | None] = {}
    why: dict[str, str] = {}
    for index, job in enumerate(fleet.jobs):
        if index not in placed:
            found[job.name] = None
            why[job.name] = waiting.get(index) or _why_waiting(fleet, rated, index)
            continue
        here = placed[index]
        reasons = (*_reasons(fleet, rated, index, here), *notes.get(index, ()))
        kind = fleet.types[here.choice.kind]
        found[job.name] = Allocation(kind, dict(sorted(here.where.items())), layouts[index], reasons)
    return Allocations(found, why)


def same_place(here: Allocation | None, device_type: str, where: Mapping[str, int]) -> bool:
    """Whether a run would stay on the devices it has."""
    return here is not None and here.device_type == device_type and dict(here.devices_per_node) == dict(where)


def _layouts(fleet: Fleet, rated: Options, placed: Mapping[int, Placed]) -> dict[int, Layout]:
    """Each run's layout: its batch at most doubles or halves at once, and stays where another one gains little."""
    found, too_far = {}, []
    for index, here in placed.items():
        job, now = fleet.jobs[index], fleet.current[index]
        layout = rated.layout(here.choice.row)
        if now is not None and not now.layout.global_batch / 2 <= layout.global_batch <= 2 * now.layout.global_batch:
            too_far.append(index)
        found[index] = layout
        if now is not None and same_place(now, fleet.types[here.choice.kind], here.where):
            found[index] = _kept(job, now, layout)
    for index, layout in _nearer(fleet, placed, [index for index in too_far if found[index] is not None]).items():
        now = fleet.current[index]
        if now is not None and found[index] != now.layout:
            found[index] = layout
    return found


def _kept(job: JobView, now: Allocation, layout: Layout) -> Layout:
    """The layout in use, unless it is no longer allowed or the other is worth a change."""
    low, high = job.batch_range
    fewest, most = job.micro_batch_range
    used = now.layout
    model = (job.step_time or {}).get(now.device_type)
    allowed = low <= used.global_batch <= high and fewest <= used.micro_batch <= most and used.workers == layout.workers
    if not allowed:
        return layout
    if model is None:
        return used
    noise = float(job.reference_batch) if job.noise_scale is None else job.noise_scale
    before, after = (
        rate(model, noise, job.reference_batch, len(now.devices_per_node), one).goodput for one in (used, layout)
    )
    return layout if after > WORTH_ANOTHER_LAYOUT * before else used


def _nearer(fleet: Fleet, placed: Mapping[int, Placed], jobs: Sequence[int]) -> dict[int, Layout]:
    """The best layouts with a batch within a factor of 2 of the one in use, where there is such a layout."""
    views = []
    for index in jobs:
        now, job = fleet.current[index], fleet.jobs[index]
        assert now is not None
        batch, workers = now.layout.global_batch, placed[index].choice.devices
        low, high = max(job.batch_range[0], -(-batch // 2)), min(job.batch_range[1], 2 * batch)
        if low <= high:
            views.append(replace(job, batch_range=(low, high), workers_range=(workers, workers), current=None))
    if not views:
        return {}
    narrowed = Fleet.of(views, fleet.nodes)
    rated = options(narrowed)
    by_name = {job.name: index for index, job in enumerate(narrowed.jobs)}
    found = {}
    for index in jobs:
        rows = rated.of(by_name[fleet.jobs[index].name]) if fleet.jobs[index].name in by_name else range(0)
        kind = placed[index].choice.kind
        mine = [row for row in rows if rated.kind[row] == kind]
        if mine:
            found[index] = rated.layout(mine[0])
    return found


def _reasons(fleet: Fleet, rated: Options, index: int, placed: Placed) -> tuple[str, ...]:
    job, now, choice = fleet.jobs[index], fleet.current[index], placed.choice
    kind = fleet.types[choice.kind]
    if same_place(now, kind, placed.where):
        first = f"keeps {choice.devices} {kind} where it is"
    elif now is None:
        first = (
            f"starts on {choice.devices} {kind}" if not job.attained_device_s else f"resumes on {choice.devices} {kind}"
        )
    elif placed.moved or (now.device_type == kind and now.devices == choice.devices):
        first = f"moves with {choice.devices} {kind}, to make room"
    else:
        first = f"goes from {now.devices} {now.device_type} to {choice.devices} {kind}"
    reasons = [first]
    if rated.timed[index]:
        reasons.append(f"goodput {rated.goodput[choice.row]:.4g} reference samples/s")
        if job.remaining_progress is not None:
            reasons.append(f"{job.remaining_progress / rated.goodput[choice.row]:.0f} s left at that")
    else:
        reasons.append("not timed yet: taken to speed up as others do")
    return tuple(reasons)


def _why_waiting(fleet: Fleet, rated: Options, index: int) -> str:
    job = fleet.jobs[index]
    if rated.of(index):
        return "others are worth more on the devices there are"
    if not any(job.workers_range[0] <= capacity for capacity in fleet.capacity):
        most = max(fleet.capacity, default=0)
        return f"needs {job.workers_range[0]} devices of one type, and there are {most}"
    if not any(fleet.sizes(job, kind, job.workers_range[0]) for kind in range(len(fleet.types))):
        needs = f"needs {job.workers_range[0]} devices"
        if avoided := ", ".join(sorted(job.avoid & set(fleet.nodes))):
            return f"{needs} on other nodes than {avoided}, where it has failed"
        return f"{needs} on whole nodes of the largest size and part of one more: the nodes there are do not hold that"
    return (
        f"no batch from {job.batch_range[0]} to {job.batch_range[1]} is a multiple of its workers x micro batch: widen "
        "the ranges"
    )
