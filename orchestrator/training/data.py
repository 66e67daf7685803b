"""The training set by global position: a cursor of one integer, an order that depends on seed and epoch alone.

Position ``p`` of the endless stream is sample ``p % n`` of the shuffle of epoch ``p // n``. A step takes
the next ``global_batch`` positions, across the epoch's end where it falls inside, so nothing is dropped,
padded or repeated. The stream knows nothing of workers: a resize or a restart continues at the same position.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.errors import DataError, did_you_mean
from orchestrator.job import Dataset, Parquet
from orchestrator.planning.layout import Layout

__all__ = ["ParquetDataset", "Stream", "open_dataset", "share_of"]

Columns = Mapping[str, NDArray[Any]]


def open_dataset(source: Parquet | Dataset) -> Dataset:
    """Open a described data set; one that already answers the two verbs is returned as it is.

    Raises:
        DataError: missing, empty or corrupt files, or a column that is not there.
    """
    return ParquetDataset.open(source) if isinstance(source, Parquet) else source


@dataclass(frozen=True)
class ParquetDataset:
    """Columns of Parquet files held in memory. Fixed-size lists become axes: ``list<uint8>[64]`` is ``[n, 64]``."""

    columns: Columns
    num_samples: int

    @classmethod
    def open(cls, source: Parquet) -> ParquetDataset:
        """Read every file of ``source`` in the order of their names.

        Raises:
            DataError: see ``open_dataset``.
        """
        tables = [_read(path, source.columns) for path in _files(source.uri)]
        table = _joined(source.uri, tables)
        if table.num_rows == 0:
            raise DataError(f"{source.uri}: holds no rows; check the step that wrote it")
        return cls({name: _to_numpy(source.uri, name, table[name]) for name in table.column_names}, table.num_rows)

    def __len__(self) -> int:
        return self.num_samples

    def take(self, positions: NDArray[np.int64]) -> Columns:
        """Rows at ``positions``, in that order."""
        return {name: column[positions] for name, column in self.columns.items()}


@dataclass(frozen=True)
class Stream:
    """The endless, shuffled order of a training set of ``num_samples``."""

    num_samples: int
    seed: int

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Indices of the samples at stream positions ``start`` to ``start + count``, shape ``[count]``."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            epoch, offset = divmod(start, self.num_samples)
            part = _shuffle(self.num_samples, self.seed, epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def micro_batches(self, start: int, layout: Layout, rank: int) -> list[NDArray[np.int64]]:
        """Worker ``rank``'s part of the global batch at ``start``: ``accumulation`` arrays of ``[micro_batch]``."""
        mine = self.indices(start + rank * layout.worker_batch, layout.worker_batch)
        return list(mine.reshape(layout.accumulation, layout.micro_batch))


def share_of(total: int, rank: int, world_size: int) -> range:
    """Worker ``rank``'s contiguous share of ``total`` items; shares differ by at most one and overlap nowhere."""
    base, extra = divmod(total, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


@functools.lru_cache(maxsize=4)
def _shuffle(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Philox is counter-based: its stream for a key is the same on every machine and numpy version.
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)


def _files(uri: str) -> list[Path]:
    path = Path(uri)
    if "://" in uri:
        raise DataError(f"{uri}: only local Parquet files and folders can be read")
    if not path.exists():
        raise DataError(f"{uri}: no such file or folder; write the data first, or correct the job's data argument")
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{uri}: no *.parquet file in this folder")
    return files


def _read(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        names = pq.read_schema(path).names
        for column in columns:
            if column not in names:
                raise DataError(f"{path}: no column {column!r}; {did_you_mean(column, names)}")
        return pq.read_table(path, columns=list(columns) or None)
    except (OSError, pa.ArrowException) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as Parquet ({first_line}); write it again") from None


def _joined(uri: str, tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid:
        raise DataError(f"{uri}: its files do not have the same columns and types; write them again") from None


def _to_numpy(uri: str, name: str, column: pa.ChunkedArray) -> NDArray[Any]:
    values, shape, nulls = column.combine_chunks(), [len(column)], column.null_count
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
        nulls += values.null_count
    if nulls:
        raise DataError(f"{uri}: column {name!r} has {nulls} nulls; fill or drop them first")
    array = values.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{uri}: column {name!r} holds {column.type}, and a tensor holds numbers: write it as numbers or "
            "fixed-size lists of them, or name the columns to read in Parquet(columns=...)"
        )
    return np.ascontiguousarray(array.reshape(shape))
