"""Whether accelerators, processors, memory and the system's limits are enough for a run."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from orchestrator.errors import explain_oserror
from orchestrator.launching.doctor.finding import Finding, ok, problem, warning
from orchestrator.launching.doctor.probes import Device, DiskUsage, Driver, Frameworks
from orchestrator.launching.limits import Limits, container_limits, usable_cpus
from orchestrator.telemetry.human import count, size

__all__ = ["accelerators", "cpus", "memory", "open_files", "shared_memory"]

MIB, GIB = 2**20, 2**30
# Ray kills workers above this share of memory (RAY_memory_usage_threshold).
MEMORY_THRESHOLD = 0.95
# Ray raises the soft limit on open files to the hard one, up to this.
RAISED_FILES = 65_536


def accelerators(frameworks: Frameworks, driver: Driver | None, environment: Mapping[str, str]) -> list[Finding]:
    """What torch can compute on, held against what the driver reports; empty where torch cannot be imported."""
    if not frameworks.torch:
        return []
    if frameworks.devices:
        return _devices(frameworks.devices, f"torch for {frameworks.built_for}", driver)
    if driver is None:
        why = f" ({frameworks.why_no_device})" if frameworks.why_no_device else ""
        return [ok("accelerator", f"none{why}: runs train on CPU")]
    if driver.failure:
        detail = f"nvidia-smi is installed and fails: {driver.failure}: runs train on CPU"
        return [warning("accelerator", detail, "modprobe nvidia; in a container: docker run --gpus all")]
    gpus = _grouped(driver.gpus)
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        detail = f"{gpus} hidden by CUDA_VISIBLE_DEVICES={hidden!r}: runs train on CPU"
        return [warning("accelerator", detail, "unset CUDA_VISIBLE_DEVICES")]
    if not frameworks.built_for:
        detail = f"nvidia-smi reports {gpus}, and torch {frameworks.torch} is a build for CPU"
        torch = f"torch=={frameworks.torch.partition('+')[0]}"
        remedy = f"pip install --force-reinstall --index-url https://pypi.org/simple {torch}"
        return [problem("accelerator", detail, remedy)]
    detail = (
        f"nvidia-smi reports {gpus} with driver {driver.version}, and torch {frameworks.torch}, "
        f"built for {frameworks.built_for}, cannot use them: {frameworks.why_no_device}"
    )
    remedy = f"update the NVIDIA driver to one for {frameworks.built_for}; to train on CPU: CUDA_VISIBLE_DEVICES=''"
    return [problem("accelerator", detail, remedy)]


def _devices(devices: Sequence[Device], build: str, driver: Driver | None) -> list[Finding]:
    findings = []
    for index, device in enumerate(devices):
        name = f"device {index}, {device.name},"
        if device.error:
            remedy = "leave it out of CUDA_VISIBLE_DEVICES; nvidia-smi -q tells its errors"
            findings.append(problem("accelerator", f"{name} cannot compute: {device.error}", remedy))
        elif device.free_bytes < device.memory_bytes / 2:
            free = f"{size(device.free_bytes)} of {size(device.memory_bytes)} free"
            detail = f"{name} has {free}: other processes hold the rest"
            findings.append(warning("accelerator", detail, "nvidia-smi --query-compute-apps=pid,name --format=csv"))
    if findings:
        return findings
    described = _grouped([f"{d.name} ({size(d.memory_bytes)}, {'bf16' if d.bf16 else 'no bf16'})" for d in devices])
    version = f", driver {driver.version}" if driver and driver.version else ""
    return [ok("accelerator", f"{described}; {build}{version}")]


def _grouped(names: Sequence[str]) -> str:
    return ", ".join(f"{times} x {name}" for name, times in Counter(names).items())


def cpus(limits: Limits | None = None) -> list[Finding]:
    """CPUs that a cluster on this machine would hand out."""
    usable, total = usable_cpus(container_limits() if limits is None else limits), os.cpu_count() or 1
    return [ok("cpu", str(total) if usable == total else f"{usable} of {total} may be used")]


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
        return [problem("memory", detail, "end what takes it: ps aux --sort=-rss | head")]
    if free < 2 * GIB:
        detail += "; Ray and each worker take about 0.5 GiB before the model"
        return [warning("memory", detail, "--set scale.workers=1")]
    return [ok("memory", detail)]


def shared_memory(
    folder: Path = Path("/dev/shm"), *, accelerators: int, disk_usage: DiskUsage = shutil.disk_usage
) -> list[Finding]:
    """Room for Ray's object store, which falls back to disk without it, and for NCCL, which fails without it."""
    larger = "docker run --shm-size=2g; elsewhere: mount -o remount,size=2G /dev/shm"
    try:
        total, _, free = disk_usage(folder)
    except OSError as error:
        remedy = f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}"
        return [problem("shared_memory", f"{explain_oserror(folder, error)}: Ray does not start", remedy)]
    detail = f"{size(free)} of {size(total)} free in {folder}"
    if free < 64 * MIB and accelerators > 1:
        detail += f": too little for NCCL between {accelerators} devices"
        return [problem("shared_memory", detail, larger)]
    if free < GIB:
        return [warning("shared_memory", f"{detail}: Ray keeps objects on disk instead, slowly", larger)]
    return [ok("shared_memory", detail)]


def open_files(limits: tuple[int, int] | None = None) -> list[Finding]:
    """Files that Ray may open, by the soft and the hard limit."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    reached = RAISED_FILES if hard == resource.RLIM_INFINITY else max(soft, min(hard, RAISED_FILES))
    if reached < 4096:
        detail = f"{count(reached)} per process: Ray's connections and files need more"
        return [warning("open_files", detail, "ulimit -n 65536, as root or in /etc/security/limits.conf")]
    return [ok("open_files", f"{count(reached)} per process")]
