"""A run's growing files in a store: pushed by the process that writes them, pulled by whoever reads them.

S3 has no append. A table or a log is cut into blocks of 1 MiB, ``metrics.jsonl``, ``metrics.jsonl.00001`` and so on, of
which only those that have changed travel. What lies in the store is always a beginning of what was written: a block
appears after the one before it, and of a file that is cut back the last blocks go first.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import FencedError, NotFoundError, StorageError
from orchestrator.storage.store import Entry, Store

__all__ = ["BLOCK_BYTES", "Mirror", "Pushing", "Replica"]

BLOCK_BYTES = 2**20
BLOCK = re.compile(r"(.+?)(?:\.(\d{5}))?")


@dataclass(frozen=True)
class _Block:
    """What was last sent of a block."""

    size_bytes: int
    sha256: bytes


UNKNOWN = _Block(0, b"")


class Mirror:
    """Brings files below ``folder`` to ``store`` as they grow. One process pushes a file, and nobody else."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._sent: dict[str, list[_Block]] = {}

    def push(self, names: Iterable[str]) -> None:
        """Send what has changed of the files ``names``; those that do not exist are left out.

        Raises:
            StorageError: see ``Store``; the next push goes on where this one was cut off.
        """
        for name in names:
            if (self._folder / name).is_file():
                self._push(name)

    def _push(self, name: str) -> None:
        if name not in self._sent:  # another process may have pushed more than there is now
            self._sent[name] = [UNKNOWN for _ in _blocks(self._store, name)]
        sent = self._sent[name]
        with (self._folder / name).open("rb") as file:
            blocks = -(-os.fstat(file.fileno()).st_size // BLOCK_BYTES)
            blocks = max(blocks, min(len(sent), 1))  # cut to nothing it is empty, or a new reader keeps its old copy
            for index in reversed(range(blocks, len(sent))):
                self._store.delete(_key(name, index))
                del sent[index]
            for index in range(_first_to_look_at(file, sent), blocks):
                file.seek(index * BLOCK_BYTES)
                data = file.read(BLOCK_BYTES)
                block = _Block(len(data), hashlib.sha256(data).digest())
                if sent[index : index + 1] != [block]:
                    self._store.write(_key(name, index), data)
                    sent[index : index + 1] = [block]


def _first_to_look_at(file: BinaryIO, sent: Sequence[_Block]) -> int:
    """The last block that was sent, if the file has only grown since; else the first."""
    last = len(sent) - 1
    if last < 0:
        return 0
    file.seek(last * BLOCK_BYTES)
    return last if hashlib.sha256(file.read(sent[last].size_bytes)).digest() == sent[last].sha256 else 0


class Pushing:
    """A thread that pushes every ``every_s`` seconds; a store that does not answer is tried again at the next time.

    ``before`` is called before each push: what it raises keeps the push from happening.
    """

    def __init__(
        self, mirror: Mirror, names: Iterable[str], *, every_s: float, before: Callable[[], None] = lambda: None
    ) -> None:
        self._mirror = mirror
        self._names = tuple(names)
        self._every_s = every_s
        self._before = before
        self._one_at_a_time = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pushing", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Push now.

        Raises:
            StorageError: see ``Store``.
            FencedError: ``before`` said so.
        """
        with self._one_at_a_time:
            self._before()
            self._mirror.push(self._names)

    def close(self) -> None:
        """End the thread; what was written since the last push is not pushed."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            try:
                self.flush()
            except StorageError:
                continue  # the records stay on this machine's disk until the store is back
            except FencedError:
                return  # the training thread hears of it from the fence


class Replica:
    """Copies of the files that others push, kept up to date in ``folder``."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._known: dict[str, list[Entry]] = {}

    def pull(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Bring the run's files, but not what lies in folders below it, up to date with the store.

        Raises:
            StorageError: see ``Store``; the copies are then as they were, or newer.
        """
        files: dict[str, list[Entry]] = {}
        for entry in self._store.list(deep=False):
            name, index = _split(entry.key)
            if wanted(name):
                there = files.setdefault(name, [])
                if index == len(there):  # blocks after a gap are of a file that is being cut back
                    there.append(entry)
        for name in self._known.keys() - files.keys():
            (self._folder / name).unlink(missing_ok=True)
            del self._known[name]
        for name, there in files.items():
            if there and there != self._known.get(name):
                self._update(name, there)

    def _update(self, name: str, there: list[Entry]) -> None:
        known = self._known.get(name, [])
        same = 0
        while same < min(len(known), len(there)) and known[same] == there[same]:
            same += 1
        try:
            fresh = b"".join(self._store.read(entry.key) for entry in there[same:])
        except NotFoundError:
            return  # cut back at this very moment: the next pull sees how it ends
        path, start = self._folder / name, same * BLOCK_BYTES
        old = _rest(path, start) if path.is_file() and known else None
        if old is not None and fresh.startswith(old):
            with path.open("ab") as file:
                file.write(fresh[len(old) :])
        else:
            _replace(path, start, fresh)
        self._known[name] = there


def _replace(path: Path, start: int, fresh: bytes) -> None:
    """The first ``start`` bytes as they are, then ``fresh``, as another file of this name: readers begin anew."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("wb") as file:
        if start:
            file.write(path.read_bytes()[:start])
        file.write(fresh)
    temporary.replace(path)


def _rest(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _blocks(store: Store, name: str) -> Iterable[Entry]:
    return (entry for entry in store.list(name) if _split(entry.key)[0] == name)


def _key(name: str, index: int) -> str:
    return name if index == 0 else f"{name}.{index:05d}"


def _split(key: str) -> tuple[str, int]:
    """Name and number of a block."""
    match = BLOCK.fullmatch(key)
    assert match is not None
    return match[1], int(match[2] or 0)
