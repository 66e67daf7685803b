"""Random values of the chart that are valid: every field of its schema, within the rules that no schema holds."""

from __future__ import annotations

import random
from typing import Any

Values = dict[str, Any]


def random_values(seed: int) -> Values:
    """Values for one installation; the same for the same seed."""
    pick = random.Random(seed)
    values: Values = {}
    for name, make in MAKERS.items():
        if pick.random() < 0.7:
            values[name] = make(pick)
    _keep_the_rules(values, pick)
    return values


def _flag(pick: random.Random) -> bool:
    return pick.random() < 0.5


def _some(pick: random.Random, **choices: Any) -> Values:
    """About two thirds of the fields, each with one of its choices."""
    return {name: pick.choice(options) for name, options in choices.items() if pick.random() < 0.66}


LABELS = [{}, {"team": "vision"}, {"example.com/pool": "a", "zone": "b"}]
TOLERATIONS: list[list[Values]] = [
    [],
    [{"key": "dedicated", "operator": "Equal", "value": "train", "effect": "NoSchedule"}],
    [{"operator": "Exists"}, {"key": "flaky", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
]
AFFINITY: list[Values] = [
    {},
    {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}]
            }
        }
    },
]
PLACEMENT: dict[str, list[Any]] = {
    "nodeSelector": LABELS,
    "tolerations": TOLERATIONS,
    "affinity": AFFINITY,
    "priorityClassName": ["", "training"],
    "rayStartParams": [{}, {"object-store-memory": "1000000000"}],
    "cpus": ["1", "500m", "0.5", "96"],
    "memory": ["1Gi", "512Mi", "2000G"],
    "shmSize": ["64Mi", "16Gi"],
    "tmpSize": ["1Gi", "1Ti"],
}


def _group(pick: random.Random) -> Values:
    counts = sorted(pick.randrange(0, 9) for _ in range(3))
    group = _some(pick, idleTimeoutSeconds=[0, 30], spot=["", "aws", "karpenter", "gke", "aks"], **PLACEMENT)
    group |= {"minReplicas": counts[0], "replicas": counts[1], "maxReplicas": max(1, counts[2])}
    if _flag(pick):
        spread = _some(pick, enabled=[True, False], whenUnsatisfiable=["ScheduleAnyway", "DoNotSchedule"])
        group["topologySpread"] = spread
    kind = pick.choice(["cpu", "gpu", "tpu"])
    if kind == "gpu":
        gpu = _some(pick, product=["", "NVIDIA-L4"], resource=["amd.com/gpu", "nvidia.com/gpu"])
        group["gpu"] = {"count": pick.choice([1, 8]), **gpu}
    if kind == "tpu":
        group["tpu"] = {"chips": 4, "accelerator": "tpu-v6e-slice", "topology": pick.choice(["2x2", "4x4"])}
        group["numOfHosts"] = pick.choice([1, 4])
    return group


def _groups(pick: random.Random) -> Values:
    names = ["cpu", "a100", "spot-h100", "tpu-v6e"]
    return {name: _group(pick) for name in pick.sample(names, pick.randrange(0, len(names) + 1))}


def _job(pick: random.Random) -> Values:
    return {
        "job": pick.choice(["jobs.vision:digits", "jobs.language:gpt"]),
        **_some(
            pick,
            runName=["", "digits-2", "a.b_c"],
            args=[{}, {"epochs": 3, "lr": 1e-4, "text": 'it\'s; $(rm) a "word"', "flag": True}],
            set=[{}, {"scale.workers": 4, "recipe.schedule.name": "cosine"}],
            workingDir=["", "https://example.com/code.zip", "s3://bucket/code.zip"],
            pip=[[], ["einops==0.8.1", "a @ https://example.com/a.whl"]],
            env=[{}, {"NCCL_DEBUG": "INFO", "X": "a: b # c"}],
            cluster=["", "", "own", "team"],
            queue=["default", "team-a", "a.b_c"],
            priority=[-10, 0, 3],
            deadlineSeconds=[0, 3600],
            backoffLimit=[0, 3],
            activeDeadlineSeconds=[0, 3600],
            ttlSecondsAfterFinished=[0, 60],
            suspend=[True, False],
            submissionMode=["", "K8sJobMode", "HTTPMode", "SidecarMode"],
            entrypointCpus=[0, 1, 0.5],
        ),
    }


def _jobs(pick: random.Random) -> Values:
    return {name: _job(pick) for name in pick.sample(["digits", "gpt", "x1"], pick.randrange(0, 3))}


def _fault_tolerance(pick: random.Random) -> Values:
    secret = {"passwordSecret": {"name": "redis", "key": "password"}} if _flag(pick) else {}
    if _flag(pick):
        return {"enabled": True, "redisAddress": "redis.example.com:6379", "reconnectTimeoutSeconds": 60, **secret}
    redis = _some(pick, volumeSize=["", "8Gi"], storageClassName=["", "fast"], image=["redis:7"])
    return {"enabled": _flag(pick), "redis": {"deploy": True, **redis}, **secret}


def _storage(pick: random.Random) -> Values:
    s3 = _some(
        pick, existingSecret=["", "s3"], endpointUrl=["", "https://s3.example.com:9000"], region=["", "eu-west-1"]
    )
    if _flag(pick):
        return {"uri": "s3://runs/team", "s3": s3}
    return {"claimName": "runs", "mountPath": "/data", "uri": "/data/runs"}


MAKERS: dict[str, Any] = {
    "nameOverride": lambda pick: pick.choice(["", "ray"]),
    "image": lambda pick: _some(
        pick,
        repository=["registry.example.com:5000/team/orchestrator", "orchestrator"],
        tag=["", "1.2.3-cuda"],
        digest=["", "sha256:" + "0a" * 32],
        pullPolicy=["Always", "Never", "IfNotPresent"],
    ),
    "imagePullSecrets": lambda pick: pick.choice([[], ["pull"], ["a", "b"]]),
    "rayVersion": lambda pick: pick.choice(["2.60.0", "2.52.1"]),
    "cluster": lambda pick: _some(pick, enabled=[True, True, False], upgradeStrategy=["None", "Recreate"]),
    "fleet": lambda pick: _some(
        pick,
        enabled=[True, False],
        policy=["goodput", "fair", "fifo"],
        quotas=[{}, {"team-a": 4, "default": 0}],
        uri=["", "s3://runs/books/"],
    ),
    "auth": lambda pick: _some(pick, enabled=[True, False], secretName=["", "token"]),
    "head": lambda pick: _some(pick, serviceType=["ClusterIP", "NodePort", "LoadBalancer"], **PLACEMENT),
    "workerDefaults": lambda pick: _some(pick, **PLACEMENT),
    "workerGroups": _groups,
    "jobDefaults": lambda pick: _some(pick, backoffLimit=[0, 9], pip=[[], ["tqdm"]], queue=["team-b"], priority=[1]),
    "jobs": _jobs,
    "autoscaler": lambda pick: _some(
        pick, enabled=[True, False], idleTimeoutSeconds=[1, 60], upscalingMode=["Default", "Aggressive", "Conservative"]
    ),
    "kueue": lambda pick: {"queueName": "team", **_some(pick, priorityClass=["", "high"])} if _flag(pick) else {},
    "gcsFaultTolerance": _fault_tolerance,
    "storage": _storage,
    "serviceAccount": lambda pick: _some(
        pick, create=[True, False], name=["", "trainer"], annotations=[{}, {"eks.amazonaws.com/role-arn": "arn:aws:x"}]
    ),
    "termination": lambda pick: pick.choice([{"drainSeconds": 10, "stopSeconds": 20, "gracePeriodSeconds": 30}, {}]),
    "security": lambda pick: _some(pick, runAsUser=[1, 65534], readOnlyRootFilesystem=[True, False]),
    "rbac": lambda pick: _some(
        pick,
        create=[True, False],
        allowDelete=[True, False],
        subjects=[[], [{"kind": "Group", "name": "vision", "apiGroup": "rbac.authorization.k8s.io"}]],
    ),
    "networkPolicy": lambda pick: _some(
        pick,
        enabled=[True, False],
        operatorNamespaceLabels=LABELS,
        monitoringNamespaceLabels=LABELS,
        submitterNamespaces=[[], [{"team": "vision"}]],
    ),
    "podDisruptionBudget": lambda pick: _some(
        pick, enabled=[True, False], maxUnavailable=[1, 5], protectHead=[True, False]
    ),
    "monitoring": lambda pick: _some(
        pick,
        podMonitor=["auto", True, False],
        prometheusRule=["auto", True, False],
        dashboards=[True, False],
        intervalSeconds=[5, 60],
        labels=LABELS,
    ),
    "env": lambda pick: pick.choice([{}, {"HOME": "/tmp/home", "NCCL_SOCKET_IFNAME": "eth0", "YAML": "no: #"}]),
    "commonLabels": lambda pick: pick.choice([{}, {"owner": "platform"}]),
}


def _keep_the_rules(values: Values, pick: random.Random) -> None:
    """What the templates refuse is tested by itself; here it is put right."""
    jobs, groups = values.get("jobs", {}), values.get("workerGroups", {})
    if values.get("autoscaler", {}).get("enabled"):
        values.pop("kueue", None)
    fleet = values.get("fleet", {}).get("enabled", False)
    if fleet:
        values["cluster"] = values.get("cluster", {}) | {"enabled": True}
        values.setdefault("storage", {"uri": "s3://runs/team"})
    for job in jobs.values():
        if not fleet and job.get("cluster") == "team":
            del job["cluster"]
        if _is_shared(job, fleet=fleet):
            _keep_the_rules_of_sharing(job)
            continue
        for name in ("queue", "priority", "deadlineSeconds"):
            job.pop(name, None)
        if groups and _flag(pick):
            name = pick.choice(sorted(groups))
            job["workerGroups"] = {name: {"memory": "3Gi"}}
        if not job.get("suspend") and not values.get("kueue") and _flag(pick):
            job["shutdownAfterJobFinishes"] = False


def _is_shared(job: Values, *, fleet: bool) -> bool:
    return fleet and job.get("cluster") != "own"


def _keep_the_rules_of_sharing(job: Values) -> None:
    for name in ("suspend", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"):
        job.pop(name, None)
    if job.get("submissionMode") == "SidecarMode":
        del job["submissionMode"]
