"""What a Parquet data set holds, how a run would read it, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.config import DataConfig, StorageConfig
from orchestrator.errors import DataError
from orchestrator.training.data import IN_MEMORY_BYTES
from orchestrator.training.parquet import ParquetFiles, kind_of, readable

__all__ = ["Inspection", "inspect"]

LARGE_BYTES = 128 * 2**20
"""A row group from here on makes a window that a worker may not have the memory for."""


@dataclass(frozen=True)
class Inspection:
    """The findings; ``problems`` would stop a run, ``advice`` would not."""

    uri: str
    files: int
    row_groups: int
    rows: int
    size_bytes: int
    """Uncompressed."""
    largest_row_group_bytes: int
    columns: dict[str, str]
    """What each column holds, as ``Parquet(columns=...)`` takes it."""
    held: str
    """How a run with the default config reads it: in memory, or streaming."""
    verified: bool
    """Whether every row group was read."""
    problems: tuple[str, ...]
    advice: tuple[str, ...]


def inspect(
    uri: str, storage: StorageConfig, *, verify: bool = True, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Read the footers of ``uri``, and with ``verify`` every row group; ``progress`` is told how many of how many.

    Raises:
        DataError: there is no such data, or a footer cannot be read.
        StorageError: the place cannot be reached, or refuses.
    """
    files = ParquetFiles.open(uri, (), storage)
    problems = tuple(_problems(files, progress)) if verify else ()
    largest = max(group.size_bytes for group in files.groups)
    return Inspection(
        uri=uri,
        files=len(files.paths),
        row_groups=len(files.groups),
        rows=files.num_rows,
        size_bytes=files.size_bytes,
        largest_row_group_bytes=largest,
        columns={name: kind_of(files.schema.field(name).type) for name in files.names},
        held="in memory" if files.size_bytes <= IN_MEMORY_BYTES else "streaming",
        verified=verify,
        problems=problems,
        advice=tuple(_advice(files, largest)),
    )


def _problems(files: ParquetFiles, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    def problem_of(index: int) -> str | None:
        try:
            files.read(index)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(DataConfig().threads, thread_name_prefix="inspect") as pool:
        for done, problem in enumerate(pool.map(problem_of, range(len(files.groups))), start=1):
            if progress is not None:
                progress(done, len(files.groups))
            if problem is not None:
                yield problem


def _advice(files: ParquetFiles, largest: int) -> Iterator[str]:
    for name in files.names:
        try:
            readable(files.uri, files.schema, [name], decoded=False)
        except DataError:
            kind = kind_of(files.schema.field(name).type)
            yield f"column {name!r} holds {kind}: leave it out with Parquet(columns=...), or decode it"
    if largest > LARGE_BYTES:
        yield (
            f"the largest row group has {largest / 2**20:.0f} MiB, and a worker that streams holds twice "
            f"{DataConfig().window} of them: write smaller ones (`orchestrator data pack`), or set data.window"
        )
