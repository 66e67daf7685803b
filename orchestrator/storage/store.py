"""Where bytes lie: local folders and S3 behind one small protocol.

Ten verbs, because a run, a checkpoint or a data set needs each and none can be made of the others at its price:
``read``, ``write`` and ``put_if_absent`` for small things that are whole or absent, ``upload`` and ``download`` for
files that memory need not hold, ``list`` and ``stat`` to see what is there, ``copy`` without the bytes passing through
here, ``delete``, and ``collect`` for what a crash left half written. There is no append, no rename and no lock: S3 has
none, and a protocol that pretends to is slow or unsafe. Columns are read through pyarrow's own view of
the same place (``storage/filesystem.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.config import StorageConfig
from orchestrator.errors import StorageError

__all__ = ["Entry", "Store", "check_key", "is_s3", "open_store"]


@dataclass(frozen=True)
class Entry:
    """One object: its key below the store's root, its size, and its SHA-256 where the store was told it.

    ``version`` differs once the object has been written again; ``list`` knows it, ``stat`` need not.
    """

    key: str
    size_bytes: int
    sha256: str | None = None
    version: str = ""


class Store(Protocol):
    """A root and the objects below it. Keys are relative, with ``/`` between their parts.

    Every verb may be called from many threads, and raises:
        StorageUnavailableError: no answer within the budget for retries.
        NotFoundError: there is no object of this key.
        StorageError: the store refuses; the message names the remedy, and never a secret.
    """

    @property
    def uri(self) -> str:
        """Where the root is, without a slash at its end."""
        ...

    def read(self, key: str) -> bytes:
        """Return the whole object."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Write the object, over an earlier one; a reader sees all of either."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; of many writers exactly one is told True.

        ``data`` should differ between writers: by it a writer whose first answer was lost knows its own object.
        """
        ...

    def list(self, prefix: str = "", *, deep: bool = True) -> Iterator[Entry]:
        """Yield every object whose key starts with ``prefix``, in the order of the keys.

        Not ``deep``: only those without a ``/`` in the rest of the key.
        """
        ...

    def stat(self, key: str) -> Entry | None:
        """Return what is known of the object, or None where there is none."""
        ...

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Make the object of a local file, in parts where it is large; ``sha256`` is kept with it where that works."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Make a local file of the object, whole or not at all; its folder is made too."""
        ...

    def copy(self, key: str, to: str) -> None:
        """Make another object of the same bytes, within the store."""
        ...

    def delete(self, *keys: str) -> None:
        """Remove the objects; what is not there is no error."""
        ...

    def collect(self, prefix: str = "") -> int:
        """Remove what writers below ``prefix`` left half written; returns how many there were. None may be at work."""
        ...


def open_store(uri: str, config: StorageConfig | None = None) -> Store:
    """Return the store whose root is ``uri``: a folder, or ``s3://bucket/prefix``. Nothing is contacted yet.

    Raises:
        StorageError: the address is of neither kind.
    """
    if is_s3(uri):
        from orchestrator.storage.s3 import S3Store  # boto3 only where S3 is used

        return S3Store(uri, config or StorageConfig())
    if "://" in uri and not uri.startswith("file://"):
        raise StorageError(f"{uri}: stores are folders and s3://BUCKET/PREFIX")
    from orchestrator.storage.local import LocalStore

    return LocalStore(Path(uri.removeprefix("file://")))


def is_s3(uri: str) -> bool:
    """Whether ``uri`` names a place in S3 or a compatible store."""
    return uri.startswith("s3://")


def check_key(key: str) -> str:
    """Return ``key`` unless it could lead out of the root.

    Raises:
        StorageError: it is empty, absolute, or has a part such as ``..``.
    """
    if not key or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r}: use names with / between them, without empty parts, '.' and '..'")
    return key
