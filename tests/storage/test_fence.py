"""Who may write a run's folder, with real processes that hold on to it and die."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import FencedError, RunBusyError
from orchestrator.storage import fence as module
from orchestrator.storage.fence import DriverLock, Fence

DRIVE = "DriverLock(control)"
WORK = "Fence(control, sys.argv[2])"
HOLD = """
import sys, time
from pathlib import Path
from orchestrator.storage.fence import DriverLock, Fence
control = Path(sys.argv[1])
held = {}
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def control(tmp_path: Path) -> Path:
    path = tmp_path / "run" / ".control"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def hold(control: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a process which holds on to the folder, and waits until it does."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD.format(what), str(control), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


# -- drivers -----------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_who_is_first(control: Path, hold: Callable) -> None:
    first = hold(DRIVE)
    before = (control / "driver").read_text()
    message = (
        f"the run in {control.parent} is owned by process {first.pid} on {socket.gethostname()}: wait for it, stop it, "
        "or give this run another name with --set name=..."
    )
    with pytest.raises(RunBusyError, match=f"^{re.escape(message)}$"):
        DriverLock(control)
    assert (control / "driver").read_text() == before, "the first is still who it was to its workers"


def test_a_killed_driver_lets_go(control: Path, hold: Callable) -> None:
    kill(hold(DRIVE))
    lock = DriverLock(control)
    assert (control / "driver").read_text() == lock.driver
    assert (control / "driver.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()


def test_a_driver_that_lets_go_lets_the_next_one_in(control: Path) -> None:
    """And each has a name of its own; a shorter one leaves nothing of the longer one behind."""
    first = DriverLock(control)
    (control / "driver.lock").write_text("process 123456789 on a-machine-with-a-long-name")
    first.release()
    second = DriverLock(control)
    assert second.driver != first.driver
    assert (control / "driver.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    second.release()


# -- workers -----------------------------------------------------------------------------------


def begin(control: Path, patience_s: float = 240.0) -> str:
    """A new attempt by the driver of now."""
    return Fence.begin(control, driver=(control / "driver").read_text(), patience_s=patience_s)


@pytest.fixture
def driver(control: Path) -> Iterator[DriverLock]:
    lock = DriverLock(control)
    yield lock
    lock.release()


@pytest.mark.usefixtures("driver")
def test_the_workers_of_the_newest_attempt_may_write(control: Path) -> None:
    token = begin(control)
    fences = [Fence(control, token) for _ in range(3)]
    for fence in fences:
        fence.check()
        fence.release()


@pytest.mark.usefixtures("driver")
def test_a_superseded_worker_may_not(control: Path) -> None:
    old = Fence(control, begin(control))
    old.check()
    old.release()
    new = Fence(control, begin(control))
    message = f"a newer attempt owns {control.parent}: this worker stops without writing"
    with pytest.raises(FencedError, match=f"^{re.escape(message)}$"):
        old.check()
    new.check()
    new.release()


@pytest.mark.usefixtures("driver")
def test_nor_one_whose_folder_is_gone(control: Path) -> None:
    fence = Fence(control, begin(control))
    control.parent.rename(control.parent.with_name("aside"))
    with pytest.raises(FencedError):
        fence.check()
    fence.release()


@pytest.mark.usefixtures("driver")
def test_a_new_attempt_waits_for_a_leftover_worker(control: Path, hold: Callable) -> None:
    """It fences it off at once, and begins when it has ended, however it ended."""
    leftover = hold(WORK, begin(control))
    before = (control / "fence").read_text()
    timer = threading.Timer(0.7, leftover.kill)
    started = time.monotonic()
    timer.start()
    token = begin(control)
    assert time.monotonic() - started > 0.6
    assert leftover.wait() == -signal.SIGKILL
    assert (control / "fence").read_text() == token != before


@pytest.mark.usefixtures("driver")
def test_it_does_not_wait_for_ever(control: Path, hold: Callable) -> None:
    """And the leftover has lost its right to write all the same."""
    old = begin(control)
    hold(WORK, old)
    message = (
        f"workers of an earlier attempt in {control.parent} are still alive after 0 s: "
        "end those processes (lsof workers.lock names them) and start again"
    )
    with pytest.raises(RunBusyError, match=f"^{re.escape(message)}$"):
        begin(control, patience_s=0.2)
    assert (control / "fence").read_text() != old


@pytest.mark.usefixtures("driver")
def test_all_leftovers_are_waited_for(control: Path, hold: Callable) -> None:
    token = begin(control)
    first, _ = hold(WORK, token), hold(WORK, token)
    kill(first)
    with pytest.raises(RunBusyError):
        begin(control, patience_s=0.2)


def test_workers_of_a_replaced_driver_do_not_begin(control: Path) -> None:
    first = DriverLock(control)
    first.release()
    second = DriverLock(control)
    token = Fence.begin(control, driver=second.driver)
    message = f"a newer driver owns {control.parent}: this worker does not begin"
    with pytest.raises(FencedError, match=f"^{re.escape(message)}$"):
        Fence.begin(control, driver=first.driver)
    assert (control / "fence").read_text() == token, "who does not begin takes nothing from who did"
    second.release()


# -- a filesystem without locks ----------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_without_locks_the_token_still_fences(control: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = DriverLock(control), DriverLock(control)
    with pytest.raises(FencedError):
        Fence.begin(control, driver=first.driver)
    old = Fence(control, begin(control))
    new = Fence(control, begin(control))
    new.check()
    with pytest.raises(FencedError):
        old.check()
    for held in (first, second, old, new):
        held.release()


def test_another_trouble_with_locks_is_not_taken_for_none(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken disk"):
        DriverLock(control)
