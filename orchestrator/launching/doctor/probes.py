"""What is asked of this machine and its cluster, from a child process with a deadline where the answer may never come.

Importing a framework can crash, a driver or a foreign server can hang: neither may take the examination with it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import explain_oserror
from orchestrator.launching.doctor.child import last_line
from orchestrator.planning.cluster import ClusterShape

__all__ = ["Cluster", "Device", "DiskUsage", "Driver", "Frameworks", "ask_cluster", "ask_driver", "ask_frameworks"]

FRAMEWORKS_S = 45
CLUSTER_S = 20
CHILD = (
    "import signal, sys; signal.alarm(int(sys.argv[1])); sys.path.append(sys.argv[2]); "
    "from orchestrator.launching.doctor.child import answer; answer(*sys.argv[3:])"
)

DiskUsage = Callable[[Path], tuple[int, int, int]]
"""Total, used and free bytes at a path, as ``shutil.disk_usage`` gives them."""


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
    embedded: ClusterShape | None = None
    deepspeed: str = ""
    failure: str = ""


def ask_frameworks(timeout_s: int = FRAMEWORKS_S) -> Frameworks:
    """Import torch and DeepSpeed in a child process, and compute on every device."""
    facts, failure = _ask("frameworks", timeout_s=timeout_s)
    if failure:
        failure = f"importing {'DeepSpeed' if 'torch' in facts else 'torch'}: {failure}"
    devices = tuple(Device(**device) for device in facts.pop("devices", ()))
    shape = facts.pop("embedded", None)
    return Frameworks(**facts, devices=devices, embedded=ClusterShape(**shape) if shape else None, failure=failure)


@dataclass(frozen=True)
class Driver:
    """What ``nvidia-smi`` says: the names of the GPUs and the driver's version, or why it says nothing."""

    gpus: tuple[str, ...] = ()
    version: str = ""
    failure: str = ""


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
        return Driver(failure=last_line(done.stdout or done.stderr) or f"exit code {done.returncode}")
    parts = [line.rpartition(", ") for line in lines]
    return Driver(gpus=tuple(name for name, _, _ in parts), version=parts[0][2])


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


def ask_cluster(where: str, timeout_s: int = CLUSTER_S) -> Cluster:
    """Ask the cluster at ``host:port``, or "auto", in a child process."""
    facts, failure = _ask("cluster", where, timeout_s=timeout_s)
    return Cluster(**{**facts, "nodes": tuple(facts.get("nodes", ()))}, failure=failure)


def _ask(probe: str, *arguments: str, timeout_s: int) -> tuple[dict[str, Any], str]:
    """What a probe said before it ended, and why it did not end well, or empty."""
    root = str(Path(__file__).parents[3])
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
    return facts, _failure(child.returncode, last_line(noise))


def _failure(code: int, last: str) -> str:
    if code == 0:
        return ""
    if code in (-signal.SIGALRM, -signal.SIGKILL):
        return "no end in sight, so it was stopped" if code == -signal.SIGALRM else "it was killed"
    if code < 0:
        return f"it crashed ({signal.Signals(-code).name})"
    return last if last and code == 1 else f"exit code {code}{f': {last}' if last else ''}"
