"""The chart as Helm renders it: lint, presets, random values, refusals, and what must never be in an object."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import kube
from chart_values import MAKERS, random_values
from kube import CHART, Tools, objects
from orchestrator.config import NAME

pytestmark = [pytest.mark.k8s]

manifests = pytest.importorskip("manifests", reason="kubernetes-validate is not installed")
PRESETS = sorted((CHART / "presets").glob("*.yaml"))
RANDOM, AT_ONCE = 300, 50
JOB = {"jobs": {"digits": {"job": "jobs.vision:digits"}}}
LONG = "a-release-with-a-very-long-name-indeed-it-is-too-long"


@pytest.fixture(scope="module")
def schemas() -> Any:
    folder = kube.crds_folder()
    if folder is None:
        pytest.skip("no CRDs: set ORCHESTRATOR_TEST_DATA to a folder that holds crds/ray.io_*.yaml")
    return manifests.Schemas(folder)


@pytest.fixture(scope="module")
def random_objects(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What some hundred random installations consist of; one call of Helm renders many, as aliased dependencies."""
    found = []
    for first in range(0, RANDOM, AT_ONCE):
        aliases = {f"c{seed}": random_values(seed) for seed in range(first, first + AT_ONCE)}
        chart = umbrella(tmp_path_factory.mktemp("umbrella"), list(aliases))
        done = tools.template(values=aliases, chart=chart)
        assert done.code == 0, done.err
        found += objects(done.out)
    return found


def umbrella(folder: Path, aliases: list[str]) -> Path:
    shutil.copytree(CHART, folder / "charts" / "orchestrator")
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    dependencies = [{"name": "orchestrator", "version": version, "alias": alias} for alias in aliases]
    chart = {"apiVersion": "v2", "name": "umbrella", "version": "0.1.0", "dependencies": dependencies}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(chart))
    return folder


def rendered(tools: Tools, values: dict[str, Any] | None = None, *words: str) -> list[dict[str, Any]]:
    done = tools.template(*words, values=values)
    assert done.code == 0, done.err
    return objects(done.out)


def of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in found if manifest["kind"] == kind]


def only(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (manifest,) = of_kind(found, kind)
    return manifest


def with_embedded(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The objects, and the RayJob that submission fills in."""
    inner = [o["data"]["rayjob.yaml"] for o in of_kind(found, "ConfigMap") if "rayjob.yaml" in o["data"]]
    return [*found, *(manifest for text in inner for manifest in objects(text))]


def test_lint_finds_nothing(tools: Tools) -> None:
    for preset in (None, *PRESETS):
        words = ["--values", str(preset)] if preset else []
        done = tools("helm", "lint", "--strict", str(CHART), *words)
        assert done.code == 0, done.out + done.err
        assert "[WARNING]" not in done.out + done.err
        assert "[ERROR]" not in done.out + done.err


@pytest.mark.parametrize("preset", [None, *PRESETS], ids=lambda path: path.stem if path else "default")
def test_every_object_of_a_preset_is_valid(tools: Tools, schemas: Any, preset: Path | None) -> None:
    found = with_embedded(rendered(tools, JOB, *(["--values", str(preset)] if preset else [])))
    assert {"RayCluster", "RayJob", "Role", "PodMonitor"} <= {manifest["kind"] for manifest in found}
    assert not problems(schemas, found)


def test_every_object_of_random_values_is_valid(schemas: Any, random_objects: list[dict[str, Any]]) -> None:
    found = with_embedded(random_objects)
    assert len(of_kind(found, "RayCluster")) > RANDOM / 2
    jobs = of_kind(found, "RayJob")
    assert len(jobs) > RANDOM
    assert {job["spec"]["submissionMode"] for job in jobs if shared(job)} == {"HTTPMode", "K8sJobMode"}
    assert not problems(schemas, found)


def problems(schemas: Any, found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{manifest['kind']} {manifest['metadata']['name']}: {error}"
        for manifest in found
        for error in [*schemas.errors(manifest), *operator_errors(manifest)]
    ]


def shared(manifest: dict[str, Any]) -> bool:
    """Whether a RayJob names a cluster instead of describing one."""
    return "clusterSelector" in manifest["spec"]


def sharing_errors(manifest: dict[str, Any]) -> list[str]:
    """The operator's rules for such a RayJob; the fields named last it takes and passes over."""
    spec = manifest["spec"]
    refused = [name for name in ("suspend", "backoffLimit", "ttlSecondsAfterFinished") if spec.get(name)]
    useless = [name for name in ("rayClusterSpec", "shutdownAfterJobFinishes", "activeDeadlineSeconds") if name in spec]
    wrong = [*refused, *useless]
    if spec["submissionMode"] not in ("K8sJobMode", "HTTPMode"):
        wrong.append("submissionMode")
    if not spec["clusterSelector"].get("ray.io/cluster"):
        wrong.append("clusterSelector")
    if spec["submissionMode"] != "K8sJobMode" and "submitterPodTemplate" in spec:
        wrong.append("submitterPodTemplate")
    if "kueue.x-k8s.io/queue-name" in manifest["metadata"]["labels"]:  # Kueue admits clusters
        wrong.append("a queue of Kueue's")
    return wrong


def operator_errors(manifest: dict[str, Any]) -> list[str]:  # noqa: C901 - one line per rule
    """The operator's rules that no schema holds."""
    kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest.get("spec", {})
    if kind not in ("RayCluster", "RayJob"):
        return []
    wrong = []
    queued = "kueue.x-k8s.io/queue-name" in manifest["metadata"]["labels"]
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > {"RayCluster": 53, "RayJob": 47}[kind]:
        wrong.append("name")
    if kind == "RayJob" and shared(manifest):
        return wrong + sharing_errors(manifest)
    if kind == "RayJob":
        shuts_down = spec["shutdownAfterJobFinishes"]
        if (spec.get("ttlSecondsAfterFinished") or spec.get("suspend") or queued) and not shuts_down:
            wrong.append("shutdownAfterJobFinishes")
        if spec["submissionMode"] != "K8sJobMode" and "submitterPodTemplate" in spec:
            wrong.append("submitterPodTemplate")
        if spec.get("activeDeadlineSeconds") == 0:
            wrong.append("activeDeadlineSeconds")
    cluster = spec["rayClusterSpec"] if kind == "RayJob" else spec
    if cluster.get("authOptions", {}).get("mode") == "token" and not cluster.get("rayVersion"):
        wrong.append("rayVersion")
    if kind == "RayJob" and "upgradeStrategy" in cluster:
        wrong.append("upgradeStrategy")
    if cluster.get("enableInTreeAutoscaling"):
        templates = [
            cluster["headGroupSpec"]["template"],
            *(g["template"] for g in cluster.get("workerGroupSpecs", [])),
        ]
        if any(template["spec"].get("restartPolicy") != "Never" for template in templates):
            wrong.append("restartPolicy")
        if queued:
            wrong.append("autoscaling in a queue")
    groups = cluster.get("workerGroupSpecs", [])
    wrong += [g["groupName"] for g in groups if not g["minReplicas"] <= g["replicas"] <= g["maxReplicas"]]
    return wrong


def test_the_random_values_reach_every_part(random_objects: list[dict[str, Any]]) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(MAKERS) == set(schema["properties"]) - {"global", "fullnameOverride"}
    kinds = {manifest["kind"] for manifest in random_objects}
    assert kinds >= {"StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Role", "ServiceAccount"}


def test_validator_rejects_unknown_fields_and_duplicate_ports(schemas: Any, tools: Tools) -> None:
    cluster = only(rendered(tools), "RayCluster")
    assert not schemas.errors(cluster)
    head = cluster["spec"]["headGroupSpec"]
    head["template"]["spec"]["terminationGracePeriod"] = 3
    head["template"]["spec"]["containers"][0]["ports"].append({"name": "again", "containerPort": 8265})
    wrong = " ".join(schemas.errors(cluster))
    assert "terminationGracePeriod" in wrong
    assert "duplicate" in wrong
    assert schemas.errors({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}, "token": 1})


def test_pods_are_restricted(random_objects: list[dict[str, Any]]) -> None:
    """As the Pod Security Standard "restricted" asks; a namespace that enforces it admits every pod."""
    seen = 0
    for manifest in with_embedded(random_objects):
        for where, template in manifests.pods(manifest):
            seen += 1
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True, where
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            mounted = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
            claimed = {"data"} if where == "redis" else set()
            assert mounted - claimed <= {volume["name"] for volume in pod.get("volumes", [])}, where
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                names = [variable["name"] for variable in container.get("env", [])]
                assert len(names) == len(set(names)), where
    assert seen > RANDOM


def test_grace_exceeds_drain_and_stop(random_objects: list[dict[str, Any]]) -> None:
    for manifest in random_objects:
        for where, template in manifests.pods(manifest):
            if where in ("redis", "submitter", "pod"):
                continue
            env = {v["name"]: v.get("value") for v in template["spec"]["containers"][0]["env"]}
            grace_s = template["spec"]["terminationGracePeriodSeconds"]
            assert grace_s > int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert grace_s > int(env["RAY_JOB_STOP_WAIT_TIME_S"])


def test_no_credential_and_no_secret_is_rendered(random_objects: list[dict[str, Any]]) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in random_objects}
    for manifest in with_embedded(random_objects):
        for _, template in manifests.pods(manifest):
            for container in template["spec"]["containers"]:
                for variable in container.get("env", []):
                    if re.search("KEY|PASSWORD|SESSION_TOKEN|AUTH_TOKEN", variable["name"]):
                        assert set(variable) == {"name", "valueFrom"}, variable
                        assert set(variable["valueFrom"]) == {"secretKeyRef"}


def test_the_command_is_what_the_values_say(tools: Tools) -> None:
    text = 'it\'s; $(rm) a "word"'
    job = {"job": "jobs.vision:digits", "args": {"epochs": 1000000, "lr": 1e-4, "t": text}, "set": {"scale.workers": 4}}
    values = {"jobs": {"digits": job}, "storage": {"uri": "s3://runs/team"}}
    spec = only(rendered(tools, values), "RayJob")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:5] == ["python", "-m", "orchestrator", "run", "jobs.vision:digits"]
    pairs = list(zip(words[5::2], words[6::2], strict=True))
    assert pairs == [
        ("--arg", "epochs=1000000"),
        ("--arg", "lr=0.0001"),
        ("--arg", f"t={text}"),
        ("--set", "checkpoint.uri=s3://runs/team"),
        ("--set", "name=digits"),
        ("--set", "scale.workers=4"),
    ]


def test_a_run_keeps_its_name_and_has_its_own_groups(tools: Tools) -> None:
    groups = {"cpu": {}, "gpu": {"gpu": {"count": 2}}}
    job = {"job": "jobs.vision:digits", "workerGroups": {"gpu": {"replicas": 3}}}
    found = rendered(tools, {"workerGroups": groups, "jobs": {"digits": job}})
    (group,) = only(found, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["groupName"], group["replicas"]) == ("gpu", 3)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "2"
    assert len(only(found, "RayCluster")["spec"]["workerGroupSpecs"]) == 2


FLEET: dict[str, Any] = {"fleet": {"enabled": True}, "storage": {"uri": "s3://runs/team"}}


def test_with_a_fleet_runs_share_the_team_s_cluster_unless_they_want_their_own(tools: Tools) -> None:
    jobs = {
        "digits": {"job": "jobs.vision:digits", "queue": "team-a", "priority": -3, "deadlineSeconds": 3600},
        "mine": {"job": "jobs.vision:digits", "cluster": "own"},
        "watched": {"job": "jobs.vision:digits", "submissionMode": "K8sJobMode", "runName": "w"},
    }
    found = {job["metadata"]["name"]: job for job in of_kind(rendered(tools, {**FLEET, "jobs": jobs}), "RayJob")}
    command = "exec python -m orchestrator run jobs.vision:digits --set checkpoint.uri=s3://runs/team"
    assert found["team-orchestrator-digits"]["spec"] == {
        "entrypoint": f"{command} --set fleet.deadline_s=3600 --set fleet.priority=-3 --set fleet.queue=team-a "
        "--set name=digits",
        "entrypointNumCpus": 1,
        "submissionMode": "HTTPMode",
        "clusterSelector": {"ray.io/cluster": "team-orchestrator"},
        "metadata": {"orchestrator_run": "digits"},
    }
    watched = found["team-orchestrator-watched"]["spec"]
    assert watched["entrypoint"] == f"{command} --set fleet.queue=default --set name=w"
    assert watched["metadata"] == {"orchestrator_run": "w"}
    assert watched["submitterPodTemplate"]
    own = found["team-orchestrator-mine"]["spec"]
    assert (own["backoffLimit"], "clusterSelector" in own, "fleet" in own["entrypoint"]) == (3, False, False)


def test_submit_learns_what_the_team_s_cluster_has(tools: Tools) -> None:
    found = rendered(tools, {**FLEET, "workerGroups": {"gpu": {"gpu": {"count": 2}}}})
    (published,) = [o["data"] for o in of_kind(found, "ConfigMap") if "rayjob.yaml" in o["data"]]
    assert yaml.safe_load(published["raycluster.yaml"]) == only(found, "RayCluster")["spec"]


def test_without_a_fleet_nothing_is_shared(tools: Tools) -> None:
    found = with_embedded(rendered(tools, JOB))
    assert not [o for o in of_kind(found, "ConfigMap") if "raycluster.yaml" in o["data"]]
    assert not any(map(shared, of_kind(found, "RayJob")))
    assert "ORCHESTRATOR_FLEET" not in json.dumps(found)


def test_the_head_tells_the_fleet_s_service_how_the_cluster_is_shared(tools: Tools) -> None:
    assert fleet_environment(tools, FLEET) == {"POLICY": "goodput", "URI": "s3://runs/team/.fleet"}
    more = {"policy": "fair", "quotas": {"team-b": 12000000, "team-a": 0}, "uri": "s3://books/fleet"}
    assert fleet_environment(tools, {**FLEET, "fleet": {"enabled": True, **more}}) == {
        "POLICY": "fair",
        "URI": "s3://books/fleet",
        "QUOTAS": "team-a=0,team-b=12000000",
    }


def fleet_environment(tools: Tools, values: dict[str, Any]) -> dict[str, str]:
    (head,) = (t for where, t in manifests.pods(only(rendered(tools, values), "RayCluster")) if where == "head")
    said = {variable["name"]: variable.get("value") for variable in head["spec"]["containers"][0]["env"]}
    prefix = "ORCHESTRATOR_FLEET_"
    return {name.removeprefix(prefix): value for name, value in said.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, {}),  # one worker: whoever keeps it never drains its node
        ({"workerGroups": {"cpu": {"replicas": 4}, "gpu": {}}}, {"workers": 4}),
        ({"workerGroups": {"cpu": {"replicas": 4, "minReplicas": 3}}, "autoscaler": {"enabled": True}}, {"workers": 2}),
        ({"workerGroups": {"cpu": {"replicas": 3}}, "podDisruptionBudget": {"maxUnavailable": 3}}, {}),
        ({"podDisruptionBudget": {"protectHead": True}}, {"head": 1}),
        ({"podDisruptionBudget": {"protectHead": True}, "cluster": {"enabled": False}}, {}),
    ],
    ids=str,
)
def test_a_disruption_budget_leaves_some_pod_to_be_taken(
    tools: Tools, values: dict[str, Any], kept: dict[str, int]
) -> None:
    budgets = of_kind(rendered(tools, values), "PodDisruptionBudget")
    assert {b["metadata"]["name"].rpartition("-")[2]: b["spec"]["minAvailable"] for b in budgets} == kept
    assert {b["apiVersion"] for b in budgets} <= {"policy/v1"}, "an older server is in test_api_server.py"


def test_disruption_budgets_can_be_computed_for_pods_of_a_raycluster(random_objects: list[dict[str, Any]]) -> None:
    """It has no scale subresource: with maxUnavailable or a percentage Kubernetes would allow no eviction at all."""
    budgets = of_kind(random_objects, "PodDisruptionBudget")
    assert len(budgets) > RANDOM / 10
    for spec in (budget["spec"] for budget in budgets):
        assert "maxUnavailable" not in spec
        assert type(spec["minAvailable"]) is int
        assert spec["selector"]["matchLabels"]["ray.io/cluster"], "those of another cluster are not to stand for them"


def test_the_hub_is_scraped_on_the_head_alone_and_by_the_name_that_its_alert_asks_for(tools: Tools) -> None:
    found = rendered(tools, JOB)
    endpoints = {endpoint["port"]: endpoint for endpoint in only(found, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    relabelings = endpoints["run-metrics"]["relabelings"]
    (kept,) = [rule for rule in relabelings if rule.get("action") == "keep"]
    assert (kept["sourceLabels"], kept["regex"]) == (["__meta_kubernetes_pod_label_orchestrator_group"], "head")
    (job,) = [rule["replacement"] for rule in relabelings if rule.get("targetLabel") == "job"]
    rules = [rule for group in only(found, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    (hub_down,) = [rule["expr"] for rule in rules if rule.get("alert") == "OrchestratorHubDown"]
    assert f'up{{job="{job}"}}' in hub_down
    assert not [rule for rule in endpoints["metrics"]["relabelings"] if "job" in rule.values()]
    for manifest in found:
        for where, template in manifests.pods(manifest):
            ports = [port["name"] for c in template["spec"]["containers"] for port in c.get("ports", [])]
            assert ("run-metrics" in ports) == (where == "head"), where


def test_the_pod_of_helm_test_stays_for_its_logs_to_be_read(tools: Tools) -> None:
    (pod,) = of_kind(rendered(tools), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_in_the_spot_fleet_drivers_are_on_the_group_on_demand(tools: Tools) -> None:
    found = with_embedded(rendered(tools, JOB, "--values", str(CHART / "presets" / "spot-fleet.yaml")))
    jobs = of_kind(found, "RayJob")
    assert len(jobs) == 2
    for spec in (job["spec"] for job in jobs):
        (wanted,) = json.loads(spec["entrypointResources"])
        start = {g["groupName"]: g["rayStartParams"] for g in spec["rayClusterSpec"]["workerGroupSpecs"]}
        offered = {
            name: json.loads(shlex.split(parameters["resources"])[0])  # as the shell hands it to Ray
            for name, parameters in start.items()
            if "resources" in parameters
        }
        assert offered == {"driver": {wanted: 4}}
    assert "entrypointResources" not in only(rendered(tools, JOB), "RayJob")["spec"]


def test_monitoring_is_left_out_where_nobody_reads_it(tools: Tools) -> None:
    done = tools("helm", "template", "t", str(CHART), "--api-versions", "ray.io/v1")
    assert done.code == 0, done.err
    assert not {"PodMonitor", "PrometheusRule"} & {manifest["kind"] for manifest in objects(done.out)}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"workerGroups": {"a100": {"gpus": 2}}}, "/workerGroups/a100': additional properties 'gpus'"),
        ({"head": {"cpus": 2}}, "/head/cpus"),
        ({"head": {"memory": "8 GB"}}, "/head/memory"),
        ({"workerGroups": {"a": {"replicas": -1}}}, "/workerGroups/a/replicas"),
        ({"workerGroups": {"A100": {}}}, "/workerGroups': additional properties 'A100'"),
        ({"env": {"A-B": "x"}}, "/env': additional properties 'A-B'"),
        ({"jobs": {"x": {"job": "no colon"}}}, "/jobs/x/job"),
        ({"jobs": {"x": {"submissionMode": "Sidecar"}}}, "/jobs/x/submissionMode"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"security": {"runAsUser": 0}}, "/security/runAsUser"),
        ({"storage": {"s3": {"secretKey": "x"}}}, "/storage/s3': additional properties 'secretKey'"),
        ({"storage": {"s3": {"endpointUrl": "https://user:word@host"}}}, "/storage/s3/endpointUrl"),
        ({"storage": {"uri": "runs"}}, "/storage/uri"),
        ({"rbac": {"subjects": [{"name": "x"}]}}, "/rbac/subjects/0"),
        ({"clutser": {}}, "additional properties 'clutser'"),
        ({"networkPolicy": {"submitterNamespaces": [{}]}}, "/networkPolicy/submitterNamespaces/0"),
        ({"gcsFaultTolerance": {"redisAddress": "redis"}}, "/gcsFaultTolerance/redisAddress"),
        ({"fleet": {"policy": "lottery"}}, "/fleet/policy"),
        ({"fleet": {"quotas": {"Team A": 1}}}, "/fleet/quotas': additional properties 'Team A'"),
        ({"fleet": {"quotas": {"a": -1}}}, "/fleet/quotas/a"),
        ({"fleet": {"uri": "books"}}, "/fleet/uri"),
        ({"jobs": {"x": {"job": "a:b", "cluster": "shared"}}}, "/jobs/x/cluster"),
        ({"jobs": {"x": {"job": "a:b", "queue": "Team A"}}}, "/jobs/x/queue"),
        ({"jobs": {"x": {"job": "a:b", "priority": 11}}}, "/jobs/x/priority"),
        ({"jobDefaults": {"deadlineSeconds": -1}}, "/jobDefaults/deadlineSeconds"),
        ({"jobDefaults": {"entrypointResources": {"driver": 0}}}, "/jobDefaults/entrypointResources/driver"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_and_named(tools: Tools, values: dict[str, Any], field: str) -> None:
    done = tools.template(values=values)
    assert done.code != 0
    assert field in done.err


def in_fleet(**fields: Any) -> dict[str, Any]:
    return {**FLEET, "jobs": {"d": {"job": "a:b", **fields}}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fullnameOverride": LONG, "jobs": {"d": {"job": "a:b"}}}, "KubeRay allows 47"),
        ({"jobs": {"d" * 40: {"job": "a:b"}}}, "KubeRay allows 47"),
        ({"jobs": {"d": {}}}, "jobs.d.job is missing"),
        ({"jobs": {"d": {"job": "a:b", "suspend": True, "shutdownAfterJobFinishes": False}}}, "suspend needs"),
        ({"kueue": {"queueName": "q"}, "jobs": {"d": {"job": "a:b", "shutdownAfterJobFinishes": False}}}, "Kueue"),
        ({"kueue": {"queueName": "q"}, "autoscaler": {"enabled": True}}, "exclude each other"),
        ({"kueue": {"queueName": "q"}, "workerGroups": {f"g{i}": {} for i in range(8)}}, "at most 7"),
        ({"kueue": {"priorityClass": "high"}}, "queueName"),
        ({"rayVersion": "2.50.0"}, "2.52.0 or newer"),
        ({"gcsFaultTolerance": {"enabled": True}}, "needs a Redis"),
        ({"termination": {"gracePeriodSeconds": 60}}, "must exceed"),
        ({"workerGroups": {"head": {}}}, "workerGroups.head: the name"),
        ({"workerGroups": {"a": {"minReplicas": 5}}}, "minReplicas=5 <= replicas=1"),
        ({"workerGroups": {"a": {"tpu": {"chips": 4}}}}, "tpu.accelerator and tpu.topology"),
        ({"workerGroups": {"a": {"numOfHosts": 2}}}, "numOfHosts=2 is for TPU slices"),
        ({"jobs": {"d": {"job": "a:b", "workerGroups": {"gpu": {}}}}}, "no such worker group; valid: cpu"),
        ({"jobs": {"d": {"job": "a:b", "set": {"name": "x"}}}}, "jobs.d.runName"),
        ({"jobs": {"d": {"job": "a:b", "env": {"WANDB_API_KEY": "x"}}}}, "jobs.d.env.WANDB_API_KEY"),
        ({"jobDefaults": {"entrypointResources": {"driver": 1}}}, "jobDefaults.entrypointResources.driver: no worker"),
        ({"env": {"DB_PASSWORD": "x"}}, "env.DB_PASSWORD looks like a credential"),
        ({"storage": {"uri": "/runs"}}, "storage.claimName"),
        ({"storage": {"uri": "/other", "claimName": "c"}}, 'storage.uri="/other" is not below storage.mountPath'),
        ({**FLEET, "fleet": {"enabled": True, "uri": "/f"}}, 'fleet.uri="/f" is a folder'),
        ({**FLEET, "cluster": {"enabled": False}}, "fleet.enabled needs cluster.enabled=true"),
        ({"fleet": {"enabled": True}}, "fleet.enabled needs storage.uri"),
        ({"jobs": {"d": {"job": "a:b", "cluster": "team"}}}, "jobs.d.cluster=team needs fleet.enabled=true"),
        ({"jobs": {"d": {"job": "a:b", "queue": "q"}}}, "jobs.d.queue has no effect on a cluster of its own"),
        (in_fleet(cluster="own", priority=1), "jobs.d.priority has no effect"),
        (in_fleet(suspend=True), "`orchestrator queue pause RUN` does"),
        (in_fleet(submissionMode="SidecarMode"), "jobs.d.submissionMode=SidecarMode needs a head of its own"),
        (in_fleet(activeDeadlineSeconds=60), "recipe.stop.wall_time_s"),
        (in_fleet(workerGroups={"cpu": {}}), "jobs.d.workerGroups: the team's cluster has its own"),
        (in_fleet(backoffLimit=0), "jobs.d.backoffLimit: KubeRay makes no other cluster"),
        (in_fleet(shutdownAfterJobFinishes=True), "jobs.d.shutdownAfterJobFinishes: the team's cluster stays"),
        (in_fleet(ttlSecondsAfterFinished=1), "jobs.d.ttlSecondsAfterFinished: the team's cluster stays"),
        (in_fleet(set={"fleet.queue": "q"}), "jobs.d.set.fleet.queue: use queue, priority and deadlineSeconds"),
        ({**FLEET, "jobDefaults": {"suspend": True}}, "jobDefaults.suspend: KubeRay suspends no run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_schema_holds_is_refused_with_the_remedy(tools: Tools, values: dict[str, Any], said: str) -> None:
    done = tools.template(values=values)
    assert done.code != 0
    assert said in done.err


def test_missing_operator_is_said_with_the_command_that_installs_it(tools: Tools) -> None:
    done = tools("helm", "template", "t", str(CHART))
    assert done.code != 0
    assert "helm install kuberay-operator" in done.err
    done = tools(
        "helm", "template", "t", str(CHART), "--api-versions", "ray.io/v1", "--set", "monitoring.podMonitor=true"
    )
    assert done.code != 0
    assert "install the Prometheus operator" in done.err


def test_a_job_name_of_the_longest_length_is_a_run_name(tools: Tools) -> None:
    name = "d" * (47 - len("team-orchestrator-"))
    assert NAME.fullmatch(name)
    assert only(rendered(tools, {"jobs": {name: {"job": "a:b"}}}), "RayJob")["metadata"]["name"].endswith(name)


def test_dashboards_and_rules_reach_the_objects_unchanged(tools: Tools, tmp_path: Path) -> None:
    """With files of the test's own, so that it holds for any; Helm's own braces in a legend must stay."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("files"))
    alert = {"alert": "Slow", "expr": "up == 0", "annotations": {"summary": '{{ $labels.run }} "q"'}}
    rules = yaml.safe_dump({"groups": [{"name": "a", "rules": [alert]}]})
    dashboard = '{"title": "Runs", "panels": [{"legendFormat": "{{worker}} \\u00fc ü"}]}\n'
    (chart / "files" / "prometheus").mkdir(parents=True)
    (chart / "files" / "grafana").mkdir()
    (chart / "files" / "prometheus" / "rules.yml").write_text(rules)
    (chart / "files" / "grafana" / "runs.json").write_text(dashboard)
    done = tools.template(chart=chart)
    assert done.code == 0, done.err
    found = objects(done.out)
    assert only(found, "PrometheusRule")["spec"] == yaml.safe_load(rules)
    (config,) = [o for o in of_kind(found, "ConfigMap") if "runs.json" in o["data"]]
    assert config["data"]["runs.json"] == dashboard
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
