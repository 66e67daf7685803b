"""What a container lets this process use, as its control groups of either version say."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Limits", "container_limits", "room_for_a_copy", "usable_cpus"]


@dataclass(frozen=True)
class Limits:
    """What control groups leave this process; None where they set no limit. ``cpus`` may be a fraction."""

    cpus: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None


def usable_cpus(limits: Limits) -> int:
    """CPUs this process may keep busy: those it may run on, no more than its quota, and at least one."""
    allowed = len(os.sched_getaffinity(0))
    return allowed if limits.cpus is None else max(1, min(allowed, int(limits.cpus)))


def container_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """Read the tightest limits on the way from this process's control groups to their root."""
    lines = _text(membership).splitlines()
    paths = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    if (root / "cgroup.controllers").exists():
        cpu = memory = _groups(root, paths.get("", "/"))
        quotas = [_text(group / "cpu.max") for group in cpu]
        limit, usage, reclaimable = "memory.max", "memory.current", "inactive_file"
    else:
        cpu, memory = _groups(root / "cpu", paths.get("cpu", "/")), _groups(root / "memory", paths.get("memory", "/"))
        quotas = [f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}" for group in cpu]
        limit, usage, reclaimable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    limited = [(number, group) for group in memory if (number := _number(_text(group / limit))) is not None]
    tightest, group = min(limited, default=(None, root))
    return Limits(
        cpus=min((share for share in map(_share, quotas) if share is not None), default=None),
        memory_bytes=tightest,
        memory_used_bytes=None if tightest is None else _used(group, usage, reclaimable),
    )


def room_for_a_copy() -> int:
    """Bytes of host memory that this worker may take for a copy of its state: its part of half of what is free."""
    limits = container_limits()
    free = psutil.virtual_memory().available
    if limits.memory_bytes is not None:
        free = min(free, limits.memory_bytes - (limits.memory_used_bytes or 0))
    return max(0, free) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _groups(base: Path, path: str) -> list[Path]:
    """The control group at ``path`` and those around it; only the base where the path lies out of sight."""
    inside = base if ".." in Path(path).parts else base / path.lstrip("/")
    return [group for group in (inside, *inside.parents) if group.is_relative_to(base) and group.is_dir()]


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


def _used(group: Path, usage: str, reclaimable: str) -> int | None:
    """Bytes in use without the file cache that the kernel would give up first, as Ray's memory monitor counts."""
    total = _number(_text(group / usage))
    cache = re.search(rf"^{reclaimable} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
    return max(0, total - int(cache[1])) if total is not None and cache else total
