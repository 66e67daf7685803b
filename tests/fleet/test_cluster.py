"""Packed sizes, and which runs still stand where they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import job, nodes, running
from orchestrator.errors import ConfigError
from orchestrator.fleet.cluster import Fleet, packed_sizes


def test_powers_of_two_inside_a_node_and_whole_nodes_beyond() -> None:
    assert packed_sizes(1, 64, 8, 64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert packed_sizes(2, 20, 8, 64) == (2, 4, 8, 16)
    assert packed_sizes(1, 64, 6, 12) == (1, 2, 4, 6, 12)


def test_a_run_that_no_packed_size_suits_gets_its_smallest() -> None:
    assert packed_sizes(3, 3, 8, 64) == (3,)
    assert packed_sizes(10, 12, 8, 64) == (10,)
    assert packed_sizes(10, 12, 8, 8) == ()


@given(st.integers(1, 40), st.integers(0, 600), st.sampled_from([1, 2, 4, 8, 6]), st.integers(1, 64))
def test_sizes_keep_to_their_range_and_to_the_cluster(low: int, more: int, node: int, count: int) -> None:
    found = packed_sizes(low, low + more, node, node * count)
    assert list(found) == sorted(set(found))
    assert all(low <= size <= min(low + more, node * count) for size in found)
    assert bool(found) == (low <= node * count)


def test_a_run_stands_where_its_nodes_are_there_and_have_room() -> None:
    here = running(job("a"), {"gpu-00": 6})
    crowded = running(job("b"), {"gpu-00": 4})
    lost = running(job("c"), {"gpu-07": 1})
    wrong = running(job("d"), {"gpu-01": 1}, kind="old")
    fleet = Fleet.of([wrong, lost, crowded, here], nodes(gpu=(2, 8)))
    assert [view.name for view in fleet.jobs] == ["a", "b", "c", "d"]
    assert fleet.current == (here.current, None, None, None)


def test_two_runs_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two runs are called x"):
        Fleet.of([job("x"), job("x")], nodes(gpu=(1, 8)))
