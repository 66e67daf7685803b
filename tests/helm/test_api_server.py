"""The chart on a real Kubernetes API server: what installs, what stays, what is admitted, and who may do what."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kube
from kube import CHART, Tools, objects

pytestmark = [pytest.mark.k8s, pytest.mark.slow]

manifests = pytest.importorskip("manifests", reason="kubernetes-validate is not installed")
SECRET = "Vfx7-not-to-be-seen"
VALUES: dict[str, Any] = {
    "workerGroups": {"cpu": {}, "a100": {"gpu": {"count": 2, "product": "NVIDIA-A100"}, "spot": "karpenter"}},
    "jobs": {"digits": {"job": "jobs.vision:digits", "cluster": "own"}, "queued": {"job": "jobs.vision:digits"}},
    "fleet": {"enabled": True, "quotas": {"default": 4}},
    "storage": {"uri": "s3://runs/team", "s3": {"existingSecret": "s3"}},
    "auth": {"secretName": "ray-token"},
    "gcsFaultTolerance": {"enabled": True, "redis": {"deploy": True}, "passwordSecret": {"name": "redis"}},
}
RULE = re.compile(r"(\S+) +\[\] +\[(.*)\] +\[(.*)\]")
KINDS = "rayclusters,rayjobs,roles,rolebindings,serviceaccounts,configmaps,services,statefulsets,networkpolicies,pdb"


def helm(api: Tools, verb: str, *words: str, values: dict[str, Any] | None = None) -> str:
    stdin = None if values is None else json.dumps(values)
    more = [] if values is None else ["--values", "-"]
    done = api("helm", *verb.split(), "team", *words, "--namespace", "train", *more, stdin=stdin)
    assert done.code == 0, done.err
    return done.out


def kubectl(api: Tools, *words: str, stdin: str | None = None) -> str:
    done = api("kubectl", "--namespace", "train", *words, stdin=stdin)
    assert done.code == 0, done.err
    return done.out


def present(api: Tools) -> set[str]:
    """Names of the release's objects, as kind/name."""
    return set(kubectl(api, "get", KINDS, "-l", "app.kubernetes.io/instance=team", "-o", "name").split())


@pytest.fixture
def installed(api: Tools) -> Iterator[Tools]:
    secrets = {"s3": "AWS_SECRET_ACCESS_KEY", "ray-token": "auth_token"}
    try:
        for name, key in secrets.items():
            kubectl(api, "create", "secret", "generic", name, f"--from-literal={key}={SECRET}")
        helm(api, "install", str(CHART), values=VALUES)
        yield api
    finally:
        api("helm", "uninstall", "team", "--namespace", "train")
        api("kubectl", "--namespace", "train", "delete", "secret", *secrets)


def test_install_upgrade_rollback_and_uninstall_leave_what_they_should(installed: Tools) -> None:
    api = installed
    first = present(api)
    assert {"raycluster.ray.io/team-orchestrator", "rayjob.ray.io/team-orchestrator-digits"} <= first
    assert "poddisruptionbudget.policy/team-orchestrator-workers" in first, "this server has no policy/v1"
    foreign = json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "somebody-elses"}})
    kubectl(api, "apply", "-f", "-", stdin=foreign)

    more = {
        **VALUES,
        "jobs": {**VALUES["jobs"], "gpt": {"job": "jobs.language:gpt"}},
        "networkPolicy": {"enabled": False},
    }
    helm(api, "upgrade", str(CHART), values=more)
    second = present(api)
    assert second - first == {"rayjob.ray.io/team-orchestrator-gpt"}
    assert first - second == {"networkpolicy.networking.k8s.io/team-orchestrator"}

    helm(api, "rollback", "1")
    assert present(api) == first
    helm(api, "uninstall")
    assert not present(api)
    assert "somebody-elses" in kubectl(api, "get", "configmaps", "-o", "name")
    assert "secret/s3" in kubectl(api, "get", "secrets", "-o", "name"), "existing secrets are not the chart's to delete"
    kubectl(api, "delete", "configmap", "somebody-elses")


def test_notes_say_where_a_run_goes_and_how_it_is_watched(installed: Tools) -> None:
    notes = helm(installed, "get notes")
    where = "--address http://127.0.0.1:8265 --driver-cpus 1 --set checkpoint.uri=s3://runs/team"
    assert f"orchestrator submit jobs.vision:digits {where}\n" in notes
    assert f"orchestrator submit jobs.vision:digits --queue default {where}\n" in notes
    assert "A run on the team's cluster, by anybody" in notes
    assert "orchestrator logs queued --follow" in notes
    assert "logs --follow job/team-orchestrator-digits" in notes
    assert "logs --follow job/team-orchestrator-queued" not in notes
    assert "the autoscaler adds no node" not in notes
    assert "BUCKET" not in notes
    bare = {
        **VALUES,
        "fleet": {"enabled": False},
        "jobs": {},
        "storage": {"uri": ""},
        "jobDefaults": {"entrypointCpus": 0},
    }
    helm(installed, "upgrade", str(CHART), values=bare)
    unset = helm(installed, "get notes")
    assert "digits --address http://127.0.0.1:8265 --set checkpoint.uri=s3://BUCKET/PREFIX\n" in unset
    assert "--release team-orchestrator --set checkpoint.uri=s3://BUCKET/PREFIX\n" in unset
    assert "WARNING: storage.uri is not set" in unset


def test_pod_templates_pass_a_server_side_dry_run(installed: Tools) -> None:
    found = objects(helm(installed, "get manifest"))
    templates = [(m["metadata"]["name"], where, t) for m in found for where, t in manifests.pods(m)]
    assert len(templates) >= 7
    for name, where, template in templates:
        metadata = {**template.get("metadata", {}), "name": f"{name}-{where}", "namespace": "train"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        if where == "redis":
            pod["spec"]["volumes"] = [{"name": "data", "emptyDir": {}}]
        kubectl(installed, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))


def test_the_server_refuses_a_pod_that_is_wrong(installed: Tools) -> None:
    """The dry run above means something: the same server says no to a bad quantity and to a missing volume."""
    found = objects(helm(installed, "get manifest"))
    cluster = next(m for m in found if m["kind"] == "RayCluster")
    spec = dict(manifests.pods(cluster))["head"]["spec"]
    for path, value in (
        ("resources", {"limits": {"memory": "8 GB"}}),
        ("volumeMounts", [{"name": "x", "mountPath": "/x"}]),
    ):
        container = {**spec["containers"][0], path: value}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p"},
            "spec": {**spec, "containers": [container]},
        }
        done = installed("kubectl", "-n", "train", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
        assert done.code != 0
        assert path in done.err or "quantities" in done.err


def test_a_submitter_creates_rayjobs_and_reads_logs_and_nothing_else(installed: Tools) -> None:
    account = "system:serviceaccount:train:team-orchestrator-submitter"
    assert rules(installed, account) == {
        ("rayjobs.ray.io", "", "create get list watch"),
        ("pods", "", "get list watch"),
        ("pods/log", "", "get"),
        ("configmaps", "team-orchestrator-rayjob", "get"),
    }
    for verb, resource, allowed in (
        ("create", "rayjobs.ray.io", True),
        ("get", "pods/log", True),
        ("get", "configmaps/team-orchestrator-rayjob", True),
        ("delete", "rayjobs.ray.io", False),
        ("create", "pods/exec", False),
        ("get", "configmaps/kube-root-ca.crt", False),
        ("get", "secrets", False),
    ):
        assert may(installed, account, verb, resource) == allowed, (verb, resource)
    assert not may(installed, account, "create", "rayjobs.ray.io", namespace="default")


def rules(api: Tools, account: str) -> set[tuple[str, ...]]:
    """All that an account may do in the namespace, as resource, names, verbs; asking about itself is everybody's."""
    listed = kubectl(api, "auth", "can-i", "--list", f"--as={account}").splitlines()
    found = [match.groups() for line in listed if (match := RULE.fullmatch(line.rstrip()))]
    return {rule for rule in found if not rule[0].endswith((".authorization.k8s.io", ".authentication.k8s.io"))}


def may(api: Tools, account: str, verb: str, resource: str, *, namespace: str = "train") -> bool:
    named = resource.startswith("configmaps/")
    resource, subresource = (resource, "") if named else (resource.partition("/")[0], resource.partition("/")[2])
    more = [f"--subresource={subresource}"] if subresource else []
    words = ["auth", "can-i", verb, resource, *more, f"--as={account}", f"--namespace={namespace}"]
    return api("kubectl", *words).out.strip() == "yes"


def test_credentials_are_in_no_object_and_not_in_the_release(installed: Tools) -> None:
    texts = [helm(installed, "get all"), kubectl(installed, "get", KINDS, "-o", "yaml")]
    hidden = base64.b64encode(SECRET.encode()).decode()
    for text in texts:
        assert SECRET not in text
        assert hidden not in text
    assert "ray-token" in texts[0], "only its name is"


def test_without_the_operator_nothing_is_installed(tmp_path: Path) -> None:
    """On a server of its own, which knows none of the CRDs."""
    if reason := kube.no_api_server():
        pytest.skip(reason)
    with kube.api_server(tmp_path) as kubeconfig:
        api = Tools(tmp_path, kubeconfig)
        done = api("helm", "install", "late", str(CHART), "--namespace", "train", "--create-namespace")
        assert done.code != 0
        assert "KubeRay is not installed" in done.err
        assert "late" not in api("helm", "list", "--namespace", "train", "--all").out
        assert not api("kubectl", "--namespace", "train", "get", "configmaps,services", "-o", "name").out
