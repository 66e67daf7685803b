"""The fleet's service in this process, without a cluster: who decides how it works, and what outlives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import StorageConfig
from orchestrator.errors import ConfigError
from orchestrator.launching.fleet import FleetActor, FleetSettings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FleetSettings:
    """As a first run would bring them, on a cluster without machines."""
    monkeypatch.setattr("orchestrator.launching.fleet._cluster", lambda: "head-6379")
    monkeypatch.setattr("orchestrator.launching.fleet._hosts", lambda _: {})
    return FleetSettings("goodput", str(tmp_path / "runs" / ".fleet"), StorageConfig())


def test_the_head_s_environment_stands_over_the_first_run(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.under({"ORCHESTRATOR_FLEET_POLICY": "", "OTHER": "fair"}) == settings
    monkeypatch.setenv("ORCHESTRATOR_FLEET_POLICY", "fair")
    monkeypatch.setenv("ORCHESTRATOR_FLEET_URI", str(tmp_path / "shared"))
    monkeypatch.setenv("ORCHESTRATOR_FLEET_QUOTAS", "team-a=4, team-b=2")
    queue = FleetActor(settings).queue()
    assert (queue.policy, queue.quotas) == ("fair", {"team-a": 4, "team-b": 2})
    assert queue.book == f"{tmp_path}/shared/head-6379.json"


def test_a_store_of_the_environment_is_found_by_its_own_address(
    settings: FleetSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    assert settings.under({"ORCHESTRATOR_FLEET_URI": "s3://b/.fleet"}).storage.endpoint_url == "http://store:9000"
    assert settings.under({}).storage.endpoint_url is None


def test_what_people_set_outlives_the_service_until_the_environment_says_something_new(
    settings: FleetSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_FLEET_QUOTAS", "team-a=4,team-b=2")
    first = FleetActor(settings)
    first.quota("team-a", 1)
    first.quota("team-c", 3)
    assert FleetActor(settings).queue().quotas == {"team-a": 1, "team-b": 2, "team-c": 3}
    monkeypatch.setenv("ORCHESTRATOR_FLEET_QUOTAS", "team-a=8,team-b=2")
    second = FleetActor(settings)
    assert second.queue().quotas == {"team-a": 8, "team-b": 2, "team-c": 3}
    second.quota("team-a", None)
    assert FleetActor(settings).queue().quotas == {"team-b": 2, "team-c": 3}


@pytest.mark.parametrize("text", ["team-a", "team-a=", "=4", "team-a=-1", "team-a=2.5", "a=1,a=2"])
def test_quotas_that_cannot_be_read_are_said(
    settings: FleetSettings, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_FLEET_QUOTAS", text)
    with pytest.raises(ConfigError, match=r"cannot read .*: write team-a=4,team-b=2, each queue once"):
        FleetActor(settings).queue()
