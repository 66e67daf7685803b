"""Where a worker works on its run: in a folder that all share, or on its own machine's disk beside a store."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import RunConfig, StorageConfig
from orchestrator.errors import FencedError, RunFolderError, StorageError, StorageLostError, explain_oserror
from orchestrator.launching.failures import restart_cause
from orchestrator.launching.limits import room_for_a_copy
from orchestrator.storage.claim import StoreFence
from orchestrator.storage.fence import Fence, Guard
from orchestrator.storage.folder import RunFolder, write_json
from orchestrator.storage.mirror import Mirror, Pushing, Replica
from orchestrator.storage.stored_run import OUTCOME, STOP, StoredRun, own_folder, working_folder
from orchestrator.storage.tree import upload_tree
from orchestrator.telemetry.records import read

__all__ = ["RECORDS", "Attempt", "Place", "SharedPlace", "Stored", "StoredPlace"]

RECORDS = (
    "metrics.jsonl",
    "evaluations.jsonl",
    "decisions.jsonl",
    "events.jsonl",
    "attempts.jsonl",
    "health.jsonl",
    "plan.json",
)
PUSH_S = 2.0
SUPERSEDED_S = 2.0
"""How often a worker looks whether another attempt has begun, and how long it then has to end by itself."""
QUICK_S = 20.0
"""After so long a store that does not answer is trouble that is told of; it is tried again in any case."""


@dataclass(frozen=True)
class Stored:
    """A run in a store: its address, how the store is reached, and the number of the driver that owns it."""

    uri: str
    storage: StorageConfig
    driver: int

    def run(self, *, quick: bool = False) -> StoredRun:
        """The run; ``quick``: a request is given up early, because whoever makes it tries again."""
        budget_s = min(QUICK_S, self.storage.retry_budget_s) if quick else self.storage.retry_budget_s
        return StoredRun(self.uri, self.storage.model_copy(update={"retry_budget_s": budget_s}))


@dataclass(frozen=True)
class Attempt:
    """What rank 0 finds as an attempt begins: the token that fences off the others, its number, why there is one."""

    token: str
    number: int
    cause: str


class Place(Protocol):
    """What a worker needs of the place it works in."""

    folder: RunFolder
    log: Path
    disk: Path
    """Where checkpoints go on this machine, on their way or for good."""

    def begin(self) -> Attempt: ...
    def guard(self, token: str) -> Guard: ...
    def checkpoints(self, config: RunConfig, layout_key: dict[str, Any], recorder: Any) -> Any: ...
    def keep(self) -> None: ...
    def stop_requested(self) -> bool: ...
    def tell(self, stacks: Path) -> None: ...
    def end(self, outcome: Mapping[str, Any] | None) -> None: ...
    def leave(self) -> None: ...


class SharedPlace:
    """The run's own folder."""

    def __init__(self, root: Path, rank: int, driver: str) -> None:
        self.folder = RunFolder(root)
        self.log = self.folder.logs / f"worker-{rank}.log"
        self.disk = root
        self._driver = driver
        self._guard: Fence | None = None
        self._ended = threading.Event()

    def begin(self) -> Attempt:
        """Rank 0: fence off earlier attempts, and forget what their workers said."""
        token = Fence.begin(self.folder.control, driver=self._driver)
        attempts = read(self.folder.attempts)
        attempt = Attempt(token, _number(attempts), restart_cause(self.folder, attempts))
        for stale in self.folder.failures.glob("*.json"):
            stale.unlink()
        return attempt

    def guard(self, token: str) -> Guard:
        """Every rank: join the attempt, and leave it, at the latest, when the next one begins."""
        self._guard = Fence(self.folder.control, token)
        threading.Thread(target=self._end_when_superseded, name="fence", daemon=True).start()
        return self._guard

    def checkpoints(self, config: RunConfig, layout_key: dict[str, Any], recorder: Any) -> Any:  # noqa: ARG002
        """The run's checkpoints, for this rank."""
        from orchestrator.training.checkpoint import Checkpoints

        assert self._guard is not None
        return Checkpoints(self.folder.checkpoints, self._guard, config.checkpoint.keep, layout_key)

    def keep(self) -> None:
        """Nothing: the records lie where they stay."""

    def stop_requested(self) -> bool:
        """Whether the driver asks to save and stop."""
        return self.folder.stop_request.exists()

    def tell(self, stacks: Path) -> None:
        """Nothing: the driver sees what was written down."""

    def end(self, outcome: Mapping[str, Any] | None) -> None:
        """Every rank, after the last step: rank 0 leaves the ``outcome``."""
        if outcome is not None:
            write_json(self.folder.outcome, outcome)
        if self._guard is not None:
            self._guard.release()

    def leave(self) -> None:
        """In any case, at the very end."""
        self._ended.set()

    def _end_when_superseded(self) -> None:
        """In a thread: a rank that is cut off from the others waits in a collective for minutes, and the next attempt
        waits for the lock that it holds; but it may still see the folder.
        """
        assert self._guard is not None
        while not self._ended.wait(SUPERSEDED_S):
            try:
                self._guard.check()
            except FencedError as error:
                if not self._ended.wait(SUPERSEDED_S):
                    print(error, flush=True)  # noqa: T201 - this worker's log
                    os._exit(1)
            except OSError:
                continue  # a folder that cannot be read says nothing


class StoredPlace:
    """A folder of this process alone, whose records a thread brings to the store."""

    def __init__(self, stored: Stored, rank: int) -> None:
        self._stored = stored
        self._run = stored.run()
        self._quick = stored.run(quick=True)
        self._rank = rank
        self._shared = self.disk = working_folder(stored.uri)
        try:
            root, self._lock = own_folder(self._shared / "workers")
            self.folder = RunFolder(root)
            self.folder.create()
        except OSError as error:
            raise RunFolderError(
                f"cannot write {explain_oserror(self._shared, error)}; name another place with ORCHESTRATOR_CACHE"
            ) from None
        self.log = self.folder.logs / f"worker-{rank}-{time.strftime('%Y%m%d-%H%M%S')}.log"
        self._guard: StoreFence | None = None
        self._pushing: Pushing | None = None
        self._stop = False

    def begin(self) -> Attempt:
        """Rank 0: fence off earlier attempts, remove what a crash left, and bring the records here."""
        token = StoreFence.begin(self._run.store, driver=self._stored.driver)
        self._run.collect_orphans()
        Replica(self._run.store, self.folder.root).pull(lambda name: name in RECORDS)
        failures = self._run.failures(self.folder.failures)
        attempts = read(self.folder.attempts)
        attempt = Attempt(token, _number(attempts), restart_cause(self.folder, attempts))
        self._run.store.delete(*failures)
        return attempt

    def guard(self, token: str) -> Guard:
        """Every rank: join the attempt, and push its log, and on rank 0 the records, from now on."""
        self._guard = StoreFence(self._quick.store, token)
        names = [str(self.log.relative_to(self.folder.root)), *(RECORDS if self._rank == 0 else ())]
        before = self._look if self._rank == 0 else _nothing
        self._pushing = Pushing(Mirror(self._quick.store, self.folder.root), names, every_s=PUSH_S, before=before)
        return self._guard

    def checkpoints(self, config: RunConfig, layout_key: dict[str, Any], recorder: Any) -> Any:
        """The run's checkpoints, for this rank; downloads and copies are shared by this machine's ranks."""
        from orchestrator.training.stored import StoredCheckpoints

        assert self._guard is not None
        assert self._pushing is not None
        (self._shared / "checkpoints").mkdir(parents=True, exist_ok=True)
        return StoredCheckpoints(
            self._quick,
            self._shared / "checkpoints",
            self._guard,
            layout_key,
            keep=config.checkpoint.keep,
            budget_s=config.failures.storage_budget_s,
            flush=self._pushing.flush,
            witness=recorder,
            room=room_for_a_copy,
        )

    def keep(self) -> None:
        """Rank 0: bring the records to the store now; if that does not answer, once it does.

        Raises:
            FencedError: another attempt has begun.
        """
        assert self._pushing is not None
        with contextlib.suppress(StorageError):
            self._pushing.flush()

    def stop_requested(self) -> bool:
        """Whether the driver asks to save and stop, as the store last said."""
        return self._stop

    def tell(self, stacks: Path) -> None:
        """Bring last words and ``stacks`` to the store, for a process that ends without raising anything."""
        with contextlib.suppress(StorageError):
            self._quick.publish_failures(self.folder.failures)
            self._quick.publish(self.folder.root, [stacks.relative_to(self.folder.root).as_posix()])

    def end(self, outcome: Mapping[str, Any] | None) -> None:
        """Every rank, after the last step: all records reach the store, and then rank 0's ``outcome``.

        Raises:
            StorageLostError: the store does not take them.
        """
        if outcome is None or self._pushing is None:
            return
        write_json(self.folder.outcome, outcome)
        self._pushing.close()
        try:
            self._pushing.flush()
            upload_tree(self._run.store, self.folder.root / "traces", "traces")
            self._run.store.write(OUTCOME, self.folder.outcome.read_bytes())
        except StorageError as error:
            raise StorageLostError(f"the run has ended, but its records cannot be written: {error}") from None

    def leave(self) -> None:
        """In any case, at the very end: the log, if the store takes it, and the folder's lock."""
        with contextlib.suppress(StorageError, FencedError):
            if self._pushing is not None:
                self._pushing.close()
                self._pushing.flush()
        self._lock.close()

    def _look(self) -> None:
        """Before each push: whether this attempt still owns the run, and whether it is asked to stop."""
        assert self._guard is not None
        self._guard.refresh()
        self._stop = self._stop or self._quick.store.stat(STOP) is not None


def _number(attempts: Sequence[Mapping[str, Any]]) -> int:
    return sum(1 for record in attempts if record["event"] == "started") + 1


def _nothing() -> None:
    """Ranks but the first push nothing that another attempt could mind."""
