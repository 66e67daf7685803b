"""How many workers a cluster holds, and what is said where it holds too few."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import ScaleConfig
from orchestrator.errors import ClusterError
from orchestrator.planning.cluster import ClusterShape

TWO_CPUS = ClusterShape(nodes=1, cpus=2)
GPUS = ClusterShape(nodes=2, cpus=32, accelerators=4, accelerator="A100")


@given(st.integers(0, 64), st.integers(0, 16), st.integers(1, 20), st.integers(0, 20), st.sampled_from([0.5, 1, 3, 8]))
def test_workers_lie_in_their_range_and_in_the_cluster(
    cpus: int, accelerators: int, low: int, more: int, cpus_each: float
) -> None:
    """As many as fit; refused only where not even the fewest do."""
    shape = ClusterShape(nodes=1, cpus=cpus, accelerators=accelerators)
    scale = ScaleConfig(workers=(low, low + more), cpus_per_worker=cpus_each)
    each = shape.accelerators_per_worker(scale)

    def fit(workers: int) -> bool:
        return workers * cpus_each <= cpus and workers * each <= accelerators

    try:
        workers = shape.workers(scale)
    except ClusterError:
        assert not fit(low)
        return
    assert low <= workers <= low + more
    assert fit(workers)
    assert workers == low + more or not fit(workers + 1)


@pytest.mark.parametrize(
    ("asked", "shape", "each"),
    [("auto", TWO_CPUS, 0), ("auto", GPUS, 1), (0, GPUS, 0), (1, TWO_CPUS, 1), (1, GPUS, 1)],
)
def test_accelerators_are_taken_where_there_are_any(asked: int | str, shape: ClusterShape, each: int) -> None:
    assert shape.accelerators_per_worker(ScaleConfig(accelerators_per_worker=asked)) == each


def test_tpus_are_refused_and_never_replaced_by_cpus_in_silence() -> None:
    pod = ClusterShape(nodes=4, cpus=400, accelerator="TPU-V5P", tpus=16)
    with pytest.raises(ClusterError, match=r"are 16 TPUs, and DeepSpeed.* or scale.accelerators_per_worker=0"):
        pod.workers(ScaleConfig(workers=4))
    assert pod.workers(ScaleConfig(workers=4, accelerators_per_worker=0)) == 4


def test_tenths_of_a_cpu_fill_it() -> None:
    """Though 4.1 / 0.1 is a little less than 41."""
    assert ClusterShape(nodes=1, cpus=4.1).workers(ScaleConfig(workers=(1, 99), cpus_per_worker=0.1)) == 41


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        (
            TWO_CPUS,
            {"workers": 3},
            (
                "scale.workers=3 needs 1 CPU and 0 accelerators each, and the cluster has 2 CPUs and 0 accelerators "
                "on 1 node(s): set scale.workers=2, or a smaller scale.cpus_per_worker (now 1)"
            ),
        ),
        (
            TWO_CPUS,
            {"workers": (4, 8), "cpus_per_worker": 0.6},
            (
                "scale.workers=4 needs 0.6 CPU and 0 accelerators each, and the cluster has 2 CPUs and 0 accelerators "
                "on 1 node(s): set scale.workers=3, or a smaller scale.cpus_per_worker (now 0.6)"
            ),
        ),
        (
            TWO_CPUS,
            {"workers": 1, "cpus_per_worker": 4},
            (
                "scale.workers=1 needs 4 CPU and 0 accelerators each, and the cluster has 2 CPUs and 0 accelerators "
                "on 1 node(s): set a smaller scale.cpus_per_worker (now 4), or use a larger cluster"
            ),
        ),
        (
            TWO_CPUS,
            {"workers": 2, "accelerators_per_worker": 1},
            (
                "scale.workers=2 needs 1 CPU and 1 accelerators each, and the cluster has 2 CPUs and 0 accelerators "
                "on 1 node(s): set scale.accelerators_per_worker=0, or use a larger cluster"
            ),
        ),
        (
            GPUS,
            {"workers": 8},
            (
                "scale.workers=8 needs 1 CPU and 1 accelerators each, and the cluster has 32 CPUs and 4 accelerators "
                "on 2 node(s): set scale.workers=4, or scale.accelerators_per_worker=0"
            ),
        ),
    ],
    ids=["cpus", "a-range", "one-is-too-large", "no-accelerator", "too-few-accelerators"],
)
def test_refusals(shape: ClusterShape, fields: dict, message: str) -> None:
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}$"):
        shape.workers(ScaleConfig(**fields))
