"""What an elastic run asks Ray for: workers in numbers that share its batch, and no resize before it has saved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from orchestrator.launching.elastic import Sharing


class Cluster:
    """How many workers there is room for, and the step of the newest checkpoint; no Ray behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1
        self.saved: int | None = 10
        self.resizes = 0
        look: dict[str, Any] = {"num_workers": (1, 8), "elastic_resize_monitor_interval_s": 0.0}
        config = ScalingConfig(**look, resources_per_worker={"CPU": 1})
        self.policy = Sharing(config, (1, 2, 4, 8), (), lambda: self.saved, self.resized)
        monkeypatch.setattr(self.policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(self.policy, "_get_reserved_resources", lambda: {"node": {"CPU": float(self.room)}})

    def resized(self) -> None:
        self.resizes += 1

    def looked_at(self, workers: int) -> int | None:
        """What is decided for so many running workers: another number, or None."""
        group: Any = SimpleNamespace(start_time=float("-inf"), num_workers=workers)
        decision = self.policy.make_decision_for_running_worker_group(
            worker_group_state=group, worker_group_status=SimpleNamespace()
        )
        assert isinstance(decision, NoopDecision | ResizeDecision)
        return decision.num_workers if isinstance(decision, ResizeDecision) else None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@pytest.mark.parametrize(("room", "workers"), [(1, 1), (3, 2), (7, 4), (20, 8)])
def test_a_group_starts_with_the_most_that_share_the_batch(cluster: Cluster, room: int, workers: int) -> None:
    cluster.room = room
    decision = cluster.policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == workers


@pytest.mark.parametrize(("avoided", "workers"), [((), 1), (("w1",), 2), (("w1", "w3"), 2), (("w2", "w3"), 4)])
def test_a_node_that_is_to_be_left_is_no_room(
    monkeypatch: pytest.MonkeyPatch, avoided: tuple[str, ...], workers: int
) -> None:
    """Ray's reservations name one CPU, and know nothing of nodes that are avoided."""
    nodes = [("w1", 5.0, True), ("w2", 2.0, True), ("w3", 9.0, False)]
    alive = [{"NodeID": name, "Resources": {"CPU": cpus}, "Alive": alive} for name, cpus, alive in nodes]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    monkeypatch.setattr(ElasticScalingPolicy, "_maybe_send_resource_request", lambda _: None)
    monkeypatch.setattr(ElasticScalingPolicy, "_get_reserved_resources", lambda _: {"w1": {"CPU": 1.0}})
    look: dict[str, Any] = {"num_workers": (1, 8), "elastic_resize_monitor_interval_s": 0.0}
    policy = Sharing(
        ScalingConfig(**look, resources_per_worker={"CPU": 1}), (1, 2, 4, 8), avoided, lambda: 0, lambda: None
    )
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == workers


def test_a_group_grows_once_it_has_saved(cluster: Cluster) -> None:
    assert cluster.looked_at(1) is None
    cluster.room = 5
    assert [cluster.looked_at(1) for _ in range(3)] == [None] * 3
    cluster.saved = 20
    assert cluster.looked_at(1) == 4
    assert cluster.looked_at(4) is None, "there it is"
    assert cluster.resizes == 1, "said once, and not when it started"


def test_a_store_that_does_not_say_what_is_saved_keeps_a_group_as_it_is(cluster: Cluster) -> None:
    cluster.room, cluster.saved = 5, None
    assert [cluster.looked_at(1) for _ in range(3)] == [None] * 3
    cluster.saved = 10
    assert cluster.looked_at(1) is None, "room was found, but nothing is known to be newer than that"
    cluster.saved = None
    assert cluster.looked_at(1) is None
    cluster.saved = 20
    assert cluster.looked_at(1) == 4


def test_room_that_is_gone_again_is_not_grown_into(cluster: Cluster) -> None:
    cluster.room = 5
    assert cluster.looked_at(1) is None
    cluster.room, cluster.saved = 1, 20
    assert cluster.looked_at(1) is None
    cluster.room = 2
    assert cluster.looked_at(1) is None, "it waits for a checkpoint anew"
    cluster.saved = 30
    assert cluster.looked_at(1) == 2
