"""A RayJob made of what the chart published and of a request; the API server itself is asked in tests/helm."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kube import CHART
from orchestrator.errors import RequestError
from orchestrator.job import load
from orchestrator.launching.jobs import Extras
from orchestrator.launching.preflight import RunRequest
from orchestrator.launching.rayjobs import SECRETIVE, Published, make_rayjob, shape_of
from orchestrator.planning.cluster import ClusterShape

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


def test_the_driver_has_the_cpus_that_are_asked_for_and_else_the_chart_s() -> None:
    charts: dict[str, Any] = {**TEMPLATE, "spec": {**TEMPLATE["spec"], "entrypointNumCpus": 1}}
    assert rayjob("a", template=charts)["spec"]["entrypointNumCpus"] == 1
    assert rayjob("a", template=charts, extras=Extras(cpus=2.0))["spec"]["entrypointNumCpus"] == 2
    assert rayjob("a", template=charts, extras=Extras(cpus=0.0))["spec"]["entrypointNumCpus"] == 0


def test_what_would_set_a_run_back_at_each_retry_is_refused() -> None:
    request = RunRequest(job="jobs.vision:digits", fresh=True)
    config = load(request.job).config
    with pytest.raises(RequestError, match="--fresh: a RayJob is started again after a loss"):
        make_rayjob(Published(TEMPLATE), request, config, Extras())


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "HF_TOKEN", "token"])
def test_a_credential_is_not_written_into_a_rayjob(name: str) -> None:
    with pytest.raises(RequestError, match=f"--env {name} looks like a credential") as refused:
        rayjob("a", extras=Extras(env=("NCCL_DEBUG=INFO", f"{name}=hidden")))
    assert "hidden" not in str(refused.value)
    assert rayjob("a", extras=Extras(env=("TOKENIZERS_PARALLELISM=false", "KEYS=1")))


def test_names_of_credentials_are_those_of_the_chart() -> None:
    assert f'regexMatch "{SECRETIVE.pattern}"' in (CHART / "templates" / "_checks.tpl").read_text()


def group(replicas: int, *, hosts: int = 1, start: dict[str, str] | None = None, **limits: str) -> dict[str, Any]:
    names = {"gpu": "nvidia.com/gpu", "mig": "nvidia.com/mig-1g.10gb", "tpu": "google.com/tpu"}
    resources = {"limits": {names.get(name, name): value for name, value in limits.items()}}
    template = {"spec": {"containers": [{"resources": resources}]}}
    sizes = {"replicas": replicas, "maxReplicas": 4 * replicas, "numOfHosts": hosts}
    return {**sizes, "rayStartParams": start or {}, "template": template}


def test_the_shape_is_what_ray_announces_of_the_pods() -> None:
    head = group(1, cpu="8", start={"num-cpus": "0"})
    assert shape_of({"headGroupSpec": head}) == ClusterShape(nodes=1, cpus=0)
    workers = [
        group(2, cpu="1500m"),
        group(1, cpu="24", gpu="2"),
        group(1, cpu="4", mig="3"),
        group(1, hosts=4, cpu="8", tpu="4"),
        group(1, cpu="16", gpu="8", start={"num-cpus": "2", "num-gpus": "1"}),
    ]
    spec = {"headGroupSpec": head, "workerGroupSpecs": workers}
    expected = ClusterShape(nodes=10, cpus=2 * 2 + 24 + 4 + 4 * 8 + 2, accelerators=2 + 3 + 1, tpus=16)
    assert shape_of(spec) == expected


def test_the_team_s_cluster_counts_with_what_its_autoscaler_may_add_and_a_run_s_own_as_it_begins() -> None:
    spec = {"headGroupSpec": group(1, cpu="1", start={"num-cpus": "0"}), "workerGroupSpecs": [group(2, cpu="3")]}
    grows = {**spec, "enableInTreeAutoscaling": True}
    own = {**TEMPLATE, "spec": {**TEMPLATE["spec"], "rayClusterSpec": grows}}
    shapes = [Published(SHARED, team=grows).shape, Published(SHARED, team=spec).shape, Published(own).shape]
    assert [shape and shape.cpus for shape in shapes] == [24, 6, 6]
    assert Published(SHARED).shape is None, "a chart from before does not say"
