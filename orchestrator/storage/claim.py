"""Who may write a run in a store: one living driver, and only the workers of its newest attempt.

A store has no locks, but a conditional write has exactly one winner. Drivers and attempts are therefore numbered: the
highest number owns the run, and nobody gets a number twice. A driver shows that it lives by writing its own object
again every few seconds; whoever wants to take over from one that may be dead watches that object for a lease's time, on
its own clock, so that clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from orchestrator.errors import FencedError, NotFoundError, RunBusyError
from orchestrator.storage.store import Store

__all__ = ["BEAT_S", "Claim", "StoreFence"]

DRIVERS, FENCES = ".control/drivers/", ".control/fences/"
BEAT_S = 4.0
LEASE_S = 20.0
"""A driver that did not write its object for so long is dead, or cut off: then its workers cannot save either."""


class Claim:
    """Held by the driver of a run while it lives; made by ``take``."""

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self.number = number
        self._beats = 0
        self._place = _place()

    @classmethod
    def take(cls, store: Store, *, waiting: Callable[[str], None], lease_s: float = LEASE_S) -> Claim:
        """Become the run's driver. ``waiting`` hears that another one may live, before that is watched for a lease.

        Raises:
            RunBusyError: another driver lives; the message says which.
            StorageError: see ``Store``.
        """
        while True:
            newest = _newest(store, DRIVERS)
            if newest and not _is_gone(store, newest, waiting, lease_s):
                raise RunBusyError(_busy(store, newest))
            claim = cls(store, newest + 1)
            if store.put_if_absent(_driver(claim.number), claim._content()):
                if _newest(store, DRIVERS) == claim.number:
                    break
                store.delete(_driver(claim.number))  # later drivers had tidied up the numbers before theirs
        _tidy(store, DRIVERS, claim.number)
        return claim

    def beat(self) -> None:
        """Show that this driver lives; to be called every ``BEAT_S`` seconds.

        Raises:
            FencedError: a newer driver has taken the run.
            StorageError: see ``Store``.
        """
        if _newest(self._store, DRIVERS) != self.number:
            raise FencedError(f"a newer driver owns {self._store.uri}: this one ends")
        self._beats += 1
        self._store.write(_driver(self.number), self._content())

    def release(self) -> None:
        """Let the next driver in at once."""
        self._store.write(_driver(self.number), self._content(released=True))

    def _content(self, *, released: bool = False) -> bytes:
        process = psutil.Process()
        content = {
            "who": f"process {process.pid} on {socket.gethostname()}",
            "place": self._place,
            "process": [process.pid, process.create_time()],
            "beat": [self._beats, secrets.token_hex(8)],
            "released": released,
        }
        return json.dumps(content).encode()


class StoreFence:
    """Held by the workers of one attempt: ``refresh`` asks the store, ``check`` only remembers what it said."""

    def __init__(self, store: Store, token: str) -> None:
        self._store = store
        self.token = token
        self._superseded = False

    @staticmethod
    def begin(store: Store, *, driver: int) -> str:
        """Fence off every earlier attempt, and return the token of a new one.

        Raises:
            FencedError: driver number ``driver`` has been replaced by another one.
            StorageError: see ``Store``.
        """
        while True:
            if _newest(store, DRIVERS) != driver:
                raise FencedError(f"a newer driver owns {store.uri}: this worker does not begin")
            earlier = [name for name in _names(store, FENCES) if name.startswith(f"{driver:04d}.")]
            attempt = int(max(earlier).partition(".")[2]) + 1 if earlier else 1
            token = f"{driver:04d}.{attempt:04d}"
            if store.put_if_absent(f"{FENCES}{token}", secrets.token_bytes(8)):
                store.delete(*(f"{FENCES}{name}" for name in _names(store, FENCES) if name < token))
                return token

    def refresh(self) -> None:
        """Ask the store whether this attempt is the newest.

        Raises:
            FencedError: it is not.
            StorageError: see ``Store``.
        """
        if max(_names(self._store, FENCES), default="") != self.token:
            self._superseded = True
        self.check()

    def check(self) -> None:
        """Raise if this attempt was superseded when the store was last asked.

        Raises:
            FencedError: a newer attempt owns the run, or the run was removed from the store.
        """
        if self._superseded:
            raise FencedError(f"a newer attempt owns {self._store.uri}: this worker stops without writing")

    def release(self) -> None:
        """Nothing: the next attempt's number is higher in any case."""


def _names(store: Store, prefix: str) -> list[str]:
    return [entry.key.removeprefix(prefix) for entry in store.list(prefix)]


def _newest(store: Store, prefix: str) -> int:
    return max((int(name) for name in _names(store, prefix)), default=0)


def _tidy(store: Store, prefix: str, number: int) -> None:
    store.delete(*(f"{prefix}{name}" for name in _names(store, prefix) if int(name) < number))


def _driver(number: int) -> str:
    return f"{DRIVERS}{number:08d}"


def _is_gone(store: Store, number: int, waiting: Callable[[str], None], lease_s: float) -> bool:
    """Whether that driver has let go, or is dead: known at once on its own machine, else seen by its silence."""
    seen = _read(store, number)
    if seen is None or seen["released"]:
        return True
    if seen["place"] == _place():
        return not _runs(*seen["process"])
    waiting(f"{seen['who']} owned this run: watching for {lease_s:.0f} s whether it lives")
    deadline, over = time.monotonic() + lease_s, False
    while not over:
        time.sleep(min(1.0, lease_s / 4))
        over = time.monotonic() >= deadline  # before the last look: who was held up itself has seen nothing meanwhile
        now = _read(store, number)
        if now is None or now["released"]:
            return True
        if now["beat"] != seen["beat"]:
            return False
    return True


def _read(store: Store, number: int) -> dict[str, Any] | None:
    with contextlib.suppress(NotFoundError, ValueError):
        found: dict[str, Any] = json.loads(store.read(_driver(number)))
        return found
    return None


def _busy(store: Store, number: int) -> str:
    who = (_read(store, number) or {}).get("who", "another process")
    return (
        f"the run in {store.uri} is owned by {who}: wait for it, stop it, or give this run another name with "
        "--set name=..."
    )


def _runs(pid: int, created: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - created) < 1.0
    except psutil.NoSuchProcess:
        return False


def _place() -> str:
    """What two processes have in common that see each other's process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return f"{boot.read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - no real path
    return secrets.token_hex(8)
