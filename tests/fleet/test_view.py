"""What a fleet policy sees is checked where it is made."""

from __future__ import annotations

import pytest

from fleets import job
from orchestrator.errors import ConfigError
from orchestrator.fleet import Allocation, Node, Nodes
from orchestrator.planning.layout import Layout


def test_nodes_come_in_the_order_of_their_names() -> None:
    nodes = Nodes({"b": ("gpu", 8), "a": ("gpu", 4)})
    assert list(nodes.items()) == [("a", Node("gpu", 4)), ("b", Node("gpu", 8))]
    assert len(nodes) == 2
    assert nodes["b"].devices == 8
    assert Nodes(nodes)["a"] == nodes["a"]


@pytest.mark.parametrize("devices", [-1, 1.5])
def test_a_node_has_a_whole_number_of_devices(devices: float) -> None:
    with pytest.raises(ConfigError, match=r"node a: .* whole number, 0 or more"):
        Nodes({"a": ("gpu", devices)})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["batch_range", "micro_batch_range", "workers_range"])
@pytest.mark.parametrize("value", [(4, 2), (0, 2)])
def test_ranges_rise_from_one(name: str, value: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"run run: {name} is \({value[0]}, {value[1]}\); give two rising numbers"):
        job(**{name: value})


def test_allocations_are_equal_whatever_their_reasons() -> None:
    layout = Layout(4, 16, 1)
    one = Allocation("gpu", {"a": 3, "b": 1}, layout, ("because",))
    assert one == Allocation("gpu", {"b": 1, "a": 3}, layout)
    assert one.devices == 4
