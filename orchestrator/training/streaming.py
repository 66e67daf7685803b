"""Parquet larger than memory: an order that any position can be looked up in, and row groups read before their turn.

The order is a function of seed and epoch alone. An epoch shuffles the row groups, cuts them into windows of a fixed
number, and shuffles the samples of each window. Any window can be computed without those before it, so the order can be
taken up anywhere; what a worker holds is the window it is in and the next.

With more than one lane, a window's row groups are dealt to lanes, each lane is shuffled for itself, and each block of
as many positions as the reference batch takes its share of every lane in turn. So where there are as many lanes as
workers, and the batch is the reference batch, a worker's slice of every batch lies in one lane, or in two, and it reads
that part of the data alone. The order still knows nothing of workers: another number of them reads more, not otherwise.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import CorruptDataError
from orchestrator.training.parquet import Column, ParquetFiles, gather, log, num_rows

__all__ = ["RowGroups", "StreamingDataset", "WindowOrder"]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class WindowOrder:
    """The order of the samples of row groups of these ``sizes``; a sample's index counts through the files."""

    sizes: tuple[int, ...]
    window: int
    lanes: int
    block: int
    """Positions in which every lane has its share."""

    def rest_of_window(self, seed: int, epoch: int, offset: int) -> Indices:
        """Indices of the samples at ``offset`` of the epoch and after it, to the end of the window it lies in."""
        ends = _window_ends(self, seed, epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        return _window(self, seed, epoch, number)[offset - start :]

    def groups_of(self, indices: Indices) -> Indices:
        """Row group of each sample."""
        return np.searchsorted(_ends(self.sizes), indices, side="right")

    def located(self, indices: Indices) -> tuple[Indices, Indices]:
        """Row group of each sample, and its row in that."""
        groups = self.groups_of(indices)
        return groups, indices - (_ends(self.sizes) - np.asarray(self.sizes))[groups]


def _random(seed: int, epoch: int, stream: int) -> np.random.Generator:
    # Counter-based: the same on every machine and numpy version. Each window has a stream of its own.
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


@functools.lru_cache(maxsize=8)
def _ends(sizes: tuple[int, ...]) -> Indices:
    return np.cumsum(sizes)


@functools.lru_cache(maxsize=8)
def _group_order(order: WindowOrder, seed: int, epoch: int) -> Indices:
    return _random(seed, epoch, 1).permutation(len(order.sizes))


@functools.lru_cache(maxsize=8)
def _window_ends(order: WindowOrder, seed: int, epoch: int) -> Indices:
    """Where each window of the epoch ends."""
    ends = np.cumsum(np.asarray(order.sizes)[_group_order(order, seed, epoch)])
    return np.append(ends[order.window - 1 : -1 : order.window], ends[-1])


@functools.lru_cache(maxsize=8)
def _window(order: WindowOrder, seed: int, epoch: int, number: int) -> Indices:
    groups = _group_order(order, seed, epoch)[number * order.window : (number + 1) * order.window]
    ends, random = _ends(order.sizes), _random(seed, epoch, 2 + number)
    lanes = [
        random.permutation(np.concatenate([np.arange(ends[g] - order.sizes[g], ends[g]) for g in lane]))
        for lane in np.array_split(groups, min(order.lanes, len(groups)))
    ]
    if len(lanes) == 1:
        return lanes[0]
    # Sample i of a lane of m lies at the share (i + 1/2) / m of the window; whole numbers, so exact everywhere.
    total = sum(map(len, lanes))
    blocks = [(2 * np.arange(len(lane)) + 1) * total // (2 * len(lane) * order.block) for lane in lanes]
    return np.concatenate(lanes)[np.argsort(np.concatenate(blocks), kind="stable")]


class RowGroups:
    """Reads row groups in threads, and keeps those that are wanted.

    A row group that cannot be read stops the run, or with ``skip`` is counted in ``skipped`` and filled with the rows
    of the next one that can, whatever the workers: so the order and its length stay what they are.
    """

    def __init__(self, files: ParquetFiles, *, threads: int, skip: bool) -> None:
        self.files = files
        self.skipped: dict[int, int] = {}
        self._skip = skip
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row-groups")
        self._lock = threading.Lock()
        self._held: dict[int, Future[dict[str, Column]]] = {}

    def want(self, groups: Sequence[int]) -> None:
        """Read these, in this order, and let go of all others."""
        wanted = set(groups)
        with self._lock:
            for group in [group for group in self._held if group not in wanted]:
                self._held.pop(group).cancel()
            for group in groups:
                self._begin(group)

    def get(self, groups: Iterable[int]) -> dict[int, dict[str, Column]]:
        """Return the columns of these row groups, reading what is not there.

        Raises:
            CorruptDataError: one of them, and none is skipped.
            StorageUnavailableError: the bytes did not come.
        """
        with self._lock:
            futures = {group: self._begin(group) for group in groups}
        return {group: future.result() for group, future in futures.items()}

    @property
    def held(self) -> set[int]:
        """The row groups in memory or on their way there."""
        with self._lock:
            return set(self._held)

    def _begin(self, group: int) -> Future[dict[str, Column]]:
        future = self._held.get(group)
        if future is None or future.cancelled() or (future.done() and future.exception() is not None):
            future = self._held[group] = self._pool.submit(self._read, group)
        return future

    def _read(self, group: int) -> dict[str, Column]:
        try:
            return self.files.read(group)
        except CorruptDataError as error:
            if not self._skip:
                raise
            rows = self.files.groups[group].rows
            self.skipped[group] = rows
            log.warning("skipped %d samples: %s", rows, error)
            return self._instead_of(group, rows, error)

    def _instead_of(self, group: int, rows: int, error: CorruptDataError) -> dict[str, Column]:
        count = len(self.files.groups)
        for other in ((group + step) % count for step in range(1, count)):
            try:
                columns = self.files.read(other)
            except CorruptDataError:
                continue
            taken = np.arange(rows) % num_rows(columns)
            return {name: column.take(taken) for name, column in columns.items()}
        raise CorruptDataError(f"{error}; and no other row group can be read")


class StreamingDataset:
    """A ``Dataset`` of which only some row groups are in memory."""

    def __init__(self, groups: RowGroups, order: WindowOrder) -> None:
        self.groups = groups
        self.order = order
        self._told = False

    def __len__(self) -> int:
        return self.groups.files.num_rows

    @property
    def skipped_samples(self) -> int:
        """Samples of row groups that could not be read, as far as this process has met them."""
        return sum(self.groups.skipped.values())

    def expect(self, indices: Indices) -> None:
        """Say which samples come next, in their order; their row groups are read ahead, and no others are kept."""
        self._told = True
        groups, first = np.unique(self.order.groups_of(indices), return_index=True)
        self.groups.want(groups[np.argsort(first)].tolist())

    def take(self, positions: Indices) -> dict[str, NDArray[Any]]:
        """Rows at ``positions``, in that order.

        Raises:
            DataError: see ``RowGroups.get``.
        """
        groups, rows = self.order.located(positions)
        needed = np.unique(groups)
        if not self._told:  # read from front to back, as in evaluation: the next one is read ahead
            following = range(int(needed[-1]) + 1, min(int(needed[-1]) + 2, len(self.order.sizes)))
            self.groups.want([*needed.tolist(), *following])
        columns = self.groups.get(needed.tolist())
        parts = [(columns[int(group)], rows[groups == group], np.flatnonzero(groups == group)) for group in needed]
        return gather(parts)
