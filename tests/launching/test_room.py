"""What a run says while Ray has no place for its workers."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.launching import room
from orchestrator.launching.room import Room


class Cluster:
    """Placement groups, resources and a clock that the test sets; no Ray behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[dict[str, Any]] = []
        self.free = {"CPU": 1.0}
        self.now = 0.0
        self.driver = "01000000"
        monkeypatch.setattr(room, "placement_group_table", self._table)
        monkeypatch.setattr("ray.available_resources", lambda: self.free)
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})

    def _table(self) -> dict[str, dict[str, Any]]:
        return {f"{number:028x}{self.driver}": group for number, group in enumerate(self.groups)}

    def has(self, state: str, *bundles: dict[str, float]) -> None:
        self.groups = [{"state": state, "bundles": dict(enumerate(bundles))}]

    def said(self, watching: Room, until: float) -> list[float]:
        """When it says something, asked five times a second."""
        found = []
        while self.now < until:
            self.now = round(self.now + 0.2, 1)
            if watching.wanting() is not None:
                found.append(self.now)
        return found


def room_for(resources: dict[str, float], **options: Any) -> Room:
    return Room(resources, driver="01000000", **options)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_it_says_what_is_wanted_and_what_is_free(cluster: Cluster) -> None:
    watching = room_for({"CPU": 1.5, "GPU": 1.0}, clock=lambda: cluster.now)
    cluster.has("PENDING", *[{"CPU": 1.5, "GPU": 1.0}] * 2)
    assert watching.wanting() is None
    cluster.now = 5.0
    assert watching.wanting() is None
    cluster.now = 10.0
    assert watching.wanting() == (
        "waiting for room for 2 workers with 1.5 CPU and 1 GPU each: free are 1 of 4 CPU, 0 of 2 GPU; others use the "
        "rest, or the nodes that are left are too small (`ray status`)"
    )


def test_it_says_so_again_each_minute(cluster: Cluster) -> None:
    watching = room_for({"CPU": 1}, clock=lambda: cluster.now)
    cluster.has("PENDING", {"CPU": 1.0})
    first, *later = cluster.said(watching, 200.0)
    assert 10.0 <= first <= 16.0
    assert [round((moment - first) / 60.0, 1) for moment in later] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("state", "bundle"), [("CREATED", {"CPU": 1.0}), ("REMOVED", {"CPU": 1.0}), ("PENDING", {"CPU": 2.0})]
)
def test_it_is_silent_where_workers_have_a_place(cluster: Cluster, state: str, bundle: dict[str, float]) -> None:
    """And where others wait for theirs."""
    watching = room_for({"CPU": 1}, clock=lambda: cluster.now)
    cluster.has(state, bundle)
    assert cluster.said(watching, 100.0) == []


def test_an_elastic_run_waits_for_its_fewest_workers_without_asking_for_a_place(cluster: Cluster) -> None:
    watching = room_for({"CPU": 1}, fewest=2, clock=lambda: cluster.now)
    cluster.has("CREATED", {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0})
    assert cluster.said(watching, 100.0) == []
    cluster.groups = []
    first, second = cluster.said(watching, 200.0)
    assert 125.0 <= first <= 136.0
    assert second == pytest.approx(first + 60.0, abs=0.5)
    cluster.now = 260.0
    assert "room for at least 2 workers with 1 CPU each" in str(watching.wanting())


def test_patience_begins_anew_after_a_place_was_found(cluster: Cluster) -> None:
    watching = room_for({"CPU": 1, "GPU": 0}, clock=lambda: cluster.now)
    cluster.has("PENDING", {"CPU": 1.0})
    assert cluster.said(watching, 9.0) == []
    cluster.groups = []
    assert cluster.said(watching, 15.0) == []
    cluster.has("PENDING", {"CPU": 1.0})
    assert cluster.said(watching, 22.0) == []
    assert len(cluster.said(watching, 40.0)) == 1


def test_another_run_of_the_same_shape_is_not_its_own(cluster: Cluster) -> None:
    """Neither does its place hide what this one wants, nor is its waiting told as this one's."""
    cluster.driver = "02000000"
    cluster.has("CREATED", {"CPU": 1.0})
    assert len(cluster.said(room_for({"CPU": 1}, fewest=2, clock=lambda: cluster.now), 50.0)) == 1
    cluster.has("PENDING", {"CPU": 1.0})
    assert cluster.said(room_for({"CPU": 1}, clock=lambda: cluster.now), 150.0) == []
