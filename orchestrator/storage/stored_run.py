"""A run in a store: its checkpoints, its small files, and the folder of this machine in which it is worked on.

In the store lies what lies in a run's folder: ``config.json``, ``metrics.jsonl`` (in blocks, see ``mirror``) and
``checkpoints/step-00000120-0001.0002/``, whose name ends with the numbers of the driver and the attempt that wrote it,
so that no two attempts ever write the same object. A checkpoint exists once its ``manifest.json`` is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from orchestrator.config import StorageConfig
from orchestrator.errors import CheckpointError, ConfigError, NotFoundError, StorageError
from orchestrator.storage.mirror import Replica
from orchestrator.storage.store import Store, check_key, open_store
from orchestrator.storage.tree import TreeFile

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "OUTCOME",
    "PARTS",
    "STOP",
    "StoredRun",
    "copy_of",
    "fetch_checkpoint",
    "files_of",
    "own_folder",
    "working_folder",
]

CHECKPOINTS = "checkpoints/"
MANIFEST, SET_ASIDE, PARTS = "manifest.json", "set-aside.json", ".parts/"
STOP, OUTCOME, FAILURES = ".control/stop", ".control/outcome.json", ".control/failures/"
NAME = re.compile(r"step-\d{8}-\d{4}\.\d{4}")
ORIGIN = ".origin"
PATIENCE_S = 10.0
AT_ONCE = 16


class StoredRun:
    """One run below ``uri``, as in ``s3://bucket/prefix/name``. Errors are those of ``Store``."""

    def __init__(self, uri: str, config: StorageConfig) -> None:
        self.uri = uri.rstrip("/")
        self.store: Store = open_store(self.uri, config)
        self._config = config

    @classmethod
    def reached(cls, uri: str, config: StorageConfig, *, write: bool = True) -> StoredRun:
        """The run, once the store has shown soon that it can be read, and written.

        Raises:
            StorageError: it cannot; the message says why.
        """
        soon = config.model_copy(update={"retry_budget_s": min(PATIENCE_S, config.retry_budget_s)})
        probe = cls(uri, soon).store
        next(iter(probe.list(".control/")), None)  # some stores make a bucket that is not there, when it is written to
        if write:
            probe.write(".control/probe", b"")
            probe.delete(".control/probe")
        return cls(uri, config)

    # -- checkpoints ---------------------------------------------------------------------------

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that exist, oldest first."""
        return sorted(self._folders_with(MANIFEST))

    def manifest(self, name: str) -> bytes:
        """The manifest of a checkpoint, as it was written."""
        return self.store.read(f"{CHECKPOINTS}{name}/{MANIFEST}")

    def download(
        self,
        name: str,
        folder: Path,
        *,
        part: int = 0,
        parts: int = 1,
        needs: Callable[[Mapping[str, Any], str], bool] = lambda manifest, file: True,  # noqa: ARG005 - all of it
    ) -> None:
        """Bring a checkpoint, or every ``parts``-th file of it, to ``folder``; what is there already stays.

        ``needs`` is asked with the manifest and a file's name whether that is wanted at all. What is missing in the
        store, or is not what it should be, is left for ``verify`` to find.

        Raises:
            CheckpointError: the manifest cannot be read.
            StorageError: see ``Store``.
        """
        manifest = self.read(f"{CHECKPOINTS}{name}/{MANIFEST}") or b""
        files = files_of(manifest)
        said = json.loads(manifest)
        wanted = [file for file in files if needs(said, file.path)]

        def download(file: TreeFile) -> None:
            path = folder / file.path
            if not file.is_at(path):
                with contextlib.suppress(NotFoundError):
                    self.store.download(f"{CHECKPOINTS}{name}/{file.path}", path)

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
            list(pool.map(download, wanted[part::parts]))
        if part == 0:
            _remove_unknown(folder, files)
            (folder / MANIFEST).write_bytes(manifest)

    def set_aside(self, name: str) -> str:
        """Take away the checkpoint's manifest, so that a run goes on from the one before it; its files stay."""
        folder = f"{CHECKPOINTS}{name}"
        self.store.write(f"{folder}/{SET_ASIDE}", self.manifest(name))
        self.store.delete(f"{folder}/{MANIFEST}")
        return f"{self.uri}/{folder}/{SET_ASIDE}"

    def delete(self, name: str) -> None:
        """Remove a checkpoint, its manifest first: what is half deleted is no checkpoint."""
        folder = f"{CHECKPOINTS}{name}/"
        self.store.delete(f"{folder}{MANIFEST}")
        self.store.delete(*(entry.key for entry in self.store.list(folder)))

    def collect_orphans(self) -> list[str]:
        """Remove what crashes left: checkpoints without a manifest, and uploads that were cut off.

        Only for who has fenced off every other writer. Returns the names of those checkpoints.
        """
        whole = self._folders_with(MANIFEST) | self._folders_with(SET_ASIDE)
        orphans = sorted({_folder_of(entry.key) for entry in self.store.list(CHECKPOINTS)} - whole)
        for name in orphans:
            self.delete(name)
        self.store.collect(CHECKPOINTS)
        return orphans

    def _folders_with(self, file: str) -> set[str]:
        found = (entry.key for entry in self.store.list(CHECKPOINTS) if entry.key.endswith(f"/{file}"))
        return {name for name in map(_folder_of, found) if NAME.fullmatch(name)}

    # -- small files ---------------------------------------------------------------------------

    def pull(self, folder: Path) -> None:
        """Bring the run's records and identity into ``folder``, as they are now."""
        Replica(self.store, folder).pull()

    def publish(self, folder: Path, names: Iterable[str]) -> None:
        """Write files of ``folder`` to the store, each whole."""
        for name in names:
            if (folder / name).is_file():
                self.store.write(name, (folder / name).read_bytes())

    def failures(self, folder: Path) -> list[str]:
        """Bring what the last attempt's workers said to ``folder``; returns the keys."""
        keys = [entry.key for entry in self.store.list(FAILURES)]
        for key in keys:
            (folder / key.removeprefix(FAILURES)).write_bytes(self.store.read(key))
        return keys

    def publish_failures(self, folder: Path) -> None:
        """Leave what an attempt's workers said, which lies in ``folder``, for the next attempt."""
        for path in folder.glob("*.json"):
            self.store.write(f"{FAILURES}{path.name}", path.read_bytes())

    def read(self, key: str) -> bytes | None:
        """A small object, or None where there is none."""
        try:
            return self.store.read(key)
        except NotFoundError:
            return None

    def move_aside(self) -> str | None:
        """Copy an earlier run to another name and remove it here, but for who owns it; returns where to, or None."""
        if self.store.stat("config.json") is None:
            return None
        parent, _, name = self.uri.rpartition("/")
        aside = f".replaced-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        above = open_store(parent, self._config)
        keys = [entry.key for entry in self.store.list() if not entry.key.startswith(".control/")]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda key: above.copy(f"{name}/{key}", f"{aside}/{key}"), keys))
        self.store.delete(*keys)
        return f"{parent}/{aside}"


def files_of(manifest: bytes) -> list[TreeFile]:
    """The files that a manifest names.

    Raises:
        CheckpointError: it is no manifest.
    """
    try:
        files = json.loads(manifest)["files"]
        found = [TreeFile(name, int(size), str(digest)) for name, (size, digest) in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} cannot be read") from None
    for file in found:
        try:
            check_key(file.path)
        except StorageError:
            raise CheckpointError(f"the manifest names {file.path!r}, outside of its folder") from None
    return found


def copy_of(uri: str) -> Path:
    """Bring what is known of the run at ``uri`` to this machine, but its checkpoints; returns the folder of copies.

    How the store is reached says the environment: the run itself may have been started elsewhere.

    Raises:
        ConfigError: there is no run there.
        StorageError: see ``Store``.
    """
    run = StoredRun.reached(uri, StorageConfig(), write=False)
    if run.store.stat("config.json") is None:
        raise ConfigError(f"no run at {uri}: give it as s3://BUCKET/PREFIX/NAME")
    folder = working_folder(run.uri) / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run.pull(folder)
    (folder / ORIGIN).write_text(run.uri)
    return folder


def fetch_checkpoint(folder: Path) -> None:
    """Bring the newest checkpoint of the run that ``folder`` is a copy of there, so that it can be read as in a folder.

    Whether it is whole is for the reader to verify. A folder that is no copy is left as it is.

    Raises:
        StorageError: see ``Store``.
    """
    if not (folder / ORIGIN).is_file():
        return
    run = StoredRun((folder / ORIGIN).read_text(), StorageConfig())
    if existing := run.checkpoints():
        run.download(existing[-1], folder / "checkpoints" / existing[-1])


def working_folder(uri: str) -> Path:
    """Where this machine works on the run at ``uri``: a folder that may be deleted whenever no run is going on.

    ``ORCHESTRATOR_CACHE`` names the place, by default ``~/.cache/orchestrator``. It holds two checkpoints at a time.
    """
    place = os.environ.get("ORCHESTRATOR_CACHE") or "~/.cache/orchestrator"
    uri = uri.rstrip("/")
    name = uri.rpartition("/")[2]
    return Path(place).expanduser().absolute() / "runs" / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def own_folder(shared: Path) -> tuple[Path, IO[bytes]]:
    """A new folder below ``shared`` for this process alone; it goes once the file that is returned is closed.

    Not at once, but when the next process asks for one: the kernel's lock on that file tells which are abandoned.
    """
    shared.mkdir(parents=True, exist_ok=True)
    with (shared / ".lock").open("ab") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        for lock_file in shared.glob("*/lock"):
            with contextlib.suppress(OSError), lock_file.open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_file.parent, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(dir=shared))
        held = (fresh / "lock").open("ab")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fresh, held


def _remove_unknown(folder: Path, files: Iterable[TreeFile]) -> None:
    """Remove what lies in a local copy and is not the checkpoint's."""
    known = {file.path for file in files}
    for path in folder.rglob("*.pt"):
        if path.relative_to(folder).as_posix() not in known:
            path.unlink(missing_ok=True)


def _folder_of(key: str) -> str:
    return key.removeprefix(CHECKPOINTS).partition("/")[0]
