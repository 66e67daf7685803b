"""The run folder's tables: JSON lines written by one process and read, while they grow, by another.

A line counts once its newline is there: a process killed while writing leaves at most one torn last line,
which every reader skips and the next writer cuts off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from orchestrator.errors import RunError, RunFolderError, explain_oserror

__all__ = ["Follower", "JsonLines", "Record", "read", "truncate_after"]

Record = dict[str, Any]
"""One line of a table: a JSON object."""


class JsonLines:
    """Append-only table at ``path``; the file is opened by the first append.

    Raises ``RunError`` when the file cannot be opened or written (a full disk, a folder removed).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, visible to readers on return; NaN and infinity become null."""
        line = _encode(record)
        try:
            if self._file is None:
                self._file = _open_for_append(self.path)
            # Unbuffered: one write per line. A short write (a full disk) is finished by the loop or raises.
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise RunError(f"cannot write telemetry to {explain_oserror(self.path, error)}") from error

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Follower:
    """Reads a growing table; ``poll`` returns each record once, even when the file is cut back and continued.

    A record is told apart by (step, attempt), and by its event in ``attempts.jsonl``; by (step, time) in
    ``failures.jsonl``, which has several of one attempt. Close it, or use it in a
    ``with`` statement: the file stays open between polls.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._offset = 0
        self._lines = 0
        self._seen: set[tuple[Any, ...]] = set()

    def poll(self) -> list[Record]:
        """The complete records that were not returned before; empty when there is nothing new, or no file.

        Raises ``RunFolderError`` for a complete line that is no JSON object, or a file that cannot be read.
        """
        try:
            chunk = self._new_bytes()
        except OSError as error:
            raise RunFolderError(f"cannot read {explain_oserror(self.path, error)}") from error
        whole = chunk[: chunk.rfind(b"\n") + 1]
        records = _decode(self.path, whole, first_line=self._lines + 1)
        self._offset += len(whole)
        self._lines += len(records)
        fresh = []
        for record in records:
            key = (record.get("step"), record.get("attempt", record.get("time")), record.get("event"))
            if key not in self._seen:
                self._seen.add(key)
                fresh.append(record)
        return fresh

    def close(self) -> None:
        """Close the file; a later poll opens it again and goes on."""
        if self._file is not None:
            self._file.close()
        self._file, self._offset, self._lines = None, 0, 0

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _new_bytes(self) -> bytes:
        try:
            now = self.path.stat()
            # The old file stays open, so that its inode cannot be given to its successor.
            if self._file is not None:
                held = os.fstat(self._file.fileno())
                if (held.st_dev, held.st_ino) != (now.st_dev, now.st_ino) or now.st_size < self._offset:
                    self.close()
            if self._file is None:
                self._file = self.path.open("rb")
        except FileNotFoundError:
            self.close()
            return b""
        self._file.seek(self._offset)
        return self._file.read()


def read(path: Path) -> list[Record]:
    """All complete records of a table; empty when the file does not exist.

    Raises ``RunFolderError`` naming the line for a complete line that is no JSON object.
    """
    return _decode(path, _complete_lines(path))


def truncate_after(path: Path, step: int) -> int:
    """Drop the records after ``step`` and a torn last line, atomically; return how many records went.

    Call it before the table's writer appends: an open writer would keep writing to the old file.
    Records without a step stay. Raises ``RunFolderError`` for a corrupt line or a folder that cannot be written.
    """
    if not path.exists():
        return 0
    whole = _complete_lines(path)
    lines = whole.splitlines(keepends=True)
    kept = [
        line for line, r in zip(lines, _decode(path, whole), strict=True) if r.get("step") is None or r["step"] <= step
    ]
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise RunFolderError(f"cannot rewrite {explain_oserror(path, error)}") from error
    return len(lines) - len(kept)


def _open_for_append(path: Path) -> BinaryIO:
    file = path.open("a+b", buffering=0)
    try:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            file.truncate(len(_complete_lines(path)))
    except BaseException:
        file.close()
        raise
    return file


def _complete_lines(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunFolderError(f"cannot read {explain_oserror(path, error)}") from error
    return content[: content.rfind(b"\n") + 1]


def _encode(record: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), allow_nan=False)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _decode(path: Path, content: bytes, *, first_line: int = 1) -> list[Record]:
    records = []
    for index, line in enumerate(content.split(b"\n")[:-1], start=first_line):
        try:
            record = json.loads(line)
        except ValueError:  # both bad JSON and bad UTF-8
            record = None
        if not isinstance(record, dict):
            shown = line[:60].decode(errors="replace")
            raise RunFolderError(
                f"{path}: line {index} is not a JSON object: {shown!r}; "
                "restore the file from a copy, or remove that line"
            )
        records.append(record)
    return records
