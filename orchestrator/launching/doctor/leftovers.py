"""What runs that live, or have died, keep others from: locks and unfinished checkpoints."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from orchestrator.launching.doctor.finding import Finding, ok, problem, warning
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.human import size

__all__ = ["drafts", "extension_locks", "run_locks"]


def extension_locks(environment: Mapping[str, str]) -> list[Finding]:
    """Locks of torch's extension builder: it keeps the file open while it builds, and never removes it once killed."""
    home = Path(environment.get("HOME") or Path.home())
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    root = Path(environment.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    locks = sorted(path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern) if path.is_file())
    builders = _holders(locks)
    findings = [_extension_lock(lock, builders.get(lock)) for lock in locks]
    return findings or [ok("lock.extension", f"none in {root}")]


def _extension_lock(lock: Path, builder: int | None) -> Finding:
    if builder is not None:
        return ok("lock.extension", f"process {builder} is building {lock.parent.name}")
    detail = f"{lock}: its builder is dead, and every start that needs {lock.parent.name} waits for ever"
    return problem("lock.extension", detail, f"rm {shlex.quote(str(lock))}")


def _holders(paths: Sequence[Path]) -> dict[Path, int]:
    """Which process has each of ``paths`` open, as far as this user may see."""
    wanted = {str(path.resolve()): path for path in paths}
    found: dict[Path, int] = {}
    for process in psutil.process_iter(["open_files"]) if wanted else ():
        for opened in process.info["open_files"] or ():
            if opened.path in wanted:
                found[wanted[opened.path]] = process.pid
    return found


def run_locks(folder: Path, *, name: str | None = None) -> list[Finding]:
    """Which runs are being driven right now; a problem only for the run called ``name``."""
    findings = []
    for run in _runs(folder):
        holder = DriverLock.holder(run.control)
        detail = f"{run.root.name} is owned by {holder}"
        if holder and run.root.name == name:
            remedy = "wait for it, stop it, or --set name=another-name"
            findings.append(problem("lock.run", detail, remedy))
        elif holder:
            findings.append(ok("lock.run", detail))
    return findings or [ok("lock.run", "no run is being driven")]


def _runs(folder: Path) -> list[RunFolder]:
    """Runs that this user may look into."""
    runs = map(RunFolder, sorted(folder.glob("*")))
    return [run for run in runs if os.access(run.control, os.R_OK | os.X_OK)]


def drafts(folder: Path) -> list[Finding]:
    """Checkpoints that a killed run began and nobody will finish."""
    findings = []
    for run in _runs(folder):
        begun = sorted(run.checkpoints.glob(".draft-*"))
        if begun and DriverLock.holder(run.control) is None:
            taken = sum(path.stat().st_size for draft in begun for path in draft.rglob("*") if path.is_file())
            detail = f"{run.root.name} left {len(begun)} unfinished, {size(taken)} in all"
            remedy = f"rm -r {shlex.quote(str(run.checkpoints))}/.draft-*"
            findings.append(warning("checkpoint.draft", detail, remedy))
    return findings or [ok("checkpoint.draft", "none left unfinished")]
