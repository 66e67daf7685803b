"""Whether the folders of runs and of Ray can be written, and have room."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from orchestrator.config import StorageConfig
from orchestrator.errors import StorageError, explain_oserror
from orchestrator.launching.doctor.finding import Finding, ok, problem, warning
from orchestrator.launching.doctor.probes import DiskUsage
from orchestrator.storage.stored_run import StoredRun
from orchestrator.telemetry.human import size

__all__ = ["disk", "no_folder", "runs_folder", "runs_in_store", "temporary_folder", "temporary_is_usable"]

GIB = 2**30
OTHER_FOLDER = "--set checkpoint.uri=/another/folder"
# Ray 2.60's longest socket in its temporary folder, and the longest path that Linux gives a socket.
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SOCKET_PATH_BYTES = 107


def no_folder(uri: str) -> list[Finding]:
    """Runs cannot be kept at other URLs than S3's."""
    detail = f"{uri}: only folders of this machine or a shared filesystem, and s3://BUCKET/PREFIX, can be used"
    return [problem("storage.runs", detail, "--set checkpoint.uri=runs")]


def runs_in_store(uri: str, config: StorageConfig) -> list[Finding]:
    """Whether runs can write where they would lie in S3."""
    try:
        StoredRun.reached(f"{uri.rstrip('/')}/doctor", config)
    except StorageError as error:
        detail, _, remedy = str(error).rpartition(": ")
        return [problem("storage.runs", detail, remedy)]
    return [ok("storage.runs", f"{uri} can be read and written")]


def runs_folder(folder: Path) -> list[Finding]:
    """Whether runs can write where their folders would be; a folder that does not exist yet is not created."""
    try:
        nearest = _write_probe(folder)
    except OSError as error:
        return [problem("storage.runs", f"cannot be written: {explain_oserror(folder, error)}", OTHER_FOLDER)]
    return [ok("storage.runs", f"{folder} can be written{'' if nearest == folder else ', once created'}")]


def _write_probe(folder: Path) -> Path:
    """Create and remove a file in ``folder``, or the first of its parents that exists; returns which it was."""
    nearest = _nearest(folder)
    probe = nearest / f".doctor-{secrets.token_hex(4)}"
    with probe.open("xb") as stream:
        try:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
        finally:
            probe.unlink()
    return nearest


def _nearest(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def temporary_folder(environment: Mapping[str, str]) -> Path:
    """Where Ray puts logs, sockets and spilled objects of a cluster that a run starts."""
    return Path(environment.get("RAY_TMPDIR") or Path(tempfile.gettempdir()) / "ray").absolute()


def temporary_is_usable(folder: Path) -> list[Finding]:
    """Whether Ray can write there, and its sockets get paths that are short enough."""
    remedy = "export RAY_TMPDIR=/tmp/ray" if folder != Path("/tmp/ray") else "export RAY_TMPDIR=/var/tmp/ray"
    excess = len(os.fsencode(folder / LONGEST_SOCKET)) - SOCKET_PATH_BYTES
    if excess > 0:
        return [problem("storage.temporary", f"{folder} is {excess} characters too long for Ray's sockets", remedy)]
    try:
        _write_probe(folder)
    except OSError as error:
        return [problem("storage.temporary", f"cannot be written: {explain_oserror(folder, error)}", remedy)]
    return [ok("storage.temporary", f"{folder} can be written")]


def disk(check: str, folder: Path, elsewhere: str, *, disk_usage: DiskUsage = shutil.disk_usage) -> list[Finding]:
    """Free space where ``folder`` is, or will be."""
    total, _, free = disk_usage(_nearest(folder))
    detail = f"{size(free)} of {size(total)} free for {folder}"
    if free >= 5 * GIB:
        return [ok(check, detail)]
    remedy = f"make room (du -xh {shlex.quote(str(folder))} | sort -h), or {elsewhere}"
    return [problem(check, detail, remedy) if free < GIB else warning(check, detail, remedy)]
