"""Writing a job's own data: Parquet files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["write_whole"]


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
