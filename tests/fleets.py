"""Made-up runs and clusters for the fleet's policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from orchestrator.fleet import Allocation, JobView
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel


def model(speed: float = 1.0, network_s: float = 0.02, timed: int | None = None) -> StepTimeModel:
    """Launches 20 ms and 2 ms a sample at speed 1; a network that costs ``network_s``, four times that across nodes."""
    seconds = (
        0.02 / speed,
        0.002 / speed,
        network_s / 2,
        network_s,
        network_s / 8,
        2 * network_s,
        4 * network_s,
        0.001,
    )
    parameters = (*map(float, np.log(seconds)), 0.0)
    if timed is None:
        return StepTimeModel(parameters)
    centre = tuple(float(np.log(value) / np.log(2.0)) for value in (16, timed, 1))
    return StepTimeModel(parameters, (centre,), (0.0,), (0.0,))  # type: ignore[arg-type]


def job(name: str = "run", **changes: Any) -> JobView:
    """A run of a few hours that was submitted ten minutes ago and waits."""
    age_s = changes.get("age_s", 600.0)
    known: dict[str, Any] = {
        "submitted_s": 10_000.0 - age_s,
        "age_s": age_s,
        "attained_device_s": 0.0,
        "restarts": 0,
        "restart_cost_s": 30.0,
        "progress": 0.0,
        "remaining_progress": 1e6,
        "step_time": {"gpu": model()},
        "noise_scale": 2000.0,
        "reference_batch": 64,
        "batch_range": (64, 4096),
        "micro_batch_range": (4, 256),
        "workers_range": (1, 16),
    }
    return JobView(name, **(known | changes))


NOW_S = 10_000.0


def nodes(**devices: tuple[int, int]) -> dict[str, tuple[str, int]]:
    """``nodes(gpu=(2, 8))``: two nodes of eight devices of type gpu."""
    return {f"{kind}-{index:02}": (kind, size) for kind, (count, size) in devices.items() for index in range(count)}


def running(view: JobView, where: Mapping[str, int], kind: str = "gpu", **changes: Any) -> JobView:
    """The same run, on these devices."""
    workers = sum(where.values())
    current = Allocation(kind, dict(where), Layout(workers, 16, 1))
    facts = vars(view) | {"current": current, "attained_device_s": 600.0 * workers} | changes
    return JobView(**facts)


TYPES = ("gpu", "old")


@st.composite
def clusters(draw: st.DrawFn, most_nodes: int = 3) -> dict[str, tuple[str, int]]:
    """One or two types on a few nodes, of odd sizes as well."""
    found = {}
    for kind in TYPES[: draw(st.integers(1, 2))]:
        for index in range(draw(st.integers(1, most_nodes))):
            found[f"{kind}-{index}"] = (kind, draw(st.sampled_from([1, 2, 3, 4, 8])))
    return found


@st.composite
def fleets(
    draw: st.DrawFn, most_jobs: int = 6, *, avoiding: bool = False
) -> tuple[list[JobView], dict[str, tuple[str, int]]]:
    """Runs of all kinds, some of which already run somewhere, on a cluster; ``avoiding``: some avoid nodes."""
    cluster = draw(clusters())
    nodes_to_avoid = st.sets(st.sampled_from([*sorted(cluster), "gone"]), max_size=3) if avoiding else st.just(set())
    free = {name: devices for name, (_, devices) in cluster.items()}
    jobs = []
    for index in range(draw(st.integers(1, most_jobs))):
        low = draw(st.sampled_from([1, 1, 1, 2, 3]))
        age_s = draw(st.floats(0.0, 5000.0))
        view = job(
            f"run-{index}",
            age_s=age_s,
            attained_device_s=draw(st.sampled_from([0.0, 100.0, 5000.0])),
            restarts=draw(st.integers(0, 4)),
            restart_cost_s=draw(st.sampled_from([0.0, 30.0, 300.0])),
            progress=draw(st.sampled_from([0.0, 1e5])),
            remaining_progress=draw(st.sampled_from([None, 1e3, 1e5, 1e7])),
            step_time=draw(
                st.sampled_from(
                    [None, {}, {"gpu": model()}, {"gpu": model(2.0), "old": model(0.5)}, {"old": model(1.0, timed=1)}]
                )
            ),
            noise_scale=draw(st.sampled_from([None, 10.0, 1e4, float("inf")])),
            workers_range=(low, draw(st.integers(low, 16))),
            priority=draw(st.integers(-1, 2)),
            queue=draw(st.sampled_from(["a", "b", "c"])),
            deadline_s=draw(st.sampled_from([None, NOW_S + 600.0, NOW_S - 1.0])),
            avoid=frozenset(draw(nodes_to_avoid)),
        )
        if draw(st.booleans()):
            name = draw(st.sampled_from(sorted(cluster)))
            count = draw(st.integers(1, cluster[name][1]))
            if low <= count <= min(free[name], view.workers_range[1]):
                free[name] -= count
                attained = max(view.attained_device_s, 1.0)
                view = running(view, {name: count}, cluster[name][0], attained_device_s=attained)
        jobs.append(view)
    return jobs, cluster
