"""What a group finds out about itself: laws of the judgement, and real ranks of which one is really slow."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from gloo import GlooGroup
from orchestrator.config import HealthConfig
from orchestrator.errors import UnhealthyNodeError
from orchestrator.training import health
from orchestrator.training.health import Figures, Health, examine, judge, leave_slow_node, measures_rates, rounds

CONFIG = HealthConfig(rates=True)
STOPPED_S = 5.0
RATES = st.floats(1e6, 1e15)


def rank(number: int, **figures: float | str | None) -> Figures:
    told = {"node": f"n{number}", "host": f"h{number}", "device": "cpu", "clock_offset_s": 0.0}
    told |= {"memory_free_bytes": 2**36, "disk_free_bytes": 2**40, **figures}
    return Figures(rank=number, **told)  # type: ignore[arg-type]


def group(*rates: float) -> list[Figures]:
    return [rank(number, matmul_flops_per_s=rate) for number, rate in enumerate(rates)]


def slow(ranks: list[Figures], config: HealthConfig = CONFIG) -> list[int]:
    return [finding.rank for finding in judge(ranks, config) if finding.kind == "slow"]


# -- the judgement -----------------------------------------------------------------------------


@given(st.lists(RATES, min_size=1, max_size=20), st.floats(0.1, 0.9))
def test_who_is_named_is_below_its_share_of_the_median(rates: list[float], factor: float) -> None:
    named = slow(group(*rates), HealthConfig(slow_factor=factor))
    assert len(named) <= len(rates) // 2
    fastest_named = max((rates[number] for number in named), default=0.0)
    others = [rate for number, rate in enumerate(rates) if number not in named]
    assert all(rate > fastest_named for rate in others)
    assert rates.index(max(rates)) not in named


@given(st.lists(RATES, min_size=2, max_size=20), st.floats(1e-3, 1e3))
def test_what_counts_is_the_ratio_alone(rates: list[float], scale: float) -> None:
    clear = [rate for rate in rates if all(abs(rate / other - 0.5) > 1e-6 for other in rates)]
    assert slow(group(*clear)) == slow(group(*[rate * scale for rate in clear]))


@given(st.lists(st.floats(0.6e9, 1.0e9), min_size=2, max_size=20), st.data())
def test_one_rank_that_is_far_behind_is_named_and_no_other(rates: list[float], data: st.DataObject) -> None:
    behind = data.draw(st.integers(0, len(rates) - 1))
    assert slow(group(*rates)) == []
    rates[behind] = 0.2e9
    assert slow(group(*rates)) == [behind]


def test_what_is_said_of_a_slow_rank() -> None:
    (finding,) = judge(group(1e12, 1e11, 1e12), CONFIG)
    assert finding.text == (
        "rank 1 (node n1, host h1) is far behind the others: "
        "1e+11 FLOP/s in matrix products, where 1e+12 are the median"
    )
    assert finding.node == "n1"


def test_two_ranks_share_their_link_and_cpus_their_memory() -> None:
    pair = [rank(0, link_bytes_per_s=1e9), rank(1, link_bytes_per_s=1e7, memory_free_bytes=1)]
    assert judge(pair, CONFIG) == ()
    assert slow([rank(n, link_bytes_per_s=value) for n, value in enumerate((1e9, 1e7, 1e9))]) == [1]
    assert slow([rank(n, device=f"cuda:{n}", memory_free_bytes=value) for n, value in enumerate((80, 20))]) == [1]


def test_a_clock_and_a_disk_are_said_once_for_each_node() -> None:
    ranks = [rank(0), *(rank(n, node="n1", clock_offset_s=-5.0, disk_free_bytes=2**29) for n in (1, 2))]
    assert [(finding.kind, finding.rank) for finding in judge(ranks, CONFIG)] == [("clock", 1), ("disk", 1)]
    clock, disk = judge(ranks, CONFIG)
    assert clock.text.startswith("the clock of rank 1 (node n1, host h1) is 5.0 s behind the others': ")
    assert clock.text.endswith("synchronise it (chrony, NTP)")
    assert disk.text.startswith("0.5 GiB of disk are left for checkpoints on rank 1 (node n1, host h1): make room, or ")


def test_a_small_run_on_one_host_measures_no_rates() -> None:
    assert not measures_rates(HealthConfig(), device="cpu", nodes=1)
    assert measures_rates(HealthConfig(), device="cpu", nodes=2)
    assert measures_rates(HealthConfig(), device="cuda", nodes=1)
    assert not measures_rates(HealthConfig(rates=False), device="cuda", nodes=2)


# -- who exchanges with whom -------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=24))
def test_every_rank_has_two_neighbours_and_one_at_a_time(nodes: list[str]) -> None:
    found = rounds(nodes)
    neighbours: dict[int, set[int]] = {number: set() for number in range(len(nodes))}
    for pairs in found:
        busy = [number for pair in pairs for number in pair]
        assert len(set(busy)) == len(busy)
        for first, second in pairs:
            neighbours[first].add(second)
            neighbours[second].add(first)
    assert all(len(others) == min(2, len(nodes) - 1) for others in neighbours.values())


@given(st.integers(2, 4), st.integers(1, 8))
def test_every_link_leaves_its_node_where_there_are_several(count: int, each: int) -> None:
    nodes = [node for node in "abcd"[:count] for _ in range(each)]
    assert all(nodes[first] != nodes[second] for pairs in rounds(nodes) for first, second in pairs)


# -- real ranks --------------------------------------------------------------------------------


def examined(folder: Path, nodes: list[str]) -> Health:
    """Rank 1 is stopped for whole seconds between two matrix products, where milliseconds are usual for one.

    So it is behind whatever else this machine has to do, which takes from both; its best would not be.
    """
    calls = itertools.count()

    def stopped(*operands: Any) -> None:
        if next(calls) % 3 == 2:  # after one to warm up and one that counts
            time.sleep(STOPPED_S)
        multiply(*operands)

    multiply = health._multiply
    with mock.patch.object(health, "_multiply", stopped if dist.get_rank() == 1 else multiply):
        return examine(torch.device("cpu"), folder, CONFIG, nodes=nodes)


def left(room: frozenset[str]) -> tuple[list[tuple[str, str]], str]:
    """Of ranks 0 and 1 the second is slow: what is told, and which node is left."""
    told: list[tuple[str, str]] = []
    ranks = tuple(group(1e12, 1e10))
    try:
        leave_slow_node(Health(ranks, judge(ranks, CONFIG), 0.0), lambda: room, lambda *event: told.append(event))
    except UnhealthyNodeError as error:
        dist.barrier()  # where the other rank waits, until Ray ends it
        return told, error.node
    return told, ""


@pytest.mark.slow
def test_a_slow_node_is_left_by_its_own_rank_if_there_is_room(two: GlooGroup) -> None:
    assert two.run(left, frozenset({"n0", "n1"})) == [([], ""), ([], "n1")]
    stays = [("health_no_room", "there is no room without node n1: going on with it")]
    assert two.run(left, frozenset({"n0"})) == [(stays, ""), (stays, "")]


@pytest.mark.slow
def test_a_rank_that_is_throttled_is_named(two: GlooGroup, tmp_path: Path) -> None:
    first, second = two.run(examined, tmp_path, ["here", "there"])
    assert (first.ranks, first.findings) == (second.ranks, second.findings), "all ranks come to the same"
    assert [(finding.kind, finding.rank, finding.node) for finding in first.findings] == [("slow", 1, "there")]
    for figures in first.ranks:
        assert figures.link_bytes_per_s is not None
        assert figures.all_reduce_bytes_per_s is not None
        assert min(figures.link_bytes_per_s, figures.all_reduce_bytes_per_s, figures.memory_free_bytes) > 0
        assert figures.disk_free_bytes > 0
        assert abs(figures.clock_offset_s) < CONFIG.max_clock_skew_s
