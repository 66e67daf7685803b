"""A worker that hangs does not keep the next attempt from the run's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commands import REPOSITORY

from orchestrator.storage.fence import DriverLock, Fence
from orchestrator.storage.folder import RunFolder

HANGS = """
import sys, time
from pathlib import Path
from orchestrator.launching.places import SharedPlace

place = SharedPlace(Path(sys.argv[1]), 0, sys.argv[2])
place.guard(place.begin().token)
print("up", flush=True)
time.sleep(1000)
"""


def test_a_worker_that_hangs_ends_once_another_attempt_begins(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    lock = DriverLock(folder.control)
    words = [sys.executable, "-c", HANGS, str(folder.root), lock.driver]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "up\n"
        Fence.begin(folder.control, driver=lock.driver)
        assert worker.wait(30) == 1, "or else its lock would not have been free"
        assert "a newer attempt owns" in worker.stdout.read()
    lock.release()
