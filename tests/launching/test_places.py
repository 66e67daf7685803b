"""Where workers work: a hanging one keeps nobody out, and what must not be lost is in the store at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY

from orchestrator.config import StorageConfig
from orchestrator.errors import FencedError
from orchestrator.launching import places
from orchestrator.launching.places import Stored, StoredPlace
from orchestrator.storage.claim import Claim, StoreFence
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
        Fence.begin(folder.control, driver=lock.driver, patience_s=240.0)
        assert worker.wait(240) == 1, "or else its lock would not have been free"
        assert "a newer attempt owns" in worker.stdout.read()
    lock.release()


def test_records_are_kept_in_the_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PUSH_S", 1000.0)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    stored = Stored(str(tmp_path / "store"), StorageConfig(), 1)
    store = stored.run().store
    claim = Claim.take(store, waiting=print)
    place = StoredPlace(stored, 0)
    try:
        place.guard(place.begin().token)
        place.folder.attempts.write_text('{"event": "started"}\n')
        place.keep()
        assert store.read("attempts.jsonl") == b'{"event": "started"}\n'
        StoreFence.begin(store, driver=1)
        with pytest.raises(FencedError):
            place.keep()
    finally:
        place.leave()
        claim.release()
