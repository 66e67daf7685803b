"""What the driver of a run in a store does while that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import StorageConfig
from orchestrator.errors import StorageUnavailableError
from orchestrator.launching import homes
from orchestrator.launching.homes import StoredHome
from orchestrator.storage.claim import Claim
from orchestrator.storage.local import LocalStore
from orchestrator.storage.stored_run import STOP, StoredRun


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stop_that_the_store_did_not_take_is_said_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(homes, "PULL_S", 0.05)
    refused, away, write = [], [True], LocalStore.write

    def unreliable(self: LocalStore, key: str, *args: Any, **options: Any) -> Any:
        if away and key == STOP:
            refused.append(key)
            raise StorageUnavailableError("away")
        return write(self, key, *args, **options)

    monkeypatch.setattr(LocalStore, "write", unreliable)
    run = StoredRun(str(tmp_path / "store"), StorageConfig())
    home = StoredHome(run, StorageConfig(), Claim.take(run.store, waiting=print))
    home.folder.create()
    home._thread.start()
    try:
        home.ask_to_stop()
        wait_until(lambda: len(refused) > 2)
        assert run.store.stat(STOP) is None
        away.clear()
        wait_until(lambda: run.store.stat(STOP) is not None)
        home.begin_anew()
        time.sleep(0.3)
        assert run.store.stat(STOP) is None, "said once: whoever comes next is not stopped"
        away.append(True)
        home.ask_to_stop()
        home.begin_anew()
        away.clear()
        time.sleep(0.3)
        assert run.store.stat(STOP) is None, "and not by what was asked of those before them"
    finally:
        home.close()
