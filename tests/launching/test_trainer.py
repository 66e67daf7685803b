"""Without which nodes a run would still have room, from what Ray says of them."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from gloo_jobs import toy_config
from orchestrator.config import ScaleConfig
from orchestrator.launching.trainer import spare_nodes
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan, make_plan


def plan_on(accelerator: str) -> Plan:
    scale = ScaleConfig(workers=2, accelerators_per_worker=0 if accelerator == "cpu" else 1)
    config = toy_config(layout={"zero_stage": "auto", "precision": "auto"}).model_copy(update={"scale": scale})
    shape = ClusterShape.imagine(scale, accelerator_named(accelerator), workers=2)
    return make_plan(config, shape, train_samples=96, evaluation_samples=0)


@pytest.mark.parametrize(
    ("accelerator", "workers", "nodes", "spare"),
    [
        ("cpu", 2, {"a": {"CPU": 2}, "b": {"CPU": 2}, "head": {}}, {"a", "b", "head"}),
        ("cpu", 3, {"a": {"CPU": 2}, "b": {"CPU": 2}, "head": {}}, {"head"}),
        ("cpu", 2, {"a": {"CPU": 1.5}, "b": {"CPU": 1.5}, "c": {"CPU": 1}}, {"a", "b", "c"}),
        ("cpu", 3, {"a": {"CPU": 1.5}, "b": {"CPU": 1.5}, "c": {"CPU": 1}}, set()),
        ("cpu", (1, 4), {"a": {"CPU": 2}, "b": {"CPU": 2}}, {"a", "b"}),
        ("cpu", 2, {"a": {"CPU": 2}, "b": {"CPU": 2}, "dead": {"CPU": 9}}, {"a", "b"}),
        ("a100-40gb", 2, {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 64}}, {"b"}),
        ("a100-40gb", 2, {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 8, "GPU": 4}}, {"a", "b"}),
    ],
)
def test_a_node_is_spare_if_the_others_have_room(
    accelerator: str, workers: Any, nodes: dict[str, Any], spare: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"NodeID": name, "Alive": name != "dead", "Resources": has} for name, has in nodes.items()]
    monkeypatch.setattr(ray, "nodes", lambda: said)
    assert spare_nodes(plan_on(accelerator), ScaleConfig(workers=workers)) == spare


def test_what_is_avoided_already_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 2}} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: said)
    assert spare_nodes(plan_on("cpu"), ScaleConfig(workers=2), ["a"]) == {"b", "c"}
    assert spare_nodes(plan_on("cpu"), ScaleConfig(workers=4), ["a"]) == set()
    assert spare_nodes(plan_on("cpu"), ScaleConfig(workers=4), ["a"], fewest=2) == {"b", "c"}
