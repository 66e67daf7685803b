"""The whole examination: which checks there are, run at once, each with a deadline.

Nothing is printed and nothing is left behind: a check may create one probe file and removes it again.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from orchestrator.config import RunConfig, StorageConfig
from orchestrator.launching.doctor.cluster import embedded_cluster, existing_cluster, here_instead
from orchestrator.launching.doctor.finding import Finding, problem
from orchestrator.launching.doctor.hardware import accelerators, cpus, memory, open_files, shared_memory
from orchestrator.launching.doctor.leftovers import drafts, extension_locks, run_locks
from orchestrator.launching.doctor.network import hostname
from orchestrator.launching.doctor.probes import (
    Cluster,
    DiskUsage,
    Driver,
    Frameworks,
    ask_cluster,
    ask_driver,
    ask_frameworks,
)
from orchestrator.launching.doctor.software import imports, packages, python
from orchestrator.launching.doctor.storage import (
    OTHER_FOLDER,
    disk,
    no_folder,
    runs_folder,
    runs_in_store,
    temporary_folder,
    temporary_is_usable,
)
from orchestrator.storage.store import is_s3

__all__ = ["Machine", "examine"]

DEADLINE_S = 60.0
OTHER_TEMPORARY = "export RAY_TMPDIR=/another/folder"
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """What the examination asks that is slow or not ours, one function each."""

    frameworks: Callable[[], Frameworks] = ask_frameworks
    driver: Callable[[], Driver | None] = ask_driver
    cluster: Callable[[str], Cluster] = ask_cluster
    disk_usage: DiskUsage = shutil.disk_usage


class Check(NamedTuple):
    """One independent part of the examination; ``if_stuck`` is the remedy where it fails or never ends."""

    name: str
    run: Callable[[], list[Finding]]
    if_stuck: str = "dmesg | tail"


def examine(
    *,
    folder: str | None = None,
    address: str | None = None,
    config: RunConfig | None = None,
    environment: Mapping[str, str] = os.environ,
    machine: Machine | None = None,
) -> list[Finding]:
    """Run all checks at once and return their findings in the order in which the checks are listed below.

    Args:
        folder: where the folders of runs lie; by default ``config.checkpoint.uri``, or else ``runs``.
        address: the cluster to join, as given to ``--address``; by default ``RAY_ADDRESS``.
        config: of the job to be run, which is then held against what is there.
        environment: read in place of ``os.environ``, but by the child processes.
        machine: how the frameworks, the driver and the cluster are asked.
    """
    machine = machine or Machine()
    uri = folder or (config.checkpoint.uri if config else "runs")
    home = None if "://" in uri else Path(uri).expanduser().absolute()
    frameworks = _start(machine.frameworks)
    checks = [
        *_of_machine(frameworks, machine, environment),
        _of_cluster(frameworks, machine, environment, address=address, config=config, home=home),
        *([_elsewhere(uri, config)] if home is None else _of_runs(home, machine, config)),
    ]
    started = [(check, _start(check.run)) for check in checks]
    deadline = time.monotonic() + DEADLINE_S
    return [finding for check, future in started for finding in _outcome(check, future, deadline)]


def _elsewhere(uri: str, config: RunConfig | None) -> Check:
    if is_s3(uri):
        return Check("storage.runs", partial(runs_in_store, uri, config.storage if config else StorageConfig()))
    return Check("storage.runs", partial(no_folder, uri))


def _of_machine(frameworks: Future[Frameworks], machine: Machine, environment: Mapping[str, str]) -> list[Check]:
    def shared() -> list[Finding]:
        return shared_memory(accelerators=len(frameworks.result().devices), disk_usage=machine.disk_usage)

    ray = temporary_folder(environment)
    free = partial(disk, "disk.temporary", ray, OTHER_TEMPORARY, disk_usage=machine.disk_usage)
    return [
        Check("python", python),
        Check("package.torch", packages),
        Check("import.torch", lambda: imports(frameworks.result())),
        Check("accelerator", lambda: accelerators(frameworks.result(), machine.driver(), environment)),
        Check("cpu", cpus),
        Check("memory", memory),
        Check("shared_memory", shared),
        Check("open_files", open_files),
        Check("storage.temporary", partial(temporary_is_usable, ray), OTHER_TEMPORARY),
        Check("disk.temporary", free, OTHER_TEMPORARY),
        Check("lock.extension", partial(extension_locks, environment), "export TORCH_EXTENSIONS_DIR=/another/folder"),
        Check("network.hostname", partial(hostname, environment), "export GLOO_SOCKET_IFNAME=lo"),
    ]


def _of_cluster(
    frameworks: Future[Frameworks],
    machine: Machine,
    environment: Mapping[str, str],
    *,
    address: str | None,
    config: RunConfig | None,
    home: Path | None,
) -> Check:
    source, text = ("--address", address) if address else ("RAY_ADDRESS", environment.get("RAY_ADDRESS", ""))
    if text in ("", "local"):
        return Check("cluster", lambda: embedded_cluster(frameworks.result(), config))
    existing = partial(existing_cluster, text, source, environment, config=config, home=home, ask=machine.cluster)
    return Check("cluster", existing, here_instead(source))


def _of_runs(home: Path, machine: Machine, config: RunConfig | None) -> list[Check]:
    return [
        Check("storage.runs", partial(runs_folder, home), OTHER_FOLDER),
        Check("disk.runs", partial(disk, "disk.runs", home, OTHER_FOLDER, disk_usage=machine.disk_usage), OTHER_FOLDER),
        Check("lock.run", partial(run_locks, home, name=config.name if config else None), OTHER_FOLDER),
        Check("checkpoint.draft", partial(drafts, home), OTHER_FOLDER),
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
        return [problem(check.name, f"the check did not end in {DEADLINE_S:g} s", check.if_stuck)]
    except OSError as error:
        return [problem(check.name, f"the check failed: {error}", check.if_stuck)]
