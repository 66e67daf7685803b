"""The training set by global position: a cursor of one integer, an order that depends on seed and epoch alone.

Position ``p`` of the endless stream is sample ``p % n`` of the shuffle of epoch ``p // n``. A step takes
the next ``global_batch`` positions, across the epoch's end where it falls inside, so nothing is dropped,
padded or repeated. The stream knows nothing of workers: a resize or a restart continues at the same position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.config import DataConfig, RunConfig, StorageConfig
from orchestrator.errors import DataError
from orchestrator.job import Dataset, Parquet
from orchestrator.planning.layout import Layout
from orchestrator.training.parquet import Column, ParquetFiles, gather, readable
from orchestrator.training.streaming import RowGroups, StreamingDataset, WindowOrder

__all__ = ["IN_MEMORY_BYTES", "Batches", "Decoded", "ParquetDataset", "Stream", "open_dataset", "share_of"]

Columns = Mapping[str, NDArray[Any]]
Decode = Callable[[Columns], Mapping[str, Any]]

IN_MEMORY_BYTES = 2**30
"""A set of at most this size, uncompressed, is held in memory. A constant, because the order depends on it: were it a
share of the machine's memory, a run that goes on elsewhere would see another order."""


def open_dataset(source: Parquet | Dataset, config: RunConfig | None = None) -> Dataset:
    """Open a described data set as ``config`` says; one that already answers the two verbs is returned as it is.

    Raises:
        DataError: missing, empty or corrupt files, or a column that is not there or is not of the declared type.
        StorageError: the place cannot be reached, or refuses.
    """
    if not isinstance(source, Parquet):
        return source
    data = config.data if config else DataConfig()
    files = ParquetFiles.open(source.uri, source.columns, config.storage if config else StorageConfig())
    readable(source.uri, files.schema, files.names, decoded=source.decode is not None)
    skip = config is not None and config.failures.on_corrupt_row_group == "skip"
    groups = RowGroups(files, threads=data.threads, skip=skip)
    opened: ParquetDataset | StreamingDataset
    if data.mode == "memory" or (data.mode == "auto" and files.size_bytes <= IN_MEMORY_BYTES):
        opened = ParquetDataset.read(groups)
    else:
        sizes = tuple(group.rows for group in files.groups)
        opened = StreamingDataset(
            groups, WindowOrder(sizes, data.window, data.lanes, config.recipe.batch if config else 1)
        )
    return opened if source.decode is None else Decoded(opened, source.decode, source.uri)


@dataclass(frozen=True)
class ParquetDataset:
    """Columns of Parquet files held in memory. Fixed-size lists become axes: ``list<uint8>[64]`` is ``[n, 64]``."""

    columns: Mapping[str, Column]
    num_samples: int
    skipped_samples: int = 0
    """Samples whose row groups could not be read, and that others stand for."""

    @classmethod
    def read(cls, groups: RowGroups) -> ParquetDataset:
        """Read every row group, in the order of the files' names.

        Raises:
            DataError: see ``open_dataset``.
        """
        read = groups.get(range(len(groups.files.groups)))
        parts = [read[group] for group in sorted(read)]
        columns = {name: _joined([part[name] for part in parts]) for name in groups.files.names}
        groups.want([])  # they are joined: a second copy is not kept
        return cls(columns, groups.files.num_rows, sum(groups.skipped.values()))

    def __len__(self) -> int:
        return self.num_samples

    def take(self, positions: NDArray[np.int64]) -> Columns:
        """Rows at ``positions``, in that order."""
        return gather([(self.columns, positions, np.arange(len(positions)))])


@dataclass(frozen=True)
class Decoded:
    """A data set whose rows pass through the job's own function."""

    rows: ParquetDataset | StreamingDataset
    decode: Decode
    uri: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def skipped_samples(self) -> int:
        """See the data set itself."""
        return self.rows.skipped_samples

    def take(self, positions: NDArray[np.int64]) -> Columns:
        """Rows at ``positions``, in that order, decoded.

        Raises:
            DataError: the function does not return a column of numbers for each row.
        """
        columns = dict(self.decode(self.rows.take(positions)))
        for name, column in columns.items():
            if not isinstance(column, np.ndarray) or column.dtype.kind not in "biuf" or len(column) != len(positions):
                found = (
                    f"{column.dtype}{list(column.shape)}" if isinstance(column, np.ndarray) else type(column).__name__
                )
                raise DataError(
                    f"{self.uri}: the decode function returns {found} as column {name!r} for {len(positions)} rows: "
                    "return a numpy array of numbers whose first axis is the rows"
                )
        return columns


@dataclass(frozen=True)
class Stream:
    """The endless, shuffled order of a training set of ``num_samples``."""

    num_samples: int
    seed: int
    order: WindowOrder | None = None
    """How a set that is streamed is shuffled; one in memory is shuffled whole."""

    @classmethod
    def over(cls, dataset: Dataset, seed: int) -> Stream:
        """The stream of a data set."""
        rows = dataset.rows if isinstance(dataset, Decoded) else dataset
        return cls(len(dataset), seed, rows.order if isinstance(rows, StreamingDataset) else None)

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Indices of the samples at stream positions ``start`` to ``start + count``, shape ``[count]``."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            part = self.rest(start)[:count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def rest(self, start: int) -> NDArray[np.int64]:
        """Indices of the samples at ``start`` and after it, to the end of the window, or else of the epoch."""
        epoch, offset = divmod(start, self.num_samples)
        if self.order is not None:
            return self.order.rest_of_window(self.seed, epoch, offset)
        return _shuffle(self.num_samples, self.seed, epoch)[offset:]

    def micro_batches(self, start: int, layout: Layout, rank: int) -> list[NDArray[np.int64]]:
        """Worker ``rank``'s part of the global batch at ``start``: ``accumulation`` arrays of ``[micro_batch]``."""
        mine = self.indices(start + rank * layout.worker_batch, layout.worker_batch)
        return list(mine.reshape(layout.accumulation, layout.micro_batch))


@dataclass
class Batches:
    """One worker's micro batches, step by step; of Parquet that is streamed or decoded, the next are made meanwhile.

    What is made ahead is only ever the answer to a question asked early: a change of layout asks anew.
    """

    dataset: Dataset
    seed: int
    rank: int
    data: DataConfig
    _made: dict[tuple[int, Layout], list[Future[Columns]]] = field(default_factory=dict, init=False)
    _expected: tuple[int, int, Layout] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.stream = Stream.over(self.dataset, self.seed)
        self._streaming = self.stream.order is not None
        self._ahead = self.data.ahead if isinstance(self.dataset, Decoded | StreamingDataset) else 0
        self._pool = ThreadPoolExecutor(self.data.threads, thread_name_prefix="batches") if self._ahead else None

    def at(self, start: int, layout: Layout) -> list[Columns]:
        """The micro batches of the step at stream position ``start``.

        Raises:
            DataError: a row group cannot be read, or the job's decode function returns what is no batch.
            StorageUnavailableError: the bytes did not come.
        """
        self._expect(start, layout)
        if self._pool is None:
            return [self.dataset.take(positions) for positions in self._positions(start, layout)]
        wanted = [(start + step * layout.global_batch, layout) for step in range(self._ahead + 1)]
        for key in [key for key in self._made if key not in wanted]:
            for future in self._made.pop(key):
                future.cancel()
        for key in wanted:
            if key not in self._made:
                self._made[key] = [self._pool.submit(self.dataset.take, p) for p in self._positions(*key)]
        return [future.result() for future in self._made.pop(wanted[0])]

    @property
    def skipped_samples(self) -> int:
        """Samples of row groups that this worker could not read, counted when they were first met."""
        return int(getattr(self.dataset, "skipped_samples", 0))

    def _positions(self, start: int, layout: Layout) -> list[NDArray[np.int64]]:
        return self.stream.micro_batches(start, layout, self.rank)

    def _expect(self, start: int, layout: Layout) -> None:
        """Whenever a step begins in another window: read this worker's part of it, and of the one after its end."""
        rows = self.dataset.rows if isinstance(self.dataset, Decoded) else self.dataset
        if not isinstance(rows, StreamingDataset):
            return
        end = start + layout.global_batch * (1 + self._ahead)
        window_ends = (start + len(self.stream.rest(start)), end + len(self.stream.rest(end)))
        if self._expected == (*window_ends, layout):
            return
        self._expected = (*window_ends, layout)
        until = window_ends[1] + len(self.stream.rest(window_ends[1]))
        indices = self.stream.indices(start, until - start)
        mine = np.arange(len(indices)) // layout.worker_batch % layout.workers == self.rank
        rows.expect(indices[mine])


def share_of(total: int, rank: int, world_size: int) -> range:
    """Worker ``rank``'s contiguous share of ``total`` items; shares differ by at most one and overlap nowhere."""
    base, extra = divmod(total, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


@functools.lru_cache(maxsize=4)
def _shuffle(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Philox is counter-based: its stream for a key is the same on every machine and numpy version.
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)


def _joined(parts: list[Column]) -> Column:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return pa.concat_arrays(parts)
