"""A folder to a store and back: many files at once, each with its size and hash, and none twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import StorageError
from orchestrator.storage.store import Store, check_key

__all__ = ["TreeFile", "download_tree", "file_sha256", "upload_tree"]

Item = TypeVar("Item")
Done = TypeVar("Done")

AT_ONCE = 8


@dataclass(frozen=True)
class TreeFile:
    """One file of a tree: its path below the tree's root, with ``/`` between the parts, its size and its SHA-256."""

    path: str
    size_bytes: int
    sha256: str


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

    return _all(upload, chosen, at_once)


def download_tree(
    store: Store, prefix: str, folder: Path, files: Iterable[TreeFile], *, at_once: int = AT_ONCE
) -> None:
    """Download ``files`` from ``prefix/`` to ``folder``, and compare size and hash of each.

    Files that lie in ``folder`` already with the same size and hash are left as they are.

    Raises:
        StorageError: see ``Store``; or an object is not the file it should be, which is named.
    """

    def download(file: TreeFile) -> None:
        path = folder / check_key(file.path)
        if _is(path, file):
            return
        store.download(f"{prefix}/{file.path}", path)
        if not _is(path, file):
            path.unlink()
            raise StorageError(
                f"{store.uri}/{prefix}/{file.path}: is not the file that was written (size or SHA-256 differ): use an "
                "earlier copy"
            )

    _all(download, list(files), at_once)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _all(act: Callable[[Item], Done], items: Sequence[Item], at_once: int) -> tuple[Done, ...]:
    with ThreadPoolExecutor(at_once, thread_name_prefix="tree") as pool:
        futures = [pool.submit(act, item) for item in items]
        try:
            return tuple(future.result() for future in futures)
        finally:
            for future in futures:  # after a failure, what has not begun is not begun
                future.cancel()


def _is(path: Path, file: TreeFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and file_sha256(path) == file.sha256
