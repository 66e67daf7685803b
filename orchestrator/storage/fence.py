"""Who may write a run's folder: one living driver, and only the workers of its newest attempt.

Two mechanisms, because each covers what the other cannot. ``flock`` is enforced by the kernel and let
go when a process dies, however it dies, but not every shared filesystem carries it between hosts. The
token is a plain file and works anywhere, but a check and the write after it are two steps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import time
from pathlib import Path
from typing import Protocol

import psutil

from orchestrator.errors import FencedError, RunBusyError

__all__ = ["DriverLock", "Fence", "Guard"]

LEFTOVERS_END_S = 30.0
WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class Guard(Protocol):
    """What a worker asks before it writes: here a ``Fence``, in a store a ``claim.StoreFence``."""

    def check(self) -> None: ...
    def release(self) -> None: ...


class DriverLock:
    """Held by the driver of a run while it lives.

    Raises:
        RunBusyError: another live process holds it; the message says which.
    """

    def __init__(self, control: Path) -> None:
        self._path = control / "driver.lock"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            holder = _named_in(self._file)
            os.close(self._file)
            raise RunBusyError(
                f"the run in {control.parent} is owned by {holder}: wait for it, stop it, or give this run another "
                "name with --set name=..."
            )
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self.driver = secrets.token_hex(8)
        """Names this driver; workers that were sent by another one do not begin."""
        (control / "driver").write_text(self.driver)

    @staticmethod
    def holder(control: Path) -> str | None:
        """Which living process holds the lock of a run, or None.

        The lock is tried for an instant, in which a new driver would find it taken; so it is not tried where the
        process that it names is dead.
        """
        try:
            file = os.open(control / "driver.lock", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            named = _named_in(file)
            return None if _is_dead(named) or _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB) else named
        finally:
            os.close(file)

    def release(self) -> None:
        """Let the next driver in."""
        os.close(self._file)


class Fence:
    """Held by each worker of an attempt; ``check`` raises once a newer attempt has begun."""

    def __init__(self, control: Path, token: str) -> None:
        self._path = control / "fence"
        self._token = token
        self._lock = os.open(control / "workers.lock", os.O_RDWR | os.O_CREAT, 0o644)
        _flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @staticmethod
    def begin(control: Path, *, driver: str, patience_s: float = LEFTOVERS_END_S) -> str:
        """Fence off every earlier attempt, wait until its processes have ended, and return the new token.

        Called by one process, before any worker of the new attempt makes its ``Fence``.

        Raises:
            FencedError: ``driver`` has been replaced by another one.
            RunBusyError: workers of an earlier attempt are alive after ``patience_s`` seconds.
        """
        if (control / "driver").read_text() != driver:
            raise FencedError(f"a newer driver owns {control.parent}: this worker does not begin")
        token = secrets.token_hex(8)
        path = control / "fence"
        temporary = path.with_name(f".fence.{token}")
        temporary.write_text(token)
        temporary.replace(path)
        lock = os.open(control / "workers.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + patience_s
            while not _flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if time.monotonic() > deadline:
                    raise RunBusyError(
                        f"workers of an earlier attempt in {control.parent} are still alive after {patience_s:.0f} s: "
                        "end those processes (lsof workers.lock names them) and start again"
                    )
                time.sleep(0.05)
        finally:
            os.close(lock)
        return token

    def check(self) -> None:
        """Raise if this attempt has been superseded.

        Raises:
            FencedError: a newer attempt owns the folder, or the folder is gone.
        """
        with contextlib.suppress(FileNotFoundError):
            if self._path.read_text() == self._token:
                return
        raise FencedError(f"a newer attempt owns {self._path.parent.parent}: this worker stops without writing")

    def release(self) -> None:
        """Tell the next attempt that this worker has ended."""
        os.close(self._lock)


def _named_in(file: int) -> str:
    return os.read(file, 200).decode(errors="replace").strip() or "another process"


def _is_dead(named: str) -> bool:
    """Whether ``named``, as ``DriverLock`` writes it, was a process of this machine that is gone."""
    match = re.fullmatch(r"process (\d+) on (\S+)", named)
    return match is not None and match[2] == socket.gethostname() and not psutil.pid_exists(int(match[1]))


def _flock(file: int, how: int) -> bool:
    """Take the lock; True also where the filesystem has no locks, since the token still fences there."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            return False
        raise
    return True
