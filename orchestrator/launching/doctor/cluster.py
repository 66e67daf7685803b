"""Whether the cluster that a run would use can be reached, speaks the same versions and holds the job."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from orchestrator.config import RunConfig
from orchestrator.errors import ClusterError
from orchestrator.launching.doctor.finding import Finding, ok, problem, warning
from orchestrator.launching.doctor.probes import Cluster, Frameworks
from orchestrator.launching.doctor.software import installed_version
from orchestrator.planning.cluster import ClusterShape

__all__ = ["capacity", "embedded_cluster", "existing_cluster", "here_instead", "member", "shared_folder", "versions"]

CONNECT_S = 3.0
SUBMIT = "ray job submit --address http://HOST:8265 --working-dir . -- python -m orchestrator run JOB"
TOKEN = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(ssh HEAD ray get-auth-token)"
SAME_MINOR = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
ON_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


def embedded_cluster(frameworks: Frameworks, config: RunConfig | None = None) -> list[Finding]:
    """What a run would start here, having been given no address."""
    shape = frameworks.embedded
    if shape is None:
        return [ok("cluster", "none named: a run starts its own here")]
    has = f"{_many(shape.cpus, 'CPU')} and {_many(shape.accelerators, 'accelerator')}"
    return [ok("cluster", f"none named: a run starts its own here, with {has}"), *capacity(shape, config)]


def existing_cluster(
    text: str,
    source: str,
    environment: Mapping[str, str],
    *,
    config: RunConfig | None,
    home: Path | None,
    ask: Callable[[str], Cluster],
) -> list[Finding]:
    """Reach the cluster at ``text``, named by ``source``, and hold its answer against this machine and the job.

    ``home`` is the folder of the runs, or None where it is no folder.
    """
    if text != "auto" and (unreachable := _unreachable(text, source)):
        return [unreachable]
    cluster = ask(text)
    where = cluster.address or text
    if cluster.refused:
        return [_refused(where, environment)]
    if cluster.failure:
        detail = f"{where} does not answer as a Ray cluster: {cluster.failure}"
        return [problem("cluster", detail, "--address HOST:PORT as ray start --head has printed it")]
    if not cluster.address:
        return [problem("cluster", "auto: no cluster was started on this machine", "ray start --head --port=6379")]
    shape = ClusterShape(len(cluster.nodes), cluster.cpus, cluster.accelerators, cluster.accelerator)
    has = f"{_many(shape.nodes, 'node')}, {_many(shape.cpus, 'CPU')}, {_many(shape.accelerators, 'accelerator')}"
    kind = f" ({cluster.accelerator})" if cluster.accelerator else ""
    return [
        ok("cluster", f"{where}: {has}{kind}"),
        *versions(cluster, environment),
        *member(cluster),
        *capacity(shape, config),
        *shared_folder(cluster, home),
    ]


def _many(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _unreachable(text: str, source: str) -> Finding | None:
    shown = f"{source}={text}"
    if "://" in text:
        return problem("cluster", f"{shown}: a run takes HOST:6379, not {text.partition(':')[0]}://", SUBMIT)
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        return problem("cluster", f"{shown} is no address", f"{source}{' ' if source[0] == '-' else '='}HOST:6379")
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        why = f"no answer in {CONNECT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        return problem("cluster", f"{shown} cannot be reached: {why}", here_instead(source))
    return None


def here_instead(source: str) -> str:
    """The remedy for a cluster that does not answer."""
    leave = "leave --address out" if source == "--address" else f"unset {source}"
    return f"start it with ray start --head --port=6379, or {leave} to train here"


def _refused(where: str, environment: Mapping[str, str]) -> Finding:
    if environment.get("RAY_AUTH_MODE", "").lower() == "token":
        return problem("cluster", f"{where} wants another token than the one here", TOKEN)
    return problem("cluster", f"{where} wants a token, and Ray sends none while RAY_AUTH_MODE is not token", TOKEN)


def versions(
    cluster: Cluster,
    environment: Mapping[str, str],
    *,
    ray: str | None = None,
    python: str = ".".join(map(str, sys.version_info[:3])),
) -> list[Finding]:
    """Ray wants the same Ray and, unless told otherwise, the same Python to the patch level on both sides."""
    ray = ray or installed_version("ray") or "none"
    if cluster.ray != ray:
        detail = f"the cluster runs Ray {cluster.ray}, and this machine {ray}"
        return [problem("cluster.versions", detail, f"pip install 'ray[train,tune]=={cluster.ray}'")]
    if cluster.python == python:
        return [ok("cluster.versions", f"Ray {ray} and Python {python}, as here")]
    detail = f"the cluster runs Python {cluster.python}, and this machine {python}"
    minor = cluster.python.rpartition(".")[0]
    if minor != python.rpartition(".")[0]:
        return [problem("cluster.versions", detail, f"make clean install PYTHON=python{minor}")]
    if environment.get(SAME_MINOR) != "minor":
        return [problem("cluster.versions", f"{detail}: Ray refuses the difference", f"export {SAME_MINOR}=minor")]
    return [ok("cluster.versions", f"Ray {ray} and Python {cluster.python} there, {python} here")]


def member(cluster: Cluster, own: Sequence[str] | None = None) -> list[Finding]:
    """A driver joins through a node on its own machine, whose addresses are ``own``."""
    addresses = own if own is not None else [a.address for each in psutil.net_if_addrs().values() for a in each]
    if set(cluster.nodes) & set(addresses):
        return [ok("cluster.node", "this machine is one of its nodes")]
    detail = f"this machine is none of the nodes of {cluster.address}, and a run is driven from one"
    return [problem("cluster.node", detail, f"ray start --address={cluster.address}; or from anywhere: {SUBMIT}")]


def capacity(shape: ClusterShape, config: RunConfig | None) -> list[Finding]:
    """Why the job's workers do not fit, in the words of the plan's own refusal."""
    if config is None:
        return []
    try:
        shape.workers(config.scale)
    except ClusterError as error:
        detail, _, remedy = str(error).rpartition(": ")
        return [problem("cluster.capacity", detail, remedy)]
    return []


def shared_folder(cluster: Cluster, home: Path | None, filesystem: str | None = None) -> list[Finding]:
    """Workers on several machines write into one folder."""
    if len(cluster.nodes) < 2 or home is None:
        return []
    kind = filesystem or _filesystem_of(home)
    if kind not in ON_ONE_MACHINE:
        return [ok("storage.shared", f"{home} is on {kind}")]
    detail = f"{home} is on {kind}, which the cluster's other nodes do not see"
    return [warning("storage.shared", detail, "--set checkpoint.uri=/folder/mounted/on/every/node")]


def _filesystem_of(path: Path) -> str:
    mounts = [p for p in psutil.disk_partitions(all=True) if path.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "an unknown filesystem"
