"""The hub as one detached actor of a Ray cluster, and how a process hands it its snapshots. Imports Ray when called."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import TelemetryConfig
from orchestrator.storage.folder import write_text
from orchestrator.telemetry.hub import Board, serve
from orchestrator.telemetry.meter import Counted, Snapshot

__all__ = ["HubActor", "HubClient", "HubSettings", "forget_the_dead", "targets_folder", "write_target"]

NAME, NAMESPACE = "hub-1", "orchestrator"  # the number changes with Snapshot, so that versions do not meet
PORTS = 100
ANSWER_S = 5.0
ANYWHERE = ("0.0.0.0", "::")
LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|\[::1\]|localhost")
HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class HubSettings:
    """Where the hub is served; the first run on a cluster decides it.

    Where the head's environment has ``ORCHESTRATOR_HUB_BIND`` or ``ORCHESTRATOR_TARGETS``, these stand over ``bind``
    and ``targets``: who owns a cluster says once how its runs can be scraped.
    """

    bind: str
    port: int
    ttl_s: float
    targets: str
    """Folder for a file that tells Prometheus where the hub is."""

    @classmethod
    def of(cls, config: TelemetryConfig) -> HubSettings:
        """As the run's config says."""
        return cls(config.bind, config.port, config.ttl_s, str(targets_folder()))


def targets_folder() -> Path:
    """Where hubs on this machine leave their addresses, in the form of Prometheus' ``file_sd_configs``."""
    chosen = os.environ.get("ORCHESTRATOR_TARGETS")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"orchestrator-{os.getuid()}" / "targets"


class HubActor:
    """What runs in the hub's process."""

    def __init__(self, settings: HubSettings) -> None:
        bind = os.environ.get("ORCHESTRATOR_HUB_BIND") or settings.bind
        self._board = Board(ttl_s=settings.ttl_s)
        self._port, self._stop = serve(self._board, bind=bind, port=settings.port, ports=PORTS)
        self._target = f"{_reachable(bind)}:{self._port}"
        folder = Path(os.environ.get("ORCHESTRATOR_TARGETS") or settings.targets)
        self._file = folder / f"hub-{_cluster()}.json"
        with contextlib.suppress(OSError):  # who cannot be found this way still answers
            write_target(self._file, self._target)
            forget_the_dead(folder)

    def take(self, snapshot: Snapshot) -> Counted:
        """See ``Board.take``."""
        return self._board.take(snapshot)

    def where(self) -> str:
        """Host and port to scrape."""
        return self._target

    def leave(self) -> None:
        """The cluster ends with the run: take the address back."""
        self._file.unlink(missing_ok=True)


def write_target(path: Path, *targets: str) -> None:
    """Tell every Prometheus that watches the folder of ``path`` to scrape ``targets``, each ``HOST:PORT``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([{"targets": targets, "labels": {"job": "orchestrator"}}]) + "\n")


def forget_the_dead(folder: Path) -> None:
    """Take back the addresses of hubs of this machine that died without a word: nothing listens there any more."""
    for path in folder.glob("hub-*.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            targets = [target for group in json.loads(path.read_text()) for target in group["targets"]]
            if targets and not any(map(_may_answer, targets)):
                path.unlink()


class HubClient:
    """Sends snapshots to the cluster's hub, and starts it where there is none. For one thread."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._actor: Any = None
        self.address: str | None = None
        """Host and port to scrape, once the hub has answered."""

    def __call__(self, snapshot: Snapshot) -> Counted:
        """Hand over a snapshot.

        Raises:
            OSError: the hub did not take it in time.
        """
        counted: Counted = self._ask("take", snapshot)
        if self.address is None:
            self.address = str(self._ask("where"))
        return counted

    def leave(self) -> None:
        """The cluster ends: so does its hub."""
        with contextlib.suppress(OSError):
            self._ask("leave")

    def _ask(self, method: str, *values: Any) -> Any:
        import ray

        try:
            if self._actor is None:
                self._actor = _actor(self._settings)
            return ray.get(getattr(self._actor, method).remote(*values), timeout=ANSWER_S)
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
            self._actor = None  # looked for again, and started anew if it is gone for good
            raise OSError(f"the telemetry hub did not answer: {type(error).__name__}") from None


def _actor(settings: HubSettings) -> Any:
    import ray

    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": {HEAD: 0.001},  # where Prometheus looks, and what the cluster cannot live without
        "max_restarts": -1,
    }
    return ray.remote(HubActor).options(**options).remote(settings)


def _cluster() -> str:
    """Names this cluster on its head's machine: a hub that is started again takes the place of the one before."""
    import ray

    return re.sub(r"\W+", "-", str(ray.get_runtime_context().gcs_address))


def _may_answer(target: str) -> bool:
    """Whether something listens there, or it is on another machine, whose silence says nothing."""
    host, _, port = target.rpartition(":")
    if not LOOPBACK.fullmatch(host):
        return True
    with socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host.strip("[]"), int(port))) == 0


def _reachable(bind: str) -> str:
    """The address under which others find what listens at ``bind``."""
    if bind not in ANYWHERE:
        return f"[{bind}]" if ":" in bind else bind
    import ray

    return str(ray.util.get_node_ip_address())
