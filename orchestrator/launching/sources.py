"""What a source of data holds, cut into pieces, and how a piece is read into rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from orchestrator.errors import ConfigError, DataError, did_you_mean

__all__ = ["KINDS", "Kind", "PackRequest", "Piece", "kind_named", "pieces_of", "read_piece"]

Kind = Literal["arrays", "images", "text", "csv"]
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".npy", ".npz"), "arrays"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp"), "images"),
    **dict.fromkeys((".txt", ".md"), "text"),
    ".csv": "csv",
}
KINDS: tuple[Kind, ...] = ("arrays", "images", "text", "csv")
IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")
"""How the files of SUFFIXES begin."""
PIECE_BYTES = 32 * 2**20
DOCUMENT = b"\0"
"""Stands before each text where texts are cut into rows of one length; text holds no zero byte."""


@dataclass(frozen=True)
class PackRequest:
    """What is packed from where to where. ``kind`` None: what the names of the files say."""

    source: str
    destination: str
    kind: Kind | None = None
    length: int | None = None
    """Text: cut into rows of so many bytes (column ``tokens``); None makes a row of each line (column ``text``)."""
    shuffle: bool = True
    """Mix all samples once, so that every row group holds a bit of everything."""
    seed: int = 0
    row_group_bytes: int = 8 * 2**20
    file_bytes: int = 128 * 2**20
    overwrite: bool = False


@dataclass(frozen=True)
class Piece:
    """What one task reads: some files, or rows ``start`` to ``stop`` of arrays; ``labels`` of images, file by file."""

    kind: Kind
    paths: tuple[str, ...]
    labels: tuple[int, ...] = ()
    start: int = 0
    stop: int = 0
    length: int | None = None
    schema: bytes = b""
    """Of the first CSV file, so that all are read alike."""


def kind_named(name: str | None) -> Kind | None:
    """Return the kind of this name; None stays None.

    Raises:
        ConfigError: there is no such kind; the message lists them.
    """
    if name is None:
        return None
    for kind in KINDS:
        if kind == name:
            return kind
    raise ConfigError(f"--as {name!r}; {did_you_mean(name, KINDS)}")


# -- what a source holds -----------------------------------------------------------------------


def pieces_of(request: PackRequest) -> tuple[list[Piece], list[str]]:
    """Look at the source, and return its pieces and, of images, the names of the classes.

    Raises:
        DataError: nothing to pack, things of several kinds, or what cannot be packed; the message names the file.
    """
    source = Path(request.source).expanduser().absolute()
    if "://" in request.source:
        raise DataError(f"{request.source}: sources are files and folders; copy it to one that all machines share")
    if not source.exists():
        raise DataError(f"{request.source}: no such file or folder")
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    kind = request.kind or _kind_of(request.source, files)
    if request.length is not None and kind != "text":
        raise DataError(f"--length is for text, and {request.source} holds {kind}: leave it out")
    chosen = [path for path in files if SUFFIXES.get(path.suffix.lower()) == kind or not source.is_dir()]
    if kind == "text" and not chosen:
        chosen = files  # source code and the like: what is text has many names
    if not chosen:
        wanted = ", ".join(suffix for suffix, its in SUFFIXES.items() if its == kind)
        raise DataError(f"{request.source}: holds no {kind} ({wanted})")
    if kind == "arrays":
        return _arrays(chosen), []
    if kind == "images":
        return _images(source, chosen)
    if kind == "text":
        return [Piece("text", paths, length=request.length) for paths in _bundles(chosen)], []
    return _tables(chosen), []


def _kind_of(source: str, files: Iterable[Path]) -> Kind:
    found = Counter(SUFFIXES[path.suffix.lower()] for path in files if path.suffix.lower() in SUFFIXES)
    if len(found) == 1:
        return next(iter(found))
    what = " and ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "no file of a known kind"
    raise DataError(f"{source}: holds {what}: say which to pack with --as, one of {', '.join(KINDS)}")


def _arrays(files: list[Path]) -> list[Piece]:
    """``.npy`` files are columns of the same samples; each ``.npz`` holds all columns of its own."""
    columns = [path for path in files if path.suffix == ".npy"]
    shards = [path for path in files if path.suffix == ".npz"]
    if columns and shards:
        raise DataError(f"{files[0].parent}: holds .npy and .npz files: pack one or the other")
    pieces: list[Piece] = []
    for paths in [tuple(map(str, columns))] if columns else [(str(path),) for path in shards]:
        arrays = _load(paths)
        rows = {name: len(array) for name, array in arrays.items()}
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise DataError(f"{Path(paths[0]).parent}: its arrays have different numbers of rows: {listed}")
        total, size = next(iter(rows.values())), sum(array.nbytes for array in arrays.values())
        step = max(1, total * PIECE_BYTES // max(size, 1))
        pieces += [Piece("arrays", paths, start=n, stop=min(n + step, total)) for n in range(0, total, step)]
    return pieces


def _load(paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Arrays by name: of ``.npy`` files in place on the disk, of a ``.npz`` in memory."""
    arrays: dict[str, NDArray[Any]] = {}
    for path in map(Path, paths):
        try:
            # Pickled objects could run code: numbers need none.
            loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
            arrays |= {path.stem: loaded} if path.suffix == ".npy" else dict(loaded)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as an array ({str(error).splitlines()[0]})") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise DataError(
                f"{paths[0]}: array {name!r} holds {array.dtype}{list(array.shape)}: rows of numbers are wanted"
            )
    return arrays


def _images(source: Path, files: list[Path]) -> tuple[list[Piece], list[str]]:
    """The class of an image is the folder it lies in, directly below the source."""
    classes = sorted({path.relative_to(source).parts[0] for path in files if len(path.relative_to(source).parts) > 1})
    loose = [path for path in files if len(path.relative_to(source).parts) == 1]
    if classes and loose:
        raise DataError(f"{loose[0]}: lies outside the folders of the classes {', '.join(classes)}: move it into one")
    numbers = {name: number for number, name in enumerate(classes)}
    pieces = []
    for paths in _bundles(files):
        labels = tuple(numbers[Path(path).relative_to(source).parts[0]] for path in paths) if classes else ()
        pieces.append(Piece("images", paths, labels))
    return pieces, classes


def _tables(files: list[Path]) -> list[Piece]:
    try:
        with pa_csv.open_csv(files[0]) as reader:
            schema = reader.schema
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]}: cannot be read as CSV ({str(error).splitlines()[0]})") from None
    return [Piece("csv", (str(path),), schema=schema.serialize().to_pybytes()) for path in files]


def _bundles(files: list[Path]) -> Iterator[tuple[str, ...]]:
    """Files in order, so many at once that a task has something to do."""
    bundle: list[str] = []
    size = 0
    for path in files:
        bundle.append(str(path))
        size += path.stat().st_size
        if size >= PIECE_BYTES:
            yield tuple(bundle)
            bundle, size = [], 0
    if bundle:
        yield tuple(bundle)


# -- reading a piece, in a task ----------------------------------------------------------------


def read_piece(piece: Piece) -> Iterator[pa.Table]:
    """Yield the rows of a piece.

    Raises:
        DataError: a file is not what its name says; the message names it.
    """
    if piece.kind == "arrays":
        arrays = _load(piece.paths)
        yield pa.table({name: _fixed(array[piece.start : piece.stop]) for name, array in arrays.items()})
    elif piece.kind == "images":
        columns: dict[str, Any] = {"image": pa.array([_image(path) for path in piece.paths], pa.binary())}
        if piece.labels:
            columns["label"] = pa.array(piece.labels, pa.int64())
        yield pa.table(columns)
    elif piece.kind == "text":
        yield _text(piece)
    else:
        yield from _csv(piece)


def _fixed(array: NDArray[Any]) -> pa.Array:
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    for width in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, width)
    return values


def _image(path: str) -> bytes:
    data = Path(path).read_bytes()
    if not data.startswith(IMAGES):
        raise DataError(f"{path}: does not begin as an image does; remove it from the source")
    return data


def _text(piece: Piece) -> pa.Table:
    texts = [Path(path).read_bytes() for path in piece.paths]
    for path, text in zip(piece.paths, texts, strict=True):
        if DOCUMENT in text:
            raise DataError(f"{path}: holds a zero byte, which text does not; remove it from the source")
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert it, or remove it") from None
    if piece.length is None:
        return pa.table({"text": pa.array([line.decode() for text in texts for line in text.splitlines() if line])})
    stream = np.frombuffer(b"".join(DOCUMENT + text for text in texts), dtype=np.uint8)
    rows = len(stream) // piece.length
    return pa.table({"tokens": _fixed(stream[: rows * piece.length].reshape(rows, piece.length))})


def _csv(piece: Piece) -> Iterator[pa.Table]:
    (path,) = piece.paths
    schema = pa.ipc.read_schema(pa.py_buffer(piece.schema))
    options = pa_csv.ConvertOptions(column_types=schema, include_columns=schema.names)
    try:
        with pa_csv.open_csv(path, convert_options=options) as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch])
                for name in table.column_names:
                    if nulls := table[name].null_count:
                        raise DataError(f"{path}: column {name!r} has {nulls} empty values; fill or drop them first")
                yield table
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(f"{path}: does not fit the first file's columns ({str(error).splitlines()[0]})") from None
