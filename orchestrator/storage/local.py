"""A store in a folder of this machine, or of a filesystem that machines share."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import NotFoundError, StorageError, explain_oserror
from orchestrator.storage.store import Entry, check_key

__all__ = ["LocalStore"]

TEMPORARY = ".writing-"


class LocalStore:
    """See ``Store``. Writes go to another name first, are flushed to the disk, and are renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self._root)

    def read(self, key: str) -> bytes:
        """See ``Store``."""
        with self._errors(key):
            return self._path(key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        """See ``Store``."""
        with self._errors(key), self._appearing(key) as temporary:
            temporary.write_bytes(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ``Store``: a hard link is made only where the name is free, in one step."""
        path = self._path(key)
        with self._errors(key), _beside(path) as temporary:
            temporary.write_bytes(data)
            _flush(temporary)
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
            return True

    def list(self, prefix: str = "", *, deep: bool = True) -> Iterator[Entry]:
        """See ``Store``."""
        folder = self._root / prefix.rpartition("/")[0]
        with self._errors(prefix):
            paths = [
                path
                for path in (folder.rglob("*") if deep else folder.glob("*"))
                if TEMPORARY not in path.name and path.is_file()
            ]
        found = {path.relative_to(self._root).as_posix(): path for path in paths}
        for key in sorted(found):
            with contextlib.suppress(FileNotFoundError):  # removed since
                if key.startswith(prefix):
                    seen = found[key].stat()
                    yield Entry(key, seen.st_size, version=f"{seen.st_ino}-{seen.st_mtime_ns}")

    def stat(self, key: str) -> Entry | None:
        """See ``Store``."""
        path = self._path(key)
        with self._errors(key):
            return Entry(key, path.stat().st_size) if path.is_file() else None

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:  # noqa: ARG002
        """See ``Store``; a folder keeps no hash."""
        with self._errors(key), self._appearing(key) as temporary:
            shutil.copyfile(path, temporary)

    def download(self, key: str, path: Path) -> None:
        """See ``Store``."""
        with self._errors(key), _beside(path) as temporary:
            shutil.copyfile(self._path(key), temporary)
            temporary.replace(path)

    def copy(self, key: str, to: str) -> None:
        """See ``Store``."""
        self.upload(self._path(key), to)

    def delete(self, *keys: str) -> None:
        """See ``Store``; folders that become empty go too."""
        for key in keys:
            path = self._path(key)
            with self._errors(key), contextlib.suppress(FileNotFoundError):
                path.unlink()
                self._remove_empty(path.parent)

    def collect(self, prefix: str = "") -> int:
        """See ``Store``."""
        folder = self._root / prefix.rpartition("/")[0]
        with self._errors(prefix):
            left = [path for path in folder.rglob(f"{TEMPORARY}*") if path.is_file()]
            for path in left:
                path.unlink(missing_ok=True)
        return len(left)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextlib.contextmanager
    def _appearing(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        with _beside(path) as temporary:
            yield temporary
            _flush(temporary)
            temporary.replace(path)

    def _remove_empty(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # not empty
            while folder != self._root:
                folder.rmdir()
                folder = folder.parent

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"{error.filename or self._root / key}: no such file") from None
        except OSError as error:
            where = Path(error.filename) if isinstance(error.filename, str) else self._root / key
            raise StorageError(f"{explain_oserror(where, error)}; choose another folder, or free this one") from None


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name in the folder of ``path`` that nobody else has; what is left of it goes at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
