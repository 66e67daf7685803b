"""Where Ray Data's tasks write: one Parquet file each, whole or not at all, in a folder or in S3. Imports Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink
from ray.data.block import BlockAccessor

from orchestrator.config import StorageConfig
from orchestrator.storage.store import open_store

__all__ = ["PartSink"]


class PartSink(Datasink[int]):
    """Writes ``part-00000.parquet`` and so on, with checksums, in row groups of about the wanted size."""

    def __init__(self, destination: str, storage: StorageConfig, row_group_bytes: int, file_bytes: int) -> None:
        self._destination = destination
        self._storage = storage
        self._row_group_bytes = row_group_bytes
        self._file_bytes = file_bytes

    @property
    def min_bytes_per_write(self) -> int | None:
        """How much one task gets, if there is as much."""
        return self._file_bytes

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        """Write all ``blocks`` into the file of this task; returns its rows."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        table = pa.concat_tables([table for table in tables if table.num_rows]) if any(map(len, tables)) else None
        if table is None:
            return 0
        rows = max(1, table.num_rows * self._row_group_bytes // max(table.nbytes, 1))
        with tempfile.TemporaryDirectory(prefix="orchestrator-part-") as folder:
            path = Path(folder) / "part.parquet"
            pq.write_table(table, path, row_group_size=rows, compression="zstd", write_page_checksum=True)
            open_store(self._destination, self._storage).upload(path, f"part-{ctx.task_idx:05d}.parquet")
        return int(table.num_rows)
