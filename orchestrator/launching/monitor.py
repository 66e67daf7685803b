"""Prometheus on this machine, with the hubs of this machine and our rules: start it, look at it, stop it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.errors import ClusterError, RequestError
from orchestrator.launching.doctor.storage import temporary_folder
from orchestrator.launching.hub import forget_the_dead, targets_folder, write_target
from orchestrator.storage.folder import read_json, write_json, write_text
from orchestrator.telemetry.dashboards import DASHBOARDS, render
from orchestrator.telemetry.rules import SCRAPE_S, prometheus_config, rules_file

__all__ = ["Monitor", "cluster_files", "down", "monitor_folder", "up", "write_cluster_files"]

CONFIG, NOTE, LOG = "prometheus/prometheus.yml", "monitor.json", "prometheus.log"
GIVEN = "given.json"
"""Among the hubs' own files: the hubs of clusters elsewhere."""
ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}")
READY_S, STOP_S = 30.0, 10.0
COMPOSE, MOUNTED, RAY_MOUNTED = "prometheus/compose.yml", "/tmp/orchestrator/targets", "/tmp/ray"
"""The configuration for ``cluster/compose.yaml``, and where that mounts what names the hubs and Ray's exporters."""


@dataclass(frozen=True)
class Monitor:
    """A Prometheus that runs."""

    pid: int
    started: float
    """When the process started, as the system says: a number that is used again is another process."""
    url: str
    folder: str


def cluster_files() -> dict[str, str]:
    """Path below ``cluster/`` and text of every file that is the same on every machine."""
    files = {
        COMPOSE: prometheus_config(targets=MOUNTED, ray=RAY_MOUNTED, rules="rules.yml"),
        "prometheus/rules.yml": rules_file(),
    }
    return files | {f"grafana/{each.uid.partition('-')[2]}.json": render(each) for each in DASHBOARDS}


def write_cluster_files(folder: Path, interval_s: int = SCRAPE_S) -> list[Path]:
    """Write dashboards, rules and a configuration for this user's Prometheus below ``folder``; returns their paths."""
    targets, ray = targets_folder().absolute(), temporary_folder(os.environ)
    config = prometheus_config(targets=str(targets), ray=str(ray), rules="rules.yml", interval_s=interval_s)
    written = []
    for name, text in {CONFIG: config, **cluster_files()}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        written.append(path)
    return written


def monitor_folder() -> Path:
    """Where Prometheus keeps its data, by default."""
    return targets_folder().parent / "prometheus"


def up(folder: Path, *, port: int, hubs: Sequence[str] = (), interval_s: int = SCRAPE_S) -> Monitor:
    """Start Prometheus on loopback, or return the one that runs already.

    It finds the hubs of this machine by their files. ``hubs``, each ``HOST:PORT``, are those of clusters elsewhere; a
    Prometheus that runs already takes them up too.

    Raises:
        RequestError: it is not installed, the port is taken, or a hub is no address.
        ClusterError: it does not become ready; the message has its last words.
    """
    for hub in hubs:
        if not ADDRESS.fullmatch(hub):
            raise RequestError(f"--hub {hub}: write it as HOST:PORT, as in head.example:9400")
    if hubs:
        write_target(targets_folder() / GIVEN, *hubs)
    if (running := _running(folder)) is not None:
        return running
    program = shutil.which("prometheus")
    if program is None:
        raise RequestError(
            "prometheus is not on PATH: install it (Debian and Ubuntu: apt-get install prometheus; macOS: brew install "
            "prometheus; or a release from prometheus.io), or point your own at the files that `orchestrator "
            "dashboards` writes"
        )
    _require_free(port)
    targets = targets_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    targets.mkdir(parents=True, exist_ok=True)
    forget_the_dead(targets)
    write_cluster_files(folder, interval_s)
    pid = _start(program, folder, port)
    found = Monitor(pid, psutil.Process(pid).create_time(), f"http://127.0.0.1:{port}", str(folder))
    write_json(folder / NOTE, vars(found))
    _wait_until_ready(found)
    return found


def down(folder: Path) -> Monitor:
    """Stop the Prometheus that ``up`` started; its data stay.

    Raises:
        RequestError: none runs there.
    """
    running = _running(folder)
    if running is None:
        raise RequestError(f"no Prometheus was started in {folder}: nothing to stop")
    process = psutil.Process(running.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except psutil.TimeoutExpired:
        process.kill()
        with contextlib.suppress(psutil.TimeoutExpired):  # who started it may never ask how it ended
            process.wait(STOP_S)
    (folder / NOTE).unlink(missing_ok=True)
    (targets_folder() / GIVEN).unlink(missing_ok=True)
    return running


def _running(folder: Path) -> Monitor | None:
    noted: dict[str, Any] | None = read_json(folder / NOTE)
    found = None if noted is None else Monitor(**noted)
    return found if found is not None and _alive(found) else None


def _alive(monitor: Monitor) -> bool:
    try:
        process = psutil.Process(monitor.pid)
        return process.create_time() == monitor.started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise RequestError(f"port {port} is taken: choose another with --port") from None


def _start(program: str, folder: Path, port: int) -> int:
    """Start it in a session of its own: it outlives this command. Returns its process id."""
    options = {
        "config.file": folder / CONFIG,
        "storage.tsdb.path": folder / "data",
        "storage.tsdb.retention.time": "15d",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    command = [program, *(f"--{name}={value}" for name, value in options.items())]
    log, appending = str(folder / LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, appending, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(program, command, os.environ, file_actions=files, setsid=True)


def _wait_until_ready(monitor: Monitor) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and _alive(monitor):
        try:
            with urllib.request.urlopen(f"{monitor.url}/-/ready", timeout=1.0):
                return
        except OSError:
            time.sleep(0.1)
    folder = Path(monitor.folder)
    last = (folder / LOG).read_text(errors="replace").strip().splitlines()[-3:]
    if _alive(monitor):
        os.kill(monitor.pid, signal.SIGTERM)
    (folder / NOTE).unlink(missing_ok=True)
    raise ClusterError("Prometheus does not become ready: " + " / ".join(last) + f"; its log is {folder / LOG}")
