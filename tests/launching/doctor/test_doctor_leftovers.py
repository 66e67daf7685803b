"""Locks that are held or stale, and what a killed run left behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.leftovers import drafts, extension_locks, run_locks
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder


def test_no_lock_of_an_extension_is_fine(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "torch_extensions"
    assert extension_locks({"HOME": str(tmp_path)}) == [Finding("lock.extension", "ok", f"none in {root}")]


def test_a_lock_whose_builder_is_dead_is_stale_and_one_that_is_open_is_not(tmp_path: Path) -> None:
    stale, live = tmp_path / "py311_cpu" / "shm comm" / "lock", tmp_path / "fused_adam" / "lock"
    for lock in (stale, live):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with live.open():
        found = extension_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert found == [
        Finding("lock.extension", "ok", f"process {os.getpid()} is building fused_adam"),
        Finding(
            "lock.extension",
            "problem",
            f"{stale}: its builder is dead, and every start that needs shm comm waits for ever",
            f"rm '{stale}'",
        ),
    ]


def a_run(folder: Path, name: str) -> RunFolder:
    run = RunFolder(folder / name)
    run.create()
    return run


def test_a_run_that_is_being_driven_is_a_problem_only_for_itself(tmp_path: Path) -> None:
    lock = DriverLock(a_run(tmp_path, "digits").control)
    detail = f"digits is owned by process {os.getpid()} on {socket.gethostname()}"
    remedy = "wait for it, stop it, or --set name=another-name"
    try:
        assert run_locks(tmp_path) == [Finding("lock.run", "ok", detail)]
        assert run_locks(tmp_path, name="other") == [Finding("lock.run", "ok", detail)]
        assert run_locks(tmp_path, name="digits") == [Finding("lock.run", "problem", detail, remedy)]
    finally:
        lock.release()
    assert run_locks(tmp_path, name="digits") == [Finding("lock.run", "ok", "no run is being driven")]


def test_drafts_are_left_over_only_where_no_driver_lives(tmp_path: Path) -> None:
    run = a_run(tmp_path, "digits")
    for name in (".draft-step-00000120", "step-00000060"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "rank-00000.pt").write_bytes(b"x" * 2048)
    assert drafts(tmp_path) == [
        Finding(
            "checkpoint.draft",
            "warning",
            "digits left 1 unfinished, 2 KiB in all",
            f"rm -r {run.checkpoints}/.draft-*",
        )
    ]
    lock = DriverLock(run.control)
    try:
        assert drafts(tmp_path) == [Finding("checkpoint.draft", "ok", "none left unfinished")]
    finally:
        lock.release()
