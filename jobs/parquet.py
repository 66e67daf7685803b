"""Writing a job's own data: Parquet files that appear whole or not at all, and that say what they were made of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import DataError

__all__ = ["are_written", "place_of", "write_whole"]


def place_of(data: str) -> tuple[str, bool]:
    """Where a job's data lie, for workers that may run in another folder, and whether the job may write there.

    An address such as ``s3://bucket/digits`` is left as it is: its files are there already.
    """
    return (data.rstrip("/"), False) if "://" in data else (str(Path(data).absolute()), True)


def write_whole(table: pa.Table, path: Path, *, row_group_size: int) -> None:
    """Write ``table`` so that a reader, or a later run, finds all of ``path`` or nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        pq.write_table(table, temporary, row_group_size=row_group_size)
        temporary.chmod(0o644)  # mkstemp's is for its owner alone, and workers may run as another user
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def are_written(files: Sequence[Path], made_of: Mapping[str, str]) -> bool:
    """Whether all of ``files`` are there, each with ``made_of`` in its metadata.

    Raises:
        DataError: one is no Parquet file, or was made of something else.
    """
    if not all(path.exists() for path in files):
        return False
    for path in files:
        try:
            metadata = pq.read_schema(path).metadata or {}
        except pa.ArrowException:
            raise DataError(f"{path}: cannot be read as Parquet; delete it, and it is written again") from None
        found = {name: metadata.get(name.encode(), b"nothing known").decode() for name in made_of}
        if found != made_of:
            held, wanted = (", ".join(f"{n}={v}" for n, v in values.items()) for values in (found, made_of))
            raise DataError(f"{path} holds {held}, not {wanted}: give another folder, data=FOLDER, or delete this one")
    return True
