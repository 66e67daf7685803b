"""A RayJob made of what the chart published and of a request; the API server itself is asked in tests/helm."""

from __future__ import annotations

import re
from typing import Any

import pytest

from orchestrator.errors import RequestError
from orchestrator.job import load
from orchestrator.launching.jobs import Extras
from orchestrator.launching.preflight import RunRequest
from orchestrator.launching.rayjobs import Published, make_rayjob

TEMPLATE: dict[str, Any] = {
    "kind": "RayJob",
    "metadata": {"name": "run"},
    "spec": {"entrypoint": "", "backoffLimit": 3},
}


SHARED: dict[str, Any] = {
    "kind": "RayJob",
    "metadata": {"name": "run"},
    "spec": {"entrypoint": "", "clusterSelector": {"ray.io/cluster": "team"}, "metadata": {"orchestrator_run": "run"}},
}


def rayjob(
    name: str, *overrides: str, extras: Extras | None = None, template: dict[str, Any] = TEMPLATE, queue: str = ""
) -> dict[str, Any]:
    request = RunRequest(job="jobs.vision:digits", overrides=(f"name={name}", *overrides))
    config = load(request.job, request.args, request.overrides).config
    return make_rayjob(Published(template, "s3://runs/team", queue), request, config, extras or Extras())


@pytest.mark.parametrize(
    ("name", "object_name"),
    [("digits", "digits"), ("mine_1.0", "mine-1-0"), ("7b", "run-7b"), ("7" * 42 + ".long", "run-" + "7" * 42)],
)
def test_any_name_of_a_run_is_one_of_an_object(name: str, object_name: str) -> None:
    made = rayjob(name)["metadata"]["name"]
    assert made == object_name
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", made)


def test_the_team_s_storage_is_used_unless_the_run_says_another() -> None:
    assert " --set checkpoint.uri=s3://runs/team --set name=a" in rayjob("a")["spec"]["entrypoint"]
    assert "s3://runs/team" not in rayjob("a", "checkpoint.uri=/mine")["spec"]["entrypoint"]


def test_on_the_team_s_cluster_a_run_is_in_a_queue_and_known_by_its_name() -> None:
    spec = rayjob("a_1", template=SHARED, queue="default")["spec"]
    assert spec["entrypoint"].endswith(" --set checkpoint.uri=s3://runs/team --set fleet.queue=default --set name=a_1")
    assert spec["entrypoint"].startswith("exec python -m orchestrator run ")
    assert spec["metadata"] == {"orchestrator_run": "a_1"}
    more = ("fleet.queue=team-a", "fleet.priority=5")
    command = rayjob("a", *more, template=SHARED, queue="default")["spec"]["entrypoint"]
    assert command.endswith(" --set name=a --set fleet.queue=team-a --set fleet.priority=5")
    assert "fleet.queue=default" not in command


def test_a_queue_is_refused_where_each_run_has_a_cluster_of_its_own() -> None:
    with pytest.raises(RequestError, match=r"fleet.queue='team-a': this release gives each run a cluster of its own"):
        rayjob("a", "fleet.queue=team-a")
    assert "fleet.queue" not in rayjob("a")["spec"]["entrypoint"]


def test_the_template_is_kept_and_not_changed() -> None:
    zipped = Extras(env=("A=b",), pip=("einops==0.8",), working_dir="s3://code/a.zip")
    spec = rayjob("a", extras=zipped)["spec"]
    assert spec["backoffLimit"] == 3
    assert spec["runtimeEnvYAML"] == "env_vars:\n  A: b\npip:\n- einops==0.8\nworking_dir: s3://code/a.zip\n"
    assert "runtimeEnvYAML" not in rayjob("a")["spec"]
    assert TEMPLATE["spec"] == {"entrypoint": "", "backoffLimit": 3}
    with pytest.raises(RequestError, match="the Kubernetes API takes no code"):
        rayjob("a", extras=Extras(working_dir="/code"))
