"""Who holds a run's lock, asked from outside without disturbing anyone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from orchestrator.storage.fence import DriverLock

HERE = socket.gethostname()


def test_a_run_that_was_never_driven_has_no_holder(tmp_path: Path) -> None:
    assert DriverLock.holder(tmp_path) is None
    assert DriverLock.holder(tmp_path / "nowhere") is None
    assert list(tmp_path.iterdir()) == []


def test_the_holder_is_named_until_it_lets_go_and_asking_takes_nothing(tmp_path: Path) -> None:
    lock = DriverLock(tmp_path)
    assert DriverLock.holder(tmp_path) == f"process {os.getpid()} on {HERE}"
    lock.release()
    assert DriverLock.holder(tmp_path) is None
    DriverLock(tmp_path).release()


def test_a_holder_whose_name_cannot_be_read_is_another_process(tmp_path: Path) -> None:
    lock = DriverLock(tmp_path)
    (tmp_path / "driver.lock").write_bytes(b"")
    assert DriverLock.holder(tmp_path) == "another process"
    lock.release()


def test_the_lock_of_a_dead_driver_is_not_even_tried(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = DriverLock(tmp_path)  # were it tried, it would be found taken
    (tmp_path / "driver.lock").write_text(f"process {gone.pid} on {HERE}")
    assert DriverLock.holder(tmp_path) is None
    (tmp_path / "driver.lock").write_text(f"process {gone.pid} on another-machine")
    assert DriverLock.holder(tmp_path) == f"process {gone.pid} on another-machine"
    lock.release()
