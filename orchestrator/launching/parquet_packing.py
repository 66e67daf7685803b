"""Packing data into Parquet: Ray Data reads a source's pieces, shuffles their rows and writes the files."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchestrator.config import StorageConfig
from orchestrator.errors import DataError, OrchestratorError, RunError, StorageError
from orchestrator.launching.cluster import RayCluster, address_of
from orchestrator.launching.sources import PackRequest, Piece, pieces_of, read_piece
from orchestrator.storage.store import Store, open_store
from orchestrator.training.parquet import PACKING

__all__ = ["pack"]

WATCH_S = 1.0
OURS = re.compile(r"part-\d{5,}\.parquet|classes\.json")


def pack(
    request: PackRequest,
    storage: StorageConfig,
    *,
    address: str | None = None,
    progress: Callable[[int, None, int], None] | None = None,
) -> list[str]:
    """Pack, and return the names of the classes, if any; ``progress`` is told the files and bytes written so far.

    Nobody reads the destination before all of it is there, and of two who pack to it one is refused.

    Raises:
        DataError: see ``pieces_of``; or there is data at the destination already.
        StorageError: the destination cannot be written.
        ClusterError: there is no such cluster.
        RunError: a task failed for another reason.
    """
    pieces, classes = pieces_of(request)
    store = open_store(request.destination, storage)
    _claim(store, request.overwrite)
    try:
        _write(pieces, request, storage, address, store, progress)
        if classes:
            store.write("classes.json", json.dumps(classes, indent=1).encode())
    except BaseException:
        _clear(store)
        store.delete(PACKING)
        raise
    store.delete(PACKING)
    return classes


def _claim(store: Store, overwrite: bool) -> None:
    """Make the mark that says that this is being written; what was packed here before goes."""
    found = [entry.key for entry in store.list() if entry.key.endswith(".parquet")]
    foreign = [key for key in found if not OURS.fullmatch(key)]
    if foreign or (found and not overwrite):
        remedy = "choose another destination" + ("" if foreign else ", or give --overwrite")
        raise DataError(f"{store.uri}: holds Parquet already ({(foreign or found)[0]}): {remedy}")
    if not store.put_if_absent(PACKING, secrets.token_hex(8).encode()) and not overwrite:
        raise DataError(
            f"{store.uri}: is being packed by another process, or packing it was cut off: wait for it, or give "
            "--overwrite"
        )
    _clear(store)


def _clear(store: Store) -> None:
    store.delete(*[entry.key for entry in store.list() if OURS.fullmatch(entry.key)])


def _write(
    pieces: list[Piece],
    request: PackRequest,
    storage: StorageConfig,
    address: str | None,
    store: Store,
    progress: Callable[[int, None, int], None] | None,
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="orchestrator-pack-") as folder,
        RayCluster.connect(address_of(address), log=Path(folder) / "ray.log"),
    ):
        import ray.data

        from orchestrator.launching.part_sink import PartSink

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True  # the same source and seed make the same files
        items = ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=len(pieces))
        rows = items.map_batches(_read_batch, batch_size=1)
        if request.shuffle:
            rows = rows.random_shuffle(seed=request.seed)
        sink = PartSink(store.uri, storage, request.row_group_bytes, request.file_bytes)
        with _watching(store, progress):
            try:
                rows.write_datasink(sink)
            except Exception as error:  # noqa: BLE001 - Ray wraps what a task raised in types of its own
                raise _own(error) from None


def _read_batch(batch: dict[str, Any]) -> Iterator[pa.Table]:
    for piece in batch["piece"]:
        yield from read_piece(piece)


@contextlib.contextmanager
def _watching(store: Store, progress: Callable[[int, None, int], None] | None) -> Iterator[None]:
    """Tell ``progress`` now and then what has been written."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_S):
            with contextlib.suppress(StorageError):
                parts = [entry for entry in store.list() if entry.key.endswith(".parquet")]
                if progress is not None:
                    progress(len(parts), None, sum(part.size_bytes for part in parts))

    watcher = threading.Thread(target=watch, name="packing-progress")
    if progress is not None:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if progress is not None:
            watcher.join()


def _own(error: BaseException) -> OrchestratorError:
    """The task's own error, where it is one of ours."""
    seen: Any = error
    while seen is not None:
        if isinstance(seen, OrchestratorError) and not hasattr(seen, "cause"):  # Ray's is of the task's type as well
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    first = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return RunError(f"packing failed: {first.strip()}")
