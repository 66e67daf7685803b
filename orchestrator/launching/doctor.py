"""Say what on this machine, or on the cluster it joins, would break a run; each finding carries its remedy.

Nothing is printed and nothing is left behind: a check may create one probe file and removes it again. What may
hang or crash, the frameworks and a foreign cluster, is asked from a child process with a deadline.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement

from orchestrator.config import RunConfig
from orchestrator.errors import ClusterError, explain_oserror
from orchestrator.planning.cluster import ClusterShape
from orchestrator.storage.fence import WITHOUT_LOCKS
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.human import count, printable, size

__all__ = ["CHECKS", "Finding", "breaks_a_run", "examine", "rows"]

CHECKS = (
    "python",
    "package.torch",
    "package.ray",
    "package.deepspeed",
    "package.pyarrow",
    "package.pydantic",
    "import.torch",
    "import.deepspeed",
    "accelerator",
    "cpu",
    "memory",
    "shared_memory",
    "semaphores",
    "open_files",
    "cluster",
    "cluster.token",
    "cluster.versions",
    "cluster.node",
    "cluster.capacity",
    "storage.runs",
    "storage.shared",
    "storage.temporary",
    "disk.runs",
    "disk.temporary",
    "lock.extension",
    "lock.run",
    "checkpoint.draft",
    "network.hostname",
)
"""Every name a finding can have, in the order of the report; another declared package adds ``package.NAME``."""

Status = Literal["ok", "warning", "problem"]
DiskUsage = Callable[[Path], tuple[int, int, int]]
"""Total, used and free bytes at a path, as ``shutil.disk_usage`` gives them."""
T = TypeVar("T")

MIB, GIB = 2**20, 2**30
CORE = ("torch", "ray", "deepspeed", "pyarrow", "pydantic")
DEADLINE_S = 60.0
FRAMEWORKS_S = 45
CLUSTER_S = 20
ANSWER_S = 6
CONNECT_S = 3.0
# Ray kills workers above this share of memory (RAY_memory_usage_threshold).
MEMORY_THRESHOLD = 0.95
# Ray 2.60's longest socket in its temporary folder, and the longest path that Linux gives a socket.
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SOCKET_PATH_BYTES = 107
OTHER_FOLDER = "--set checkpoint.uri=/another/folder"
SUBMIT = "ray job submit --address http://HOST:8265 --working-dir . -- python -m orchestrator run JOB"
ON_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


@dataclass(frozen=True)
class Finding:
    """What one check found. ``remedy`` is a command or a setting, and empty where the status is ok."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def breaks_a_run(findings: Sequence[Finding]) -> bool:
    """Whether a run would fail, or not start, as things stand: the command's exit code is 1."""
    return any(finding.status == "problem" for finding in findings)


def rows(findings: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
    """Check, status, detail and remedy of each finding, fit for a terminal."""
    return [(f.check, f.status, printable(f.detail), printable(f.remedy)) for f in findings]


def _ok(check: str, detail: str) -> Finding:
    return Finding(check, "ok", detail)


def _warning(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, "warning", detail, remedy)


def _problem(check: str, detail: str, remedy: str) -> Finding:
    return Finding(check, "problem", detail, remedy)


# -- the whole examination ---------------------------------------------------------------------


class Check(NamedTuple):
    """One independent part of the examination; ``if_stuck`` is the remedy where it fails or never ends."""

    name: str
    run: Callable[[], list[Finding]]
    if_stuck: str


def examine(
    *,
    folder: str | Path | None = None,
    address: str | None = None,
    config: RunConfig | None = None,
    environment: Mapping[str, str] = os.environ,
    machine: Machine | None = None,
) -> list[Finding]:
    """Run all checks at once and return their findings in the order of ``CHECKS``.

    Args:
        folder: where the folders of runs lie; by default ``config.checkpoint.uri``, or else ``runs``.
        address: the cluster to join, as given to ``--address``; by default ``RAY_ADDRESS``.
        config: of the job to be run, which is then held against what is there.
        environment: read in place of ``os.environ``, but by the child processes.
        machine: how the frameworks, the driver and the cluster are asked.
    """
    machine = machine or Machine()
    home = folder if folder is not None else (config.checkpoint.uri if config else "runs")
    frameworks = _start(machine.frameworks)
    checks = [
        *_checks_of_software(frameworks, machine, environment),
        *_checks_of_resources(frameworks, machine),
        *_checks_of_cluster(frameworks, machine, environment, address=address, config=config, home=home),
        *_checks_of_storage(machine, environment),
        *_checks_of_runs(machine, home=home, name=config.name if config else None),
    ]
    started = [(check, _start(check.run)) for check in checks]
    deadline = time.monotonic() + DEADLINE_S
    found = [finding for check, future in started for finding in _outcome(check, future, deadline)]
    order = {name: position for position, name in enumerate(CHECKS)}
    last_package = order["package.pydantic"]
    return sorted(found, key=lambda finding: order.get(finding.check, last_package))


def _checks_of_software(
    frameworks: Future[Frameworks], machine: Machine, environment: Mapping[str, str]
) -> list[Check]:
    return [
        Check("python", python, "python --version"),
        Check("package.torch", packages, "pip check"),
        Check("import.torch", lambda: imports(frameworks.result()), "python -X faulthandler -c 'import deepspeed'"),
        Check("accelerator", lambda: accelerators(frameworks.result(), machine.driver(), environment), "nvidia-smi"),
        Check("network.hostname", partial(hostname, environment), "export GLOO_SOCKET_IFNAME=lo"),
    ]


def _checks_of_resources(frameworks: Future[Frameworks], machine: Machine) -> list[Check]:
    def shared() -> list[Finding]:
        return shared_memory(accelerators=len(frameworks.result().devices), disk_usage=machine.disk_usage)

    return [
        Check("cpu", lambda: cpus(frameworks.result().embedded), "nproc"),
        Check("memory", memory, "free -h"),
        Check("shared_memory", shared, "df -h /dev/shm"),
        Check("semaphores", semaphores, "df -h /dev/shm"),
        Check("open_files", open_files, "ulimit -n 65536"),
    ]


def _checks_of_cluster(
    frameworks: Future[Frameworks],
    machine: Machine,
    environment: Mapping[str, str],
    *,
    address: str | None,
    config: RunConfig | None,
    home: str | Path,
) -> list[Check]:
    source, text = ("--address", address) if address else ("RAY_ADDRESS", environment.get("RAY_ADDRESS", ""))
    how_to_send = Check("cluster.token", partial(token, environment, text), "unset RAY_AUTH_TOKEN_PATH")
    if text in ("", "local"):
        return [how_to_send, Check("cluster", lambda: embedded_cluster(frameworks.result(), config), "nproc")]
    existing = partial(existing_cluster, text, source, environment, config=config, home=home, ask=machine.cluster)
    return [how_to_send, Check("cluster", existing, _here_instead(source))]


def _checks_of_storage(machine: Machine, environment: Mapping[str, str]) -> list[Check]:
    def free() -> list[Finding]:
        return disk("disk.temporary", temporary_folder(environment), elsewhere, disk_usage=machine.disk_usage)

    elsewhere = "export RAY_TMPDIR=/another/folder"
    return [
        Check("storage.temporary", lambda: temporary_is_usable(temporary_folder(environment)), elsewhere),
        Check("disk.temporary", free, elsewhere),
        Check("lock.extension", partial(extension_locks, environment), "export TORCH_EXTENSIONS_DIR=/another/folder"),
    ]


def _checks_of_runs(machine: Machine, *, home: str | Path, name: str | None) -> list[Check]:
    writable = Check("storage.runs", partial(runs_folder, home), OTHER_FOLDER)
    if _is_url(home):
        return [writable]
    folder = _absolute(home)
    free = partial(disk, "disk.runs", folder, OTHER_FOLDER, disk_usage=machine.disk_usage)
    return [
        writable,
        Check("disk.runs", free, OTHER_FOLDER),
        Check("lock.run", partial(run_locks, folder, name=name), OTHER_FOLDER),
        Check("checkpoint.draft", partial(drafts, folder), OTHER_FOLDER),
    ]


def _start(compute: Callable[[], T]) -> Future[T]:
    """Compute on a thread that keeps nobody waiting: a dead mount or a dead name server must not hold up the exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(compute())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _outcome(check: Check, future: Future[list[Finding]], deadline: float) -> list[Finding]:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return [_problem(check.name, f"the check did not end in {DEADLINE_S:g} s", check.if_stuck)]
    except OSError as error:
        return [_problem(check.name, f"the check failed: {error}", check.if_stuck)]


# -- Python and packages -----------------------------------------------------------------------


def python(version: tuple[int, ...] = sys.version_info[:3]) -> list[Finding]:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return [_problem("python", f"{text}: 3.11 or newer is needed", "make install PYTHON=python3.11")]
    return [_ok("python", text)]


def packages(
    declared: Sequence[str] | None = None, installed: Callable[[str], str | None] | None = None
) -> list[Finding]:
    """Hold what is installed against the ranges this distribution declares; beyond the core only faults are named."""
    requirements = declared_requirements() if declared is None else declared
    if not requirements:
        detail = "orchestrator is not installed here, so the versions it needs are unknown"
        return [_warning("package.orchestrator", detail, "pip install --editable .")]
    findings = [_package(Requirement(text), installed or installed_version) for text in requirements]
    return [f for f in findings if f.status != "ok" or f.check.removeprefix("package.") in CORE]


def _package(requirement: Requirement, installed: Callable[[str], str | None]) -> Finding:
    check = f"package.{requirement.name.lower()}"
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return _ok(check, "not needed here")
    wanted = str(requirement.specifier) or "any version"
    requirement.marker = None
    remedy = f"pip install {shlex.quote(str(requirement))}"
    version = installed(requirement.name)
    if version is None:
        return _problem(check, f"not installed: {wanted} is needed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return _problem(check, f"{version}: {wanted} is needed", remedy)
    return _ok(check, f"{version} ({wanted})")


def declared_requirements() -> list[str]:
    """Requirements from the installed metadata, or from the checkout this file lies in; empty without both."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.requires("orchestrator") or []
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    with contextlib.suppress(FileNotFoundError, tomllib.TOMLDecodeError, KeyError):
        return list(tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]["dependencies"])
    return []


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def imports(frameworks: Frameworks) -> list[Finding]:
    """Whether torch and DeepSpeed can be imported, one after the other."""
    if not frameworks.torch:
        return [_problem("import.torch", frameworks.failure, _reinstall("torch", frameworks.failure))]
    findings = [_ok("import.torch", f"torch {frameworks.torch} imports")]
    if not frameworks.gloo:
        detail = f"torch {frameworks.torch} is built without gloo, by which workers on CPU talk to each other"
        findings = [_problem("import.torch", detail, _reinstall("torch"))]
    if frameworks.deepspeed:
        findings.append(_ok("import.deepspeed", f"DeepSpeed {frameworks.deepspeed} imports"))
    else:
        remedy = _reinstall("deepspeed", frameworks.failure)
        findings.append(_problem("import.deepspeed", frameworks.failure, remedy))
    return findings


def _reinstall(package: str, failure: str = "") -> str:
    if missing := re.search(r"No module named '(\w+)", failure):
        return f"pip install {missing[1]}"
    version = installed_version(package)
    pinned = f"{package}=={version.partition('+')[0]}" if version else package
    return f"pip install --force-reinstall --no-cache-dir {pinned}"


# -- accelerators ------------------------------------------------------------------------------


def accelerators(frameworks: Frameworks, driver: Driver | None, environment: Mapping[str, str]) -> list[Finding]:
    """What torch can compute on, held against what the driver reports; empty where torch cannot be imported."""
    if not frameworks.torch:
        return []
    if frameworks.devices:
        return _devices(frameworks, driver, environment)
    if driver is None or driver.failure:
        return [_nothing_reported(frameworks, driver)]
    gpus = _grouped(driver.gpus)
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        detail = f"{gpus} hidden by CUDA_VISIBLE_DEVICES={hidden!r}: runs train on CPU"
        return [_warning("accelerator", detail, "unset CUDA_VISIBLE_DEVICES")]
    if not frameworks.built_for:
        detail = f"nvidia-smi reports {gpus}, and torch {frameworks.torch} is a build for CPU"
        return [_problem("accelerator", detail, _torch_from("https://pypi.org/simple", frameworks))]
    detail = (
        f"nvidia-smi reports {gpus} with driver {driver.version}, and torch {frameworks.torch}, "
        f"built for {frameworks.built_for}, cannot use them: {frameworks.why_no_device}"
    )
    remedy = f"update the NVIDIA driver to one for {frameworks.built_for}; to train on CPU: CUDA_VISIBLE_DEVICES=''"
    return [_problem("accelerator", detail, remedy)]


def _nothing_reported(frameworks: Frameworks, driver: Driver | None) -> Finding:
    if driver is not None:
        detail = f"nvidia-smi is installed and fails: {driver.failure}: runs train on CPU"
        remedy = "modprobe nvidia; in a container: docker run --gpus all"
        return _warning("accelerator", detail, remedy)
    if frameworks.built_for:
        detail = (
            f"torch {frameworks.torch} is built for {frameworks.built_for} and finds no device "
            f"({frameworks.why_no_device}): runs train on CPU"
        )
        remedy = _torch_from("https://download.pytorch.org/whl/cpu", frameworks)
        return _warning("accelerator", detail, f"install the device's driver; without a device: {remedy}")
    return _ok("accelerator", "none: runs train on CPU")


def _torch_from(index: str, frameworks: Frameworks) -> str:
    version = frameworks.torch.partition("+")[0]
    return f"pip install --force-reinstall --index-url {index} torch=={version}"


def _devices(frameworks: Frameworks, driver: Driver | None, environment: Mapping[str, str]) -> list[Finding]:
    devices = frameworks.devices
    sound = [d for d in devices if not d.error]
    findings = [_faulty(index, devices, environment) for index, d in enumerate(devices) if d.error]
    if len(sound) > 1 and not frameworks.nccl:
        detail = f"torch {frameworks.torch} is built without NCCL, by which {len(sound)} devices talk to each other"
        findings.append(_problem("accelerator", detail, _reinstall("torch")))
    for index, device in enumerate(devices):
        if not device.error and device.free_bytes < device.memory_bytes / 2:
            free = f"{size(device.free_bytes)} of {size(device.memory_bytes)}"
            detail = f"device {index}, {device.name}, has {free} free: other processes hold the rest"
            findings.append(_warning("accelerator", detail, "nvidia-smi --query-compute-apps=pid,name --format=csv"))
    if sound and not findings:
        described = _grouped([f"{d.name} ({size(d.memory_bytes)}, {'bf16' if d.bf16 else 'no bf16'})" for d in sound])
        version = f", driver {driver.version}" if driver and driver.version else ""
        findings.append(_ok("accelerator", f"{described}; torch for {frameworks.built_for}{version}"))
    return findings


def _faulty(index: int, devices: Sequence[Device], environment: Mapping[str, str]) -> Finding:
    names = [n.strip() for n in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    if len(names) < len(devices):
        names = [str(i) for i in range(len(devices))]
    sound = ",".join(name for name, device in zip(names, devices, strict=False) if not device.error)
    detail = f"device {index}, {devices[index].name}, cannot compute: {devices[index].error}"
    return _problem("accelerator", detail, f"export CUDA_VISIBLE_DEVICES={sound or repr('')}")


def _grouped(names: Sequence[str]) -> str:
    return ", ".join(f"{times} x {name}" for name, times in Counter(names).items())


# -- processors, memory, limits ----------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What control groups leave this process; None where they set no limit."""

    cpus: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None


def container_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """Read the tightest limits on the way from this process's control groups to their root, of either version."""
    lines = _text(membership).splitlines()
    paths = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    if (root / "cgroup.controllers").exists():
        cpu = memory = _folders(root, paths.get("", "/"))
        quotas = [_text(f / "cpu.max") for f in cpu]
        limit, usage, reclaimable = "memory.max", "memory.current", "inactive_file"
    else:
        cpu, memory = _folders(root / "cpu", paths.get("cpu", "/")), _folders(root / "memory", paths.get("memory", "/"))
        quotas = [f"{_text(f / 'cpu.cfs_quota_us')} {_text(f / 'cpu.cfs_period_us')}" for f in cpu]
        limit, usage, reclaimable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    limited = [(number, f) for f in memory if (number := _number(_text(f / limit))) is not None]
    tightest, folder = min(limited, default=(None, root))
    return Limits(
        cpus=min((share for share in map(_share, quotas) if share is not None), default=None),
        memory_bytes=tightest,
        memory_used_bytes=None if tightest is None else _used(folder, usage, reclaimable),
    )


def _folders(base: Path, path: str) -> list[Path]:
    """The control group at ``path`` and those around it; only the base where the path lies out of sight."""
    inside = base if ".." in Path(path).parts else base / path.lstrip("/")
    return [f for f in (inside, *inside.parents) if f.is_relative_to(base) and f.is_dir()]


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""


def _number(text: str) -> int | None:
    # Version 1 writes "no limit" as the largest number of whole pages.
    return int(text) if text.strip().isdigit() and int(text) < 2**60 else None


def _share(quota_and_period: str) -> float | None:
    match [_number(word) for word in quota_and_period.split()]:
        case [int(quota), int(period)] if period:
            return quota / period
    return None


def _used(folder: Path, usage: str, reclaimable: str) -> int | None:
    """Bytes in use without the file cache that the kernel would give up first, as Ray's memory monitor counts."""
    total = _number(_text(folder / usage))
    cache = re.search(rf"^{reclaimable} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, total - int(cache[1])) if total is not None and cache else total


def cpus(embedded: ClusterShape | None, limits: Limits | None = None) -> list[Finding]:
    """CPUs this process may use; the container's limit is held against what an embedded cluster would hand out."""
    limits = container_limits() if limits is None else limits
    allowed, total = sorted(os.sched_getaffinity(0)), os.cpu_count() or 1
    offered = len(allowed) if embedded is None else embedded.cpus
    if limits.cpus is not None and limits.cpus < offered:
        detail = f"the container may use {limits.cpus:g}, and a run's own cluster would hand out {offered:g}"
        some = ",".join(map(str, allowed[: max(1, int(limits.cpus))]))
        return [_warning("cpu", detail, f"taskset -c {some} orchestrator run JOB")]
    return [_ok("cpu", str(total) if len(allowed) == total else f"{len(allowed)} of {total} may be used")]


def memory(limits: Limits | None = None, host: tuple[int, int] | None = None) -> list[Finding]:
    """Free memory within the container's limit, as Ray kills workers where it runs out; ``host``: total, available."""
    limits = container_limits() if limits is None else limits
    total, free = host or (psutil.virtual_memory().total, psutil.virtual_memory().available)
    where = ""
    if limits.memory_bytes is not None and limits.memory_bytes < total:
        total, where = limits.memory_bytes, ", the container's limit"
        free = max(0, min(free, total - (limits.memory_used_bytes or 0)))
    detail = f"{size(free)} of {size(total)} available{where}"
    if free < (1 - MEMORY_THRESHOLD) * total:
        detail += f"; Ray kills workers where more than {MEMORY_THRESHOLD:.0%} is in use"
        return [_problem("memory", detail, "end what takes it: ps aux --sort=-rss | head")]
    if free < 2 * GIB:
        detail += "; Ray and each worker take about 0.5 GiB before the model"
        return [_warning("memory", detail, "--set scale.workers=1")]
    return [_ok("memory", detail)]


def shared_memory(
    folder: Path = Path("/dev/shm"), *, accelerators: int, disk_usage: DiskUsage = shutil.disk_usage
) -> list[Finding]:
    """Room for Ray's object store, which falls back to disk without it, and for NCCL, which fails without it."""
    larger = "docker run --shm-size=2g; elsewhere: mount -o remount,size=2G /dev/shm"
    try:
        total, _, free = disk_usage(folder)
    except OSError as error:
        remedy = f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}"
        return [_problem("shared_memory", f"{explain_oserror(folder, error)}: Ray does not start", remedy)]
    detail = f"{size(free)} of {size(total)} free in {folder}"
    if free < 64 * MIB and accelerators > 1:
        detail += f": too little for NCCL between {accelerators} devices"
        return [_problem("shared_memory", detail, larger)]
    if free < GIB:
        return [_warning("shared_memory", f"{detail}: Ray keeps objects on disk instead, slowly", larger)]
    return [_ok("shared_memory", detail)]


def semaphores(create: Callable[[], object] = lambda: multiprocessing.get_context("fork").Lock()) -> list[Finding]:
    """Whether processes can share a lock, as data loaders and scikit-learn do."""
    try:
        create()
    except OSError as error:
        detail = f"processes cannot share a lock ({error.strerror or error}): data loaders with workers fail"
        return [_warning("semaphores", detail, "mount -o remount,size=2G,mode=1777 /dev/shm")]
    return [_ok("semaphores", "processes can share locks")]


def open_files(limits: tuple[int, int] | None = None) -> list[Finding]:
    """Files a process may open: Ray raises the soft limit to the hard one by itself, up to 65,536."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    raised = 65536 if hard == unlimited else min(hard, 65536)
    reached = soft if soft == unlimited else max(soft, raised)
    if reached != unlimited and reached < 4096:
        detail = f"{count(reached)} per process: Ray's connections and files need more"
        return [_warning("open_files", detail, "ulimit -n 65536, as root or in /etc/security/limits.conf")]
    text = "unlimited" if soft == unlimited else count(soft)
    return [_ok("open_files", text if reached == soft else f"{text}, which Ray raises to {count(reached)}")]


# -- cluster -----------------------------------------------------------------------------------


def embedded_cluster(frameworks: Frameworks, config: RunConfig | None = None) -> list[Finding]:
    """What a run would start here, having been given no address."""
    shape = frameworks.embedded
    if shape is None:
        return [_ok("cluster", "none named: a run starts its own here")]
    has = f"{_many(shape.cpus, 'CPU')} and {_many(shape.accelerators, 'accelerator')}"
    return [_ok("cluster", f"none named: a run starts its own here, with {has}"), *capacity(shape, config)]


def capacity(shape: ClusterShape, config: RunConfig | None) -> list[Finding]:
    """Whether the job's workers fit; empty without a job."""
    if config is None:
        return []
    try:
        workers = shape.workers(config.scale)
    except ClusterError as error:
        detail, _, remedy = str(error).rpartition(": ")
        return [_problem("cluster.capacity", detail, remedy)]
    return [_ok("cluster.capacity", f"{_many(workers, 'worker')} of {config.name} can be placed")]


def _many(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def existing_cluster(
    text: str,
    source: str,
    environment: Mapping[str, str],
    *,
    config: RunConfig | None,
    home: str | Path,
    ask: Callable[[str, str], Cluster],
) -> list[Finding]:
    """Reach the cluster at ``text``, named by ``source``, and hold its answer against this machine and the job."""
    if text == "auto":
        if has_token(environment) and "RAY_AUTH_MODE" not in environment:
            environment = {**environment, "RAY_AUTH_MODE": "token"}  # Ray sends a token to what it finds by itself
        found = ask("auto", environment.get("RAY_AUTH_MODE", ""))
        if not found.address and not found.failure:
            return [_problem("cluster", "auto: no cluster was started on this machine", "ray start --head --port=6379")]
        return _joined(found, found.address or "auto", environment, config=config, home=home)
    scheme, host, port = parse_address(text)
    shown = f"{source}={re.sub('//[^/@]*@', '//', text)}"
    if scheme:
        server = "a Ray Client server" if scheme == "ray" else "a server for jobs"
        return [_problem("cluster", f"{shown} is {server}, and a run takes HOST:6379", SUBMIT)]
    if not host or not port:
        example = "export RAY_ADDRESS=HOST:6379" if source == "RAY_ADDRESS" else "--address HOST:6379"
        return [_problem("cluster", f"{shown} is no address", example)]
    if unreachable := connect(host, port):
        return [_problem("cluster", f"{shown} cannot be reached: {unreachable}", _here_instead(source))]
    where = f"{host}:{port}"
    return _joined(ask(where, ""), where, environment, config=config, home=home)


def _here_instead(source: str) -> str:
    leave = "unset RAY_ADDRESS" if source == "RAY_ADDRESS" else "leave --address out"
    return f"start it with ray start --head --port=6379, or {leave} to train here"


def parse_address(text: str) -> tuple[str, str, int]:
    """Scheme, host and port; host and port are empty and 0 where there are none."""
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        return parts.scheme, parts.hostname or "", parts.port or 0
    except ValueError:
        return "", "", 0


def connect(host: str, port: int, timeout_s: float = CONNECT_S) -> str:
    """Why no connection can be made, or empty."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except TimeoutError:
        return f"no answer in {timeout_s:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _joined(
    cluster: Cluster, where: str, environment: Mapping[str, str], *, config: RunConfig | None, home: str | Path
) -> list[Finding]:
    if cluster.refused:
        return [_refused(where, environment)]
    if cluster.failure:
        detail = f"{where} is open, but does not answer as a Ray cluster: {cluster.failure}"
        return [_problem("cluster", detail, "--address HOST:PORT as ray start --head has printed it")]
    shape = ClusterShape(len(cluster.nodes), cluster.cpus, cluster.accelerators, cluster.accelerator)
    has = f"{_many(shape.nodes, 'node')}, {_many(shape.cpus, 'CPU')}, {_many(shape.accelerators, 'accelerator')}"
    kind = f" ({cluster.accelerator})" if cluster.accelerator else ""
    return [
        _ok("cluster", f"{where}: {has}{kind}"),
        *versions(cluster, environment),
        *member(cluster, where),
        *capacity(shape, config),
        *shared_folder(cluster, home),
    ]


def _refused(where: str, environment: Mapping[str, str]) -> Finding:
    if has_token(environment) and environment.get("RAY_AUTH_MODE", "").lower() != "token":
        detail = f"{where} wants a token; there is one here, which Ray does not send while RAY_AUTH_MODE is not token"
        return _problem("cluster", detail, "export RAY_AUTH_MODE=token")
    has = "the one here is another cluster's" if has_token(environment) else "there is none here"
    remedy = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(ssh HEAD ray get-auth-token)"
    return _problem("cluster", f"{where} wants a token, and {has}", remedy)


def versions(
    cluster: Cluster,
    environment: Mapping[str, str],
    *,
    ray: str | None = None,
    python: str = ".".join(map(str, sys.version_info[:3])),
) -> list[Finding]:
    """Ray wants the same Ray and, unless told otherwise, the same Python to the patch level on both sides."""
    ray = (installed_version("ray") or "") if ray is None else ray
    if not cluster.ray:
        return []
    if cluster.ray != ray:
        detail = f"the cluster runs Ray {cluster.ray}, and this machine {ray or 'none'}"
        return [_problem("cluster.versions", detail, f"pip install 'ray[train,tune]=={cluster.ray}'")]
    minor = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
    if cluster.python.split(".")[:2] != python.split(".")[:2]:
        detail = f"the cluster runs Python {cluster.python}, and this machine {python}"
        short = ".".join(cluster.python.split(".")[:2])
        return [_problem("cluster.versions", detail, f"make clean install PYTHON=python{short}")]
    if cluster.python != python and environment.get(minor) != "minor":
        detail = f"the cluster runs Python {cluster.python}, and this machine {python}: Ray refuses the difference"
        return [_problem("cluster.versions", detail, f"export {minor}=minor")]
    pythons = f"{python}, as here" if cluster.python == python else f"{cluster.python} there, {python} here"
    return [_ok("cluster.versions", f"Ray {ray} and Python {pythons}")]


def member(cluster: Cluster, where: str, own: Sequence[str] | None = None) -> list[Finding]:
    """A driver joins through a node on its own machine."""
    addresses = own if own is not None else [a.address for each in psutil.net_if_addrs().values() for a in each]
    if set(cluster.nodes) & set(addresses):
        return [_ok("cluster.node", "this machine is one of its nodes")]
    detail = f"this machine is none of the nodes of {where}, and a run is driven from one"
    return [_problem("cluster.node", detail, f"ray start --address={where}; or from anywhere: {SUBMIT}")]


def shared_folder(cluster: Cluster, home: str | Path, filesystem: str | None = None) -> list[Finding]:
    """Workers on several machines write into one folder."""
    if len(cluster.nodes) < 2 or _is_url(home):
        return []
    path = _absolute(home)
    kind = filesystem or filesystem_of(path)
    if kind not in ON_ONE_MACHINE:
        return [_ok("storage.shared", f"{path} is on {kind}")]
    detail = f"{path} is on {kind}, which the cluster's other nodes do not see"
    return [_warning("storage.shared", detail, "--set checkpoint.uri=/folder/mounted/on/every/node")]


def filesystem_of(path: Path) -> str:
    """Type of the filesystem that holds ``path``, such as ext4."""
    mounts = [p for p in psutil.disk_partitions(all=True) if path.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "an unknown filesystem"


def token(environment: Mapping[str, str], address: str) -> list[Finding]:
    """Ray's token: sent to a named address only with RAY_AUTH_MODE=token; a run's own cluster gets a fresh one."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if not mode and address in ("", "local"):
        return [_ok("cluster.token", "a fresh one for each cluster that a run starts")]
    if mode != "token" and not (address == "auto" and not mode and has_token(environment)):
        return [_ok("cluster.token", f"none is sent: RAY_AUTH_MODE{f'={mode}' if mode else ' is not set'}")]
    place = _token_place(environment)
    if environment.get("RAY_AUTH_TOKEN"):
        return [_ok("cluster.token", "read from RAY_AUTH_TOKEN")]
    if _text(place).strip():
        return [_ok("cluster.token", f"read from {place}")]
    if environment.get("RAY_AUTH_TOKEN_PATH"):
        detail = f"RAY_AUTH_TOKEN_PATH={place} cannot be read, or is empty"
        return [_problem("cluster.token", detail, "unset RAY_AUTH_TOKEN_PATH")]
    if address in ("", "local") and os.access(_nearest(place.parent), os.W_OK):
        return [_ok("cluster.token", f"Ray will write one to {place}")]
    detail = f"RAY_AUTH_MODE=token, and there is none in RAY_AUTH_TOKEN or {place}"
    return [_problem("cluster.token", detail, "export RAY_AUTH_TOKEN_PATH=FILE, or unset RAY_AUTH_MODE")]


def has_token(environment: Mapping[str, str]) -> bool:
    """Whether Ray would find a token, be it sent or not."""
    return bool(environment.get("RAY_AUTH_TOKEN")) or bool(_text(_token_place(environment)).strip())


def _token_place(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or _home(environment) / ".ray" / "auth_token")


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HOME") or Path.home())


# -- storage -----------------------------------------------------------------------------------


def runs_folder(folder: str | Path) -> list[Finding]:
    """Whether runs can write where their folders would be; a folder that does not exist yet is not created."""
    if _is_url(folder):
        detail = f"{folder}: only folders of this machine or a shared filesystem can be used"
        return [_problem("storage.runs", detail, "--set checkpoint.uri=runs")]
    path = _absolute(folder)
    try:
        nearest = _nearest(path)
        locks = _write_probe(nearest)
    except OSError as error:
        return [_problem("storage.runs", f"cannot be written: {explain_oserror(path, error)}", OTHER_FOLDER)]
    if not locks:
        detail = f"{path} has no file locks: two drivers of one run on different machines would not notice each other"
        return [_warning("storage.runs", detail, OTHER_FOLDER)]
    return [_ok("storage.runs", f"{path} can be written{'' if nearest == path else ', once created'}")]


def _is_url(folder: str | Path) -> bool:
    return re.match(r"\w[\w+.-]+:/", str(folder)) is not None  # a Path keeps one slash of s3://


def _absolute(folder: str | Path) -> Path:
    return Path(folder).expanduser().absolute()


def _nearest(path: Path) -> Path:
    """The path itself, or the first of its parents that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _write_probe(folder: Path) -> bool:
    """Create, lock and remove a file; returns whether it could be locked."""
    probe = folder / f".doctor-{secrets.token_hex(4)}"
    with probe.open("xb") as stream:
        try:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
            return _can_lock(stream.fileno())
        finally:
            probe.unlink()


def _can_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return False
        raise
    return True


def temporary_folder(environment: Mapping[str, str]) -> Path:
    """Where Ray puts logs, sockets and spilled objects of a cluster that a run starts."""
    return Path(environment.get("RAY_TMPDIR") or Path(tempfile.gettempdir()) / "ray").absolute()


def temporary_is_usable(folder: Path) -> list[Finding]:
    """Whether Ray can write there, and its sockets get paths that are short enough."""
    remedy = "export RAY_TMPDIR=/tmp/ray" if folder != Path("/tmp/ray") else "export RAY_TMPDIR=/var/tmp/ray"
    excess = len(os.fsencode(folder / LONGEST_SOCKET)) - SOCKET_PATH_BYTES
    if excess > 0:
        return [_problem("storage.temporary", f"{folder} is {excess} characters too long for Ray's sockets", remedy)]
    try:
        _write_probe(_nearest(folder))
    except OSError as error:
        return [_problem("storage.temporary", f"cannot be written: {explain_oserror(folder, error)}", remedy)]
    return [_ok("storage.temporary", f"{folder} can be written")]


def disk(check: str, folder: Path, elsewhere: str, *, disk_usage: DiskUsage = shutil.disk_usage) -> list[Finding]:
    """Free space where ``folder`` is, or will be."""
    total, _, free = disk_usage(_nearest(folder))
    detail = f"{size(free)} of {size(total)} free for {folder}"
    if free >= 5 * GIB:
        return [_ok(check, detail)]
    remedy = f"make room (du -xh {_quoted(folder)} | sort -h), or {elsewhere}"
    return [_problem(check, detail, remedy) if free < GIB else _warning(check, detail, remedy)]


# -- what dead processes leave behind ----------------------------------------------------------


def extension_locks(environment: Mapping[str, str]) -> list[Finding]:
    """Locks of torch's extension builder: it keeps the file open while it builds, and never removes it once killed."""
    cache = environment.get("XDG_CACHE_HOME") or str(_home(environment) / ".cache")
    root = Path(environment.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    locks = sorted(path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern) if path.is_file())
    builders = _holders(locks)
    findings = [_extension_lock(lock, builders.get(lock)) for lock in locks]
    return findings or [_ok("lock.extension", f"none in {root}")]


def _extension_lock(lock: Path, builder: int | None) -> Finding:
    if builder is not None:
        return _ok("lock.extension", f"process {builder} is building {lock.parent.name}")
    detail = f"{lock}: its builder is dead, and every start that needs {lock.parent.name} waits for ever"
    return _problem("lock.extension", detail, f"rm {_quoted(lock)}")


def _holders(paths: Sequence[Path]) -> dict[Path, int]:
    """Which process has each of ``paths`` open, as far as this user may see."""
    wanted = {str(path.resolve()): path for path in paths}
    found: dict[Path, int] = {}
    for process in psutil.process_iter(["open_files"]) if wanted else ():
        for opened in process.info["open_files"] or ():
            if opened.path in wanted:
                found[wanted[opened.path]] = process.pid
    return found


def run_locks(folder: Path, *, name: str | None = None) -> list[Finding]:
    """Which runs are being driven right now; a problem only for the run called ``name``."""
    held = [run for run in _runs(folder) if is_held(run)]
    return [_held(run, is_wanted=run.root.name == name) for run in held] or [_ok("lock.run", "no run is being driven")]


def _runs(folder: Path) -> list[RunFolder]:
    return [RunFolder(root) for root in sorted(folder.glob("*")) if RunFolder(root).control.is_dir()]


def _held(run: RunFolder, *, is_wanted: bool) -> Finding:
    detail = f"{run.root.name} is owned by {_owner(run)}"
    if is_wanted:
        return _problem("lock.run", detail, "wait for it, stop it, or --set name=another-name")
    return _ok("lock.run", detail)


def _owner(run: RunFolder) -> str:
    return _text(run.control / "driver.lock")[:200].strip() or "another process"


def is_held(run: RunFolder) -> bool:
    """Whether a live process holds the run's ``DriverLock``.

    The lock is tried only where the process it names may be alive: for that instant a driver would find it taken.
    """
    named = re.fullmatch(r"process (\d+) on (\S+)", _owner(run))
    if named and named[2] == socket.gethostname() and not psutil.pid_exists(int(named[1])):
        return False
    try:
        with (run.control / "driver.lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def drafts(folder: Path) -> list[Finding]:
    """Checkpoints that a killed run began and nobody will finish."""
    findings = []
    for run in _runs(folder):
        begun = sorted(run.checkpoints.glob(".draft-*"))
        if begun and not is_held(run):
            taken = sum(path.stat().st_size for draft in begun for path in draft.rglob("*") if path.is_file())
            detail = f"{run.root.name} left {len(begun)} unfinished, {size(taken)} in all"
            findings.append(_warning("checkpoint.draft", detail, f"rm -r {_quoted(run.checkpoints)}/.draft-*"))
    return findings or [_ok("checkpoint.draft", "none left unfinished")]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


# -- network -----------------------------------------------------------------------------------


def hostname(
    environment: Mapping[str, str],
    *,
    resolve: Callable[[str], str] = socket.gethostbyname,
    interfaces: Sequence[str] | None = None,
) -> list[Finding]:
    """Gloo listens where the host's name leads, unless told which interface to use."""
    names = list(psutil.net_if_addrs()) if interfaces is None else list(interfaces)
    use = f"export GLOO_SOCKET_IFNAME={next((n for n in names if n != 'lo'), 'lo')}"
    if chosen := environment.get("GLOO_SOCKET_IFNAME"):
        unknown = [n for n in chosen.split(",") if n not in names]
        if unknown:
            detail = f"GLOO_SOCKET_IFNAME={chosen}: there is no interface {unknown[0]}, only {', '.join(names)}"
            return [_problem("network.hostname", detail, use)]
        return [_ok("network.hostname", f"workers use {chosen} (GLOO_SOCKET_IFNAME)")]
    name = socket.gethostname()
    try:
        address = resolve(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        why = f"{name} leads to no address of this machine ({error.strerror or error})"
        return [_warning("network.hostname", f"{why}: workers on CPU use loopback, or do not meet", use)]
    return [_ok("network.hostname", f"{name} is {address}")]


# -- asking from a child process ---------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """One accelerator as torch sees it; ``error`` is what an addition on it said, or empty."""

    name: str
    memory_bytes: int
    free_bytes: int
    bf16: bool
    error: str = ""


@dataclass(frozen=True)
class Frameworks:
    """What importing torch, then DeepSpeed, gave: a version is empty where its import failed, for ``failure``.

    ``built_for`` is "CUDA 13.0", "ROCm 7.1", or empty for a CPU build; ``embedded`` is what a run's own cluster
    would offer.
    """

    torch: str = ""
    built_for: str = ""
    why_no_device: str = ""
    devices: tuple[Device, ...] = ()
    gloo: bool = True
    nccl: bool = False
    embedded: ClusterShape | None = None
    deepspeed: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Driver:
    """What ``nvidia-smi`` says: the names of the GPUs and the driver's version, or why it says nothing."""

    gpus: tuple[str, ...] = ()
    version: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Cluster:
    """What a running cluster says of itself; ``nodes`` are the addresses of those alive.

    ``address`` is empty where none was found; ``refused``: it wants another token; ``failure``: why it said nothing.
    """

    address: str = ""
    ray: str = ""
    python: str = ""
    nodes: tuple[str, ...] = ()
    cpus: float = 0.0
    accelerators: int = 0
    accelerator: str = ""
    refused: bool = False
    failure: str = ""


CHILD = (
    "import signal, sys; signal.alarm(int(sys.argv[1])); sys.path.append(sys.argv[2]); "
    "from orchestrator.launching import doctor; doctor.answer(*sys.argv[3:])"
)


def ask_frameworks(timeout_s: int = FRAMEWORKS_S) -> Frameworks:
    """Import torch and DeepSpeed in a child process, and compute on every device."""
    facts, failure = _ask("frameworks", timeout_s=timeout_s)
    if failure:
        stage = "DeepSpeed" if "torch" in facts else "torch"
        failure = f"importing {stage}: {failure}"
    devices = tuple(Device(**device) for device in facts.pop("devices", ()))
    shape = facts.pop("embedded", None)
    return Frameworks(**facts, devices=devices, embedded=ClusterShape(**shape) if shape else None, failure=failure)


def ask_driver(timeout_s: float = 10.0) -> Driver | None:
    """What ``nvidia-smi`` reports, or None where there is no such command."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Driver(failure=f"it did not end in {timeout_s:g} s")
    except OSError as error:
        return Driver(failure=explain_oserror(Path(command), error))
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        return Driver(failure=_brief(done.stdout or done.stderr) or f"exit code {done.returncode}")
    parts = [line.rpartition(", ") for line in lines]
    return Driver(gpus=tuple(name for name, _, _ in parts), version=parts[0][2])


def ask_cluster(where: str, mode: str, timeout_s: int = CLUSTER_S) -> Cluster:
    """Ask the cluster at ``host:port``, or "auto", in a child process; ``mode``: RAY_AUTH_MODE where it is not set."""
    facts, failure = _ask("cluster", where, mode, timeout_s=timeout_s)
    return Cluster(**{**facts, "nodes": tuple(facts.get("nodes", ()))}, failure=failure)


def _ask(probe: str, *arguments: str, timeout_s: int) -> tuple[dict[str, Any], str]:
    """What a probe said before it ended, and why it did not end well, or empty."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", CHILD, str(timeout_s), root, probe, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        try:
            said, noise = child.communicate(timeout=timeout_s + 5)
        except subprocess.TimeoutExpired:  # the alarm was not heard
            child.kill()
            said, noise = child.communicate()
    facts = {name: value for line in said.splitlines() for name, value in json.loads(line).items()}
    return facts, _last_words(child.returncode, noise)


def _last_words(code: int, noise: str) -> str:
    if code == 0:
        return ""
    if code in (-signal.SIGALRM, -signal.SIGKILL):
        return "no end in sight, so it was stopped" if code == -signal.SIGALRM else "it was killed"
    if code < 0:
        return f"it crashed ({signal.Signals(-code).name})"
    line = _brief(noise)
    return line if line and code == 1 else f"exit code {code}{f': {line}' if line else ''}"


def _brief(text: str) -> str:
    """The last line that says something, without secrets and not too long."""
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    secret = os.environ.get("RAY_AUTH_TOKEN")
    return printable(line.replace(secret, "***") if secret else line)[:300]


def answer(probe: str, *arguments: str) -> None:
    """In the child: write what the probe finds to standard output, a JSON object a line, and all noise to the other."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    probes: dict[str, Callable[..., Iterator[dict[str, Any]]]]
    probes = {"frameworks": probe_frameworks, "cluster": probe_cluster}
    for facts in probes[probe](*arguments):
        channel.write(json.dumps(facts) + "\n")
        channel.flush()


def probe_frameworks() -> Iterator[dict[str, Any]]:
    """In the child: facts of ``Frameworks``, those of torch before DeepSpeed is imported."""
    import torch

    platform = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = next((f"{name} {version}" for name, version in platform.items() if version), "")
    why = ""
    if built_for and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            why = _brief(str(error).partition(". ")[0])
    devices = [_probe_device(index) for index in range(torch.cuda.device_count())] if built_for and not why else []
    distributed = torch.distributed.is_available()
    from orchestrator.launching.cluster import embedded_shape  # imports torch too

    yield {
        "torch": torch.__version__,
        "built_for": built_for,
        "why_no_device": why,
        "devices": devices,
        "gloo": distributed and torch.distributed.is_gloo_available(),
        "nccl": distributed and torch.distributed.is_nccl_available(),
        "embedded": asdict(embedded_shape()),
    }
    if not devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    yield {"deepspeed": deepspeed.__version__}


def _probe_device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    facts = {"name": properties.name, "memory_bytes": properties.total_memory, "free_bytes": 0, "bf16": False}
    try:
        facts |= {"free_bytes": torch.cuda.mem_get_info(index)[0], "bf16": properties.major >= 8}
        (torch.ones(8, device=f"cuda:{index}") + 1).sum().item()
    except RuntimeError as error:
        facts["error"] = _brief(str(error).partition("\n")[0])
    return facts


def probe_cluster(where: str, mode: str) -> Iterator[dict[str, Any]]:
    """In the child: facts of ``Cluster``, read from its control store without joining it as a driver would."""
    if mode:
        os.environ.setdefault("RAY_AUTH_MODE", mode)
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, so mypy cannot look inside
    from ray.exceptions import AuthenticationError

    signal.alarm(ANSWER_S)
    if where == "auto":
        with contextlib.suppress(ConnectionError):
            where = canonicalize_bootstrap_address(where) or where
        if where == "auto":
            return
    yield {"address": where}
    try:
        store = GcsClient(address=where)
        alive = [node for node in store.get_all_node_info(timeout=ANSWER_S).values() if node.state == 0]
        known = store.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=ANSWER_S)
    except AuthenticationError:
        yield {"refused": True}
        return
    about = json.loads(known) if known else {}
    kinds = {node.labels.get("ray.io/accelerator-type", "") for node in alive} - {""}
    yield {
        "ray": about.get("ray_version", ""),
        "python": about.get("python_version", ""),
        "nodes": [node.node_manager_address for node in alive],
        "cpus": sum(node.resources_total.get("CPU", 0.0) for node in alive),
        "accelerators": int(sum(node.resources_total.get("GPU", 0.0) for node in alive)),
        "accelerator": ", ".join(sorted(kinds)),
    }


@dataclass(frozen=True)
class Machine:
    """What the examination asks that is slow or not ours, one function each."""

    frameworks: Callable[[], Frameworks] = ask_frameworks
    driver: Callable[[], Driver | None] = ask_driver
    cluster: Callable[[str, str], Cluster] = ask_cluster
    disk_usage: DiskUsage = shutil.disk_usage
