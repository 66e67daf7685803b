"""Checkpoints in a store: written to this machine's disk, uploaded while training goes on, verified on their way back.

A save holds training up for as long as a copy of the shards in host memory takes. A thread of each rank writes them to
the local disk, uploads them, and leaves a note of what it has uploaded, with sizes and SHA-256; rank 0 gathers the
notes and writes the manifest last. One save is under way at a time: the next one waits for it. While the store fails,
training goes on and the upload is tried again, until ``failures.storage_budget_s`` is spent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from orchestrator.errors import (
    CheckpointError,
    NotFoundError,
    OrchestratorError,
    StorageError,
    StorageLostError,
    explain_oserror,
)
from orchestrator.storage.claim import StoreFence
from orchestrator.storage.stored_run import CHECKPOINTS, MANIFEST, PARTS, StoredRun
from orchestrator.storage.tree import upload_tree
from orchestrator.training.checkpoint import (
    load_into,
    needed_by,
    raise_together,
    rank_files,
    read_manifest,
    sealed_manifest,
    superseded,
    take_shards,
    verify,
)
from orchestrator.training.engine import Engine
from orchestrator.training.snapshot import Snapshot
from orchestrator.training.state import TrainState

__all__ = ["StoredCheckpoints", "Witness"]

Done = TypeVar("Done")

PAUSE_S = 2.0
LOOK_S = 0.3


class Witness(Protocol):
    """Hears what becomes of checkpoints while training goes on; called from another thread."""

    def checkpoint_whole(self, size_bytes: int, duration_s: float) -> None: ...
    def checkpoint_trouble(self, text: str) -> None: ...
    def event(self, kind: str, text: str) -> None: ...


@dataclass(frozen=True)
class _Save:
    """A save under way: the local ``folder`` that it goes by way of, and what the manifest will say."""

    name: str
    folder: Path
    state: TrainState
    began: float


class StoredCheckpoints:
    """The checkpoints of one run in a store, as seen from one worker. See ``checkpoint.Checkpoints`` for the verbs.

    ``root`` is the local folder that the workers of one machine share. ``flush`` brings the records to the store, so
    that they are there up to each checkpoint. ``budget_s``: for how long the store may fail. ``room`` tells how many
    bytes of host memory this rank may take for a copy; what finds no room goes to the disk before training goes on.
    """

    def __init__(
        self,
        run: StoredRun,
        root: Path,
        fence: StoreFence,
        layout_key: dict[str, Any],
        *,
        keep: int,
        budget_s: float,
        flush: Callable[[], None],
        witness: Witness,
        room: Callable[[], int],
    ) -> None:
        self.fence = fence
        self._run = run
        self._root = root
        self._layout_key = layout_key
        self._keep = keep
        self._budget_s = budget_s
        self._flush = flush
        self._witness = witness
        self._snapshot = Snapshot(room)
        self._thread: threading.Thread | None = None
        self._error: OrchestratorError | None = None
        self._newest: str | None = None

    # -- restoring -----------------------------------------------------------------------------

    def restore(self, engine: Engine) -> TrainState | None:
        """See ``Checkpoints.restore``; what this machine's disk holds already is not downloaded again.

        Raises:
            CheckpointError: none of those that are there is whole, or it was saved in another precision.
            StorageError: see ``Store``.
        """
        names: list[Any] = [self._run.checkpoints() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(names, src=0)
        problem = ""
        for name in reversed(names[0]):
            try:
                folder = self._fetch(name)
            except CheckpointError as error:
                problem = problem or str(error)
                if dist.get_rank() == 0:
                    self.fence.refresh()
                    with contextlib.suppress(NotFoundError):
                        self._witness.event(
                            "checkpoint_set_aside", f"{error}; set aside as {self._run.set_aside(name)}"
                        )
                dist.barrier()
            else:
                self._newest = name
                return load_into(engine, folder, read_manifest(folder), self._layout_key)
        if problem:
            raise CheckpointError(f"{problem}; no other is left: start anew with --fresh")
        return None

    def _fetch(self, name: str) -> Path:
        """Bring what this machine's ranks need of the checkpoint here and verify that, each of them a part."""
        folder = self._root / name
        folder.mkdir(parents=True, exist_ok=True)
        here = self._ranks_here(folder)
        part, parts = here.index(dist.get_rank()), len(here)
        needs = functools.partial(needed_by, frozenset(here), self._layout_key)
        error = ""
        try:
            self._run.download(name, folder, part=part, parts=parts, needs=needs)
        except CheckpointError as found:
            error = f"checkpoint {self._run.uri}/{CHECKPOINTS}{name}: {found}"
        raise_together(error)
        try:
            verify(folder, part=part, parts=parts, needs=needs)
        except CheckpointError as found:
            error = str(found).replace(str(folder), f"{self._run.uri}/{CHECKPOINTS}{name}")
        raise_together(error)
        return folder

    def _ranks_here(self, folder: Path) -> list[int]:
        """Which ranks see the same ``folder``, by a mark that each leaves in it."""
        mark = f".here-{self.fence.token}-"
        (folder / f"{mark}{dist.get_rank():05d}").touch()
        dist.barrier()
        return sorted(int(path.name.removeprefix(mark)) for path in folder.glob(f"{mark}*"))

    # -- saving --------------------------------------------------------------------------------

    @property
    def uploading(self) -> bool:
        """Whether the last save is still on its way to the store."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what has ended an upload for good, and whether a newer attempt has begun.

        Raises:
            StorageLostError: the store failed for longer than the budget.
            FencedError: a newer attempt owns the run.
        """
        self.fence.check()
        if self._error is not None:
            raise self._error

    def save(self, engine: Engine, state: TrainState) -> None:
        """Take a copy of everything, and begin to write and upload it. All ranks call it; see ``Checkpoints.save``."""
        began = time.monotonic()
        self.finish()
        self.fence.check()
        name = f"step-{state.step:08d}-{self.fence.token}"
        folder = self._root / name
        folder.mkdir(parents=True, exist_ok=True)
        take_shards(engine, folder, self._snapshot)
        _tidy(self._root, keep={name, self._newest})
        self._newest = name
        save = _Save(name, folder, state, began)
        self._thread = threading.Thread(target=self._upload, args=(save,), name="upload", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last save is whole in the store, or has failed for good.

        Raises:
            StorageLostError: the store failed for longer than the budget.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()

    def newest(self) -> str | None:
        """Where the newest checkpoint is."""
        return f"{self._run.uri}/{CHECKPOINTS}{self._newest}" if self._newest else None

    def _upload(self, save: _Save) -> None:
        """In the thread: this rank's part; on rank 0 also what makes the checkpoint exist."""
        try:
            store, prefix = self._run.store, f"{CHECKPOINTS}{save.name}"
            mine = self._snapshot.write()
            if int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0:  # what DeepSpeed writes beside the shards
                mine += [path for path in save.folder.rglob("*") if path.is_file() and path.suffix != ".pt"]
            part = self._insist(functools.partial(upload_tree, store, save.folder, prefix, paths=mine))
            note = json.dumps({file.path: [file.size_bytes, file.sha256] for file in part}).encode()
            self._insist(functools.partial(store.write, f"{prefix}/{PARTS}{dist.get_rank():05d}", note))
            if dist.get_rank() == 0:
                self._commit(save, prefix)
        except OrchestratorError as error:
            self._error = error
        except OSError as error:
            self._error = StorageLostError(f"checkpoint: {explain_oserror(save.folder, error)}")

    def _commit(self, save: _Save, prefix: str) -> None:
        files: dict[str, Any] = {}
        for rank in range(dist.get_world_size()):
            files |= json.loads(self._when_there(f"{prefix}/{PARTS}{rank:05d}"))
        if missing := rank_files() - set(files):
            raise CheckpointError(f"{save.folder}: {', '.join(sorted(missing))} were not written: is the disk full?")
        manifest = sealed_manifest(save.state, self._layout_key, files)
        self._insist(self._flush)
        self._insist(self.fence.refresh)
        text = json.dumps(manifest, indent=2, allow_nan=False).encode()
        self._insist(functools.partial(self._run.store.write, f"{prefix}/{MANIFEST}", text))
        self._witness.checkpoint_whole(sum(size for size, _ in files.values()), time.monotonic() - save.began)
        self._insist(functools.partial(self._prune, prefix))

    def _prune(self, prefix: str) -> None:
        """Remove what the new checkpoint makes superfluous."""
        store = self._run.store
        store.delete(*(entry.key for entry in store.list(f"{prefix}/{PARTS}")))

        def state_of(name: str) -> dict[str, Any]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                state: dict[str, Any] = json.loads(self._run.manifest(name))["state"]
                return state
            return {"best": None}  # damaged since: not worth keeping for what it says

        for name in superseded(self._run.checkpoints(), self._keep, state_of):
            self._run.delete(name)

    def _when_there(self, key: str) -> bytes:
        """Another rank's note, once it is there. A rank that fails ends this process too, by its silence."""
        while True:
            found = self._insist(functools.partial(self._run.read, key))
            if found is not None:
                return found
            time.sleep(LOOK_S)

    def _insist(self, act: Callable[[], Done]) -> Done:
        """Do it until it works: a store that fails may be well again in a minute.

        Raises:
            StorageLostError: it has failed for longer than the budget.
        """
        began = time.monotonic()
        while True:
            try:
                return act()
            except StorageError as error:
                lasted_s = time.monotonic() - began
                if lasted_s > self._budget_s:
                    raise StorageLostError(
                        f"checkpoints cannot be uploaded for {lasted_s:.0f} s, which is more than "
                        f"failures.storage_budget_s={self._budget_s:g}: {error}\nmend it and run the same command "
                        "again: it goes on from the last checkpoint that is whole"
                    ) from None
                self._witness.checkpoint_trouble(f"checkpoint not uploaded, training goes on: {error}")
            time.sleep(PAUSE_S)


def _tidy(root: Path, *, keep: set[str | None]) -> None:
    """Remove local copies but those to ``keep``; of the ranks of one machine, whoever comes first."""
    for folder in root.iterdir():
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
