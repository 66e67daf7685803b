"""A folder to a store: many files at once, each with its size and hash, and none twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.storage.store import Store

__all__ = ["TreeFile", "file_sha256", "upload_tree"]

AT_ONCE = 8


@dataclass(frozen=True)
class TreeFile:
    """One file of a tree: its path below the tree's root, with ``/`` between the parts, its size and its SHA-256."""

    path: str
    size_bytes: int
    sha256: str

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is this file, by size and hash."""
        return path.is_file() and path.stat().st_size == self.size_bytes and file_sha256(path) == self.sha256


def upload_tree(
    store: Store, folder: Path, prefix: str, *, paths: Iterable[Path] | None = None, at_once: int = AT_ONCE
) -> tuple[TreeFile, ...]:
    """Upload every file below ``folder``, or those of ``paths``, to ``prefix/``; returns what is there now, in order.

    Called again after it was cut off, it leaves out the files that the store holds with the same size and hash.
    Nothing says that the tree is whole: write a manifest of what is returned, last.

    Raises:
        StorageError: see ``Store``; files that were uploaded before stay.
    """
    chosen = sorted(path for path in (folder.rglob("*") if paths is None else paths) if path.is_file())

    def upload(path: Path) -> TreeFile:
        file = TreeFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))
        key = f"{prefix}/{file.path}"
        there = store.stat(key)
        if there is None or (there.size_bytes, there.sha256) != (file.size_bytes, file.sha256):
            store.upload(path, key, sha256=file.sha256)
        return file

    with ThreadPoolExecutor(at_once, thread_name_prefix="tree") as pool:
        futures = [pool.submit(upload, path) for path in chosen]
        try:
            return tuple(future.result() for future in futures)
        finally:
            for future in futures:  # after a failure, what has not begun is not begun
                future.cancel()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
