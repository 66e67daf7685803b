"""A run as a RayJob, created through the Kubernetes API server from what the chart published there.

What was published decides where it runs: on a cluster of its own, or in a queue of the team's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from orchestrator.config import RunConfig
from orchestrator.errors import ClusterError, RequestError
from orchestrator.job import load
from orchestrator.launching.jobs import RUN, Extras, command_of, plan_there
from orchestrator.launching.preflight import RunRequest
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan

__all__ = ["Created", "Place", "Published", "create", "make_rayjob", "shape_of"]

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
NAME_LENGTH = 47
TIMEOUT_S = 20
SECRETIVE = re.compile("(?i)(^|_)(secret|password|passwd|token|key|credentials?)(_|$)")  # as in the chart's checks
GPU = re.compile(r".*gpu|nvidia\.com/mig-\d+g\.\d+gb")  # which limits the operator has Ray announce as GPUs
TPU = "google.com/tpu"


@dataclass(frozen=True)
class Place:
    """Where the run goes: the prefix of the chart's objects, namespace and kubeconfig context; None: the current."""

    release: str
    namespace: str | None = None
    context: str | None = None


@dataclass(frozen=True)
class Published:
    """What the chart left in the cluster: a RayJob to fill in, and what a run has that does not say otherwise."""

    template: Mapping[str, Any]
    storage_uri: str = ""
    queue: str = ""
    team: Mapping[str, Any] | None = None
    """The spec of the team's cluster, where runs are on it."""

    @classmethod
    def of(cls, data: Mapping[str, str]) -> Published:
        """Read the chart's ConfigMap."""
        return cls(
            template=yaml.safe_load(data["rayjob.yaml"]),
            storage_uri=data.get("storage-uri", ""),
            queue=data.get("queue", ""),
            team=yaml.safe_load(data.get("raycluster.yaml", "")),
        )

    @property
    def shape(self) -> ClusterShape | None:
        """What runs have: a cluster as it begins, or what the team's may grow to; None: an older chart does not say."""
        if self.shared:
            return None if self.team is None else shape_of(self.team, grown=True)
        return shape_of(self.template["spec"]["rayClusterSpec"])

    @property
    def shared(self) -> bool:
        """Whether runs are on the team's cluster."""
        return "clusterSelector" in self.template["spec"]

    def defaults(self, overrides: Sequence[str]) -> list[str]:
        """Config fields for a run with these overrides."""
        values = {"checkpoint.uri": self.storage_uri, "fleet.queue": self.queue}
        stated = {override.partition("=")[0] for override in overrides}
        return [f"{field}={value}" for field, value in values.items() if value and field not in stated]


class Created(NamedTuple):
    """A RayJob as the API server has it, whether it is new, and the plan where there is a new one to be made."""

    rayjob: dict[str, Any]
    new: bool
    plan: Plan | None = None


def shape_of(cluster: Mapping[str, Any], *, grown: bool = False) -> ClusterShape:
    """What the RayCluster of this spec offers a run; with ``grown``, once its autoscaler has added all it may."""
    size = "maxReplicas" if grown and cluster.get("enableInTreeAutoscaling") else "replicas"
    pods = [cluster["headGroupSpec"]]
    for group in cluster.get("workerGroupSpecs", ()):
        pods += [group] * (group[size] * group["numOfHosts"])
    offers = [_announced(pod) for pod in pods]
    return ClusterShape(
        nodes=len(pods),
        cpus=sum(offer.cpus for offer in offers),
        accelerators=sum(offer.gpus for offer in offers),
        tpus=sum(offer.tpus for offer in offers),
    )


class _Offer(NamedTuple):
    cpus: float
    gpus: int
    tpus: int


def _announced(group: Mapping[str, Any]) -> _Offer:
    """What Ray announces of one pod: the parameters of its start, or what the operator makes of the limits instead."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters = group["rayStartParams"]
    gpus = sum(int(number) for name, number in limits.items() if GPU.fullmatch(name))
    return _Offer(
        cpus=float(parameters.get("num-cpus", _whole_cpus(str(limits["cpu"])))),
        gpus=int(parameters.get("num-gpus", gpus)),
        tpus=int(limits.get(TPU, 0)),
    )


def _whole_cpus(quantity: str) -> int:
    """CPUs of a Kubernetes quantity such as 500m, rounded up as the operator does."""
    return math.ceil(float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity))


def make_rayjob(published: Published, request: RunRequest, config: RunConfig, extras: Extras) -> dict[str, Any]:
    """The RayJob for ``request``: the chart's own, with this run's name, command and environment.

    Raises:
        RequestError: what a RayJob cannot do, or what would be read in it by others.
    """
    _require_possible(published, request, config, extras)
    body = json.loads(json.dumps(published.template))
    name = re.sub("[._]", "-", config.name)
    environment: dict[str, Any] = {"env_vars": extras.variables(), "pip": extras.requirements()}
    environment["working_dir"] = extras.working_dir if "://" in extras.working_dir else ""
    given = {key: value for key, value in environment.items() if value}
    body["metadata"]["name"] = (name if name[0].isalpha() else f"run-{name}")[:NAME_LENGTH].rstrip("-")
    command = command_of(request, overrides=published.defaults(request.overrides))
    body["spec"]["entrypoint"] = f"exec {command}" if published.shared else command
    body["spec"].update({"metadata": {RUN: config.name}} if published.shared else {})
    body["spec"].update({"runtimeEnvYAML": yaml.safe_dump(given)} if given else {})
    body["spec"].update({} if extras.cpus is None else {"entrypointNumCpus": extras.cpus})
    return dict(body)


def _require_possible(published: Published, request: RunRequest, config: RunConfig, extras: Extras) -> None:
    if request.fresh:
        raise RequestError(
            "--fresh: a RayJob is started again after a loss, and each time would move aside what the run has done "
            "so far. Give this run another name with --set name=..., or submit it with --address"
        )
    if config.fleet.queue is not None and not published.shared:
        raise RequestError(
            f"fleet.queue={config.fleet.queue!r}: this release gives each run a cluster of its own, where there is "
            "nobody to share with. Have fleet.enabled=true set in its values, submit the run to the team's cluster "
            "(--address instead of --kubernetes), or take no part with --set fleet.queue=none"
        )
    if extras.working_dir not in ("", ".") and "://" not in extras.working_dir:
        raise RequestError(
            f"--working-dir {extras.working_dir}: the Kubernetes API takes no code. Build it into the image, or put a "
            "zip where the cluster can read it and give its address (s3://..., https://...)"
        )
    for name in filter(SECRETIVE.search, extras.variables()):
        raise RequestError(
            f"--env {name} looks like a credential, and whoever may read RayJobs would read it: keep it in a Secret of "
            "the cluster (in the chart: storage.s3.existingSecret, auth.secretName)"
        )


def create(
    request: RunRequest, extras: Extras, place: Place, note: Callable[[str], None], *, dry_run: bool = False
) -> Created:
    """Create the RayJob, once its plan has been made here and the server has checked it without storing anything.

    Submitting the same run twice is harmless: the RayJob that exists is returned.

    Raises:
        RequestError: the job, its config or its plan is wrong, or another command runs under this name.
        ClusterError: the server cannot be reached or refuses.
    """
    job = load(request.job, request.args, request.overrides)
    custom, core, namespace = _clients(place)
    published = f"{place.release}-rayjob"
    with _explained(f"reading {published} in namespace {namespace}"):
        data = core.read_namespaced_config_map(published, namespace, _request_timeout=TIMEOUT_S).data
    release = Published.of(data)
    body = make_rayjob(release, request, job.config, extras)
    name, where = body["metadata"]["name"], (GROUP, VERSION, namespace, PLURAL)
    existing = _existing(custom, where, name)
    if existing is not None:
        return Created(_same(existing, body), new=False)
    plan = None if release.shape is None else plan_there(job, release.shape, note)
    for check in (True, False) if not dry_run else (True,):
        with _explained(f"creating RayJob {name} in namespace {namespace}"):
            options = {"dry_run": "All"} if check else {}
            made = custom.create_namespaced_custom_object(*where, body, _request_timeout=TIMEOUT_S, **options)
    return Created(dict(made), new=True, plan=plan)


def _clients(place: Place) -> tuple[Any, Any, str]:
    try:
        from kubernetes import client, config
    except ImportError:
        raise RequestError("--kubernetes needs the Kubernetes client: pip install 'orchestrator[kubernetes]'") from None
    try:
        api = config.new_client_from_config(context=place.context)
        _, current = config.list_kube_config_contexts()
    except config.ConfigException as error:
        raise ClusterError(f"no Kubernetes cluster is configured: {error}; set KUBECONFIG, or --context") from None
    namespace = place.namespace or current["context"].get("namespace") or "default"
    return client.CustomObjectsApi(api), client.CoreV1Api(api), namespace


def _existing(custom: Any, where: tuple[str, str, str, str], name: str) -> dict[str, Any] | None:
    from kubernetes.client import ApiException

    with _explained(f"looking for RayJob {name}"):
        try:
            return dict(custom.get_namespaced_custom_object(*where, name, _request_timeout=TIMEOUT_S))
        except ApiException as error:
            if error.status == 404:
                return None
            raise


def _same(existing: dict[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The RayJob that exists, if it is this run.

    Raises:
        RequestError: it is another one, or one that has ended without success.
    """
    name, spec = existing["metadata"]["name"], existing["spec"]
    state = (existing.get("status") or {}).get("jobDeploymentStatus", "")
    if spec.get("entrypoint") != body["spec"]["entrypoint"]:
        raise RequestError(
            f"RayJob {name} exists with another command: {spec.get('entrypoint')}\n"
            f"delete it ({_deletion(name)}), or give this run another name with --set name=..."
        )
    if state in ("Failed", "ValidationFailed"):
        raise RequestError(
            f"RayJob {name} has failed and is still there: look with `kubectl describe rayjob {name}`, delete it "
            f"({_deletion(name)}) and submit again; the run goes on from its last checkpoint"
        )
    return existing


def _deletion(name: str) -> str:
    return f"kubectl delete rayjob {name}; submitters may where the chart's rbac.allowDelete is true"


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """The API server's answers as ours."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise ClusterError(f"{doing}: {_reason(error)}{REMEDIES.get(error.status or 0, '')}") from None
    except (HTTPError, OSError) as error:
        raise ClusterError(
            f"{doing}: the API server does not answer ({type(error).__name__}); check the kubeconfig"
        ) from None


REMEDIES = {
    401: "; log in again",
    403: "; ask for the chart's role (rbac.subjects)",
    404: "; check --release and --namespace, and that the chart is installed there",
}


def _reason(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
