"""Parquet files as a list of row groups, and a row group as columns of numpy or Arrow arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from orchestrator.config import StorageConfig
from orchestrator.errors import CorruptDataError, DataError, StorageUnavailableError, did_you_mean
from orchestrator.storage.filesystem import storage_filesystem
from orchestrator.storage.store import is_s3, open_store
from orchestrator.storage.tally import REQUESTS

__all__ = ["PACKING", "ParquetFiles", "RowGroup", "gather", "kind_of", "num_rows", "readable"]

Column: TypeAlias = NDArray[Any] | pa.Array
"""Numbers as numpy arrays whose first axis is the rows; bytes, text and lists of any length as Arrow arrays."""

PACKING = "_packing"
"""Lies in a folder of files while they are being written."""
FOOTERS_AT_ONCE = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowGroup:
    """One row group: its file and its number in that, both from 0, its rows, and its size uncompressed."""

    file: int
    number: int
    rows: int
    size_bytes: int


@dataclass(frozen=True)
class ParquetFiles:
    """Files with the same columns, and all their row groups in the order of the files' names."""

    uri: str
    paths: tuple[str, ...]
    """As a user would write them."""
    names: tuple[str, ...]
    """The columns that are read."""
    schema: pa.Schema
    groups: tuple[RowGroup, ...]
    _filesystem: fs.FileSystem = field(repr=False)
    _footers: tuple[pq.FileMetaData, ...] = field(repr=False)

    @classmethod
    def open(cls, uri: str, columns: Sequence[str] | Mapping[str, str], storage: StorageConfig) -> ParquetFiles:
        """Find the files, read their footers, and compare their columns with each other and with ``columns``.

        Raises:
            DataError: missing, empty or corrupt files, a column that is not there or holds something else.
            StorageError: the place cannot be reached, or refuses.
        """
        paths = tuple(_find(uri, storage))
        filesystem, _ = storage_filesystem(uri, storage)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="footers") as pool:
            footers = tuple(pool.map(lambda path: _footer(filesystem, path), paths))
        schemas = [footer.schema.to_arrow_schema().remove_metadata() for footer in footers]
        names = tuple(columns) or tuple(schemas[0].names)
        for path, schema in zip(paths, schemas, strict=True):
            _compare(path, schema, names, (paths[0], schemas[0]))
        if isinstance(columns, Mapping):
            _check_kinds(paths[0], schemas[0], columns)
        groups = tuple(_groups(footers, names))
        if not sum(group.rows for group in groups):
            raise DataError(f"{uri}: holds no rows; check the step that wrote it")
        return cls(uri, paths, names, schemas[0], groups, filesystem, footers)

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(group.rows for group in self.groups)

    @property
    def size_bytes(self) -> int:
        """Size of the columns that are read, uncompressed."""
        return sum(group.size_bytes for group in self.groups)

    def label(self, index: int) -> str:
        """Name a row group as a user can find it."""
        group = self.groups[index]
        return f"{self.paths[group.file]}, row group {group.number}"

    def read(self, index: int) -> dict[str, Column]:
        """Read one row group.

        Raises:
            CorruptDataError: its bytes are not what they should be; the message names file and row group.
            DataError: it holds nulls.
            StorageUnavailableError: the bytes did not come.
        """
        group = self.groups[index]
        path = _inner(self.paths[group.file])
        try:
            with self._filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(
                    source, metadata=self._footers[group.file], pre_buffer=True, page_checksum_verification=True
                )
                table = file.read_row_group(group.number, columns=list(self.names), use_threads=False)
            table.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            explained = _explained(self.label(index), error)
            if isinstance(explained, StorageUnavailableError):
                REQUESTS.failed("read")
            raise explained from None
        if table.num_rows != group.rows:
            raise CorruptDataError(f"{self.label(index)}: holds {table.num_rows} rows and not {group.rows}")
        return {name: _to_column(self.label(index), name, table[name]) for name in self.names}


# -- finding files -----------------------------------------------------------------------------


def _find(uri: str, storage: StorageConfig) -> Iterator[str]:
    if not is_s3(uri):
        yield from _find_local(uri)
        return
    parent, _, name = uri.rstrip("/").rpartition("/")
    if uri.endswith(".parquet") and parent != "s3:/" and open_store(parent, storage).stat(name):
        yield uri
        return
    store = open_store(uri, storage)
    keys = [entry.key for entry in store.list()]
    _refuse_unfinished(uri, keys)
    found = sorted((key for key in keys if key.endswith(".parquet")), key=lambda key: key.split("/"))
    if not found:
        raise DataError(f"{uri}: no *.parquet object below this prefix")
    yield from (f"{store.uri}/{key}" for key in found)


def _find_local(uri: str) -> list[str]:
    if "://" in uri and not uri.startswith("file://"):
        raise DataError(f"{uri}: Parquet is read from folders and from s3://BUCKET/PREFIX")
    path = Path(uri.removeprefix("file://")).expanduser()
    if not path.exists():
        raise DataError(f"{uri}: no such file or folder; write the data first, or correct the job's data argument")
    if not path.is_dir():
        return [str(path)]
    _refuse_unfinished(uri, [name.name for name in path.iterdir()])
    files = sorted(path.glob("**/*.parquet"), key=lambda file: file.parts)
    if not files:
        raise DataError(f"{uri}: no *.parquet file in this folder")
    return [str(file) for file in files]


def _refuse_unfinished(uri: str, keys: list[str]) -> None:
    if PACKING in keys:
        raise DataError(
            f"{uri}: is being packed, or packing it was cut off: wait for it, or pack it again with --overwrite"
        )


def _inner(path: str) -> str:
    """The path as its filesystem knows it."""
    return path.removeprefix("s3://") if is_s3(path) else str(Path(path).absolute())


# -- footers -----------------------------------------------------------------------------------


def _footer(filesystem: fs.FileSystem, path: str) -> pq.FileMetaData:
    try:
        with filesystem.open_input_file(_inner(path)) as source:
            return pq.read_metadata(source)
    except (OSError, pa.ArrowException) as error:
        raise _explained(path, error) from None


def _explained(where: str, error: Exception) -> DataError | StorageUnavailableError:
    """Tell bytes that did not come from bytes that came and are wrong."""
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "AWS Error" in first_line or "HTTP response" in first_line:
        return StorageUnavailableError(f"{where}: cannot be fetched ({first_line})")
    if isinstance(error, OSError) and error.errno is not None:
        return StorageUnavailableError(f"{where}: cannot be read ({error.strerror or first_line})")
    return CorruptDataError(f"{where}: cannot be read as Parquet ({first_line}); write it again")


def _groups(footers: Sequence[pq.FileMetaData], names: Sequence[str]) -> Iterator[RowGroup]:
    for file, footer in enumerate(footers):
        wanted = [n for n in range(footer.num_columns) if footer.schema.column(n).path.partition(".")[0] in names]
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            size = sum(group.column(n).total_uncompressed_size for n in wanted)
            if group.num_rows:
                yield RowGroup(file, number, group.num_rows, size)


def _compare(path: str, schema: pa.Schema, names: Sequence[str], first: tuple[str, pa.Schema]) -> None:
    for name in names:
        if name not in schema.names:
            raise DataError(f"{path}: no column {name!r}; {did_you_mean(name, schema.names)}")
        here, there = kind_of(schema.field(name).type), kind_of(first[1].field(name).type)
        if here != there:
            raise DataError(
                f"{path}: column {name!r} holds {here}, and {there} in {first[0]}; write them again with the same types"
            )


def _check_kinds(path: str, schema: pa.Schema, columns: Mapping[str, str]) -> None:
    for name, wanted in columns.items():
        kind = kind_of(schema.field(name).type)
        if kind != wanted.replace(" ", ""):
            raise DataError(
                f"{path}: column {name!r} holds {kind}, and the task wants {wanted}; write it again, or correct "
                "Parquet(columns=...)"
            )


def kind_of(kind: pa.DataType) -> str:
    """Name a type as a user would: ``uint8[3,32,32]``, ``float32``, ``bytes``, ``text``, ``int32[]``."""
    axes: list[str] = []
    while pa.types.is_fixed_size_list(kind):
        axes.append(str(kind.list_size))
        kind = kind.value_type
    shape = f"[{','.join(axes)}]" if axes else ""
    if _is_list(kind):
        return f"{kind_of(kind.value_type)}[]{shape}"
    names = {"double": "float64", "float": "float32", "halffloat": "float16"}
    if _is_bytes(kind) or _is_text(kind):
        return ("bytes" if _is_bytes(kind) else "text") + shape
    return names.get(str(kind), str(kind)) + shape


def readable(uri: str, schema: pa.Schema, names: Sequence[str], *, decoded: bool) -> None:
    """Refuse columns that cannot become tensors, or with a decode function cannot be handed to it.

    Raises:
        DataError: names column and type.
    """
    for name in names:
        kind = inner = schema.field(name).type
        while pa.types.is_fixed_size_list(inner):
            inner = inner.value_type
        is_number = pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)
        for_decode = kind == inner and (_is_bytes(kind) or _is_text(kind) or _is_list(kind))
        if not is_number and not (decoded and for_decode):
            raise DataError(
                f"{uri}: column {name!r} holds {kind_of(kind)}, and a tensor holds numbers: write it as numbers or "
                "fixed-size lists of them, name the columns to read in Parquet(columns=...), or give Parquet a decode "
                "function for bytes, text and lists"
            )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


# -- columns -----------------------------------------------------------------------------------


def _to_column(where: str, name: str, column: pa.ChunkedArray) -> Column:
    values = column.combine_chunks()
    shape, nulls = [len(column)], column.null_count
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
        nulls += values.null_count
    if nulls:
        raise DataError(f"{where}: column {name!r} has {nulls} nulls; fill or drop them first")
    if _is_text(values.type) or _is_bytes(values.type):
        return values.cast(pa.large_binary())
    if _is_list(values.type):
        return values
    array = values.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(array.reshape(shape))


def num_rows(columns: Mapping[str, Column]) -> int:
    """Rows of a row group's columns."""
    return len(next(iter(columns.values())))


def gather(parts: Sequence[tuple[Mapping[str, Column], NDArray[np.int64], NDArray[np.int64]]]) -> dict[str, Any]:
    """Put rows of several row groups into one array per column.

    Each of ``parts`` is a row group's columns, which of its rows to take, and where each goes in the result. Arrow
    arrays become object arrays.
    """
    total = sum(len(rows) for _, rows, _ in parts)
    result: dict[str, NDArray[Any]] = {}
    for name, like in parts[0][0].items():
        is_numpy = isinstance(like, np.ndarray)
        shape = (total, *like.shape[1:]) if is_numpy else (total,)
        result[name] = np.empty(shape, dtype=like.dtype if is_numpy else object)
        for columns, rows, places in parts:
            column = columns[name]
            result[name][places] = column[rows] if is_numpy else _objects(column.take(pa.array(rows)))
    return result


def _objects(array: pa.Array) -> NDArray[Any]:
    found = np.empty(len(array), dtype=object)
    found[:] = array.to_numpy(zero_copy_only=False) if len(array) else []
    return found
