"""The driver's side of where a run lives: a folder that workers share, or a store beside which it works."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, Self

from orchestrator.config import RunConfig, StorageConfig
from orchestrator.errors import CheckpointError, FencedError, OrchestratorError, StorageError
from orchestrator.launching.places import Stored
from orchestrator.launching.preflight import RunRequest, choose_checkpoint, move_aside, run_root
from orchestrator.storage.claim import BEAT_S, Claim
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder
from orchestrator.storage.mirror import Replica
from orchestrator.storage.store import is_s3
from orchestrator.storage.stored_run import CHECKPOINTS, OUTCOME, STOP, StoredRun, working_folder
from orchestrator.telemetry.trackers import MLFLOW_RUN
from orchestrator.training.checkpoint import list_checkpoints

__all__ = ["FolderHome", "Home", "StoredHome", "owned", "stored_uri"]

IDENTITY = ("config.json", "job.json", "plan.json", "probe.json")
RESULTS = ("summary.json", "report.html")
PULL_S = 1.5
TOLD_S = 30.0


class Home(Protocol):
    """What the driver needs of the place where its run lives."""

    folder: RunFolder
    """Where the driver reads the records: the run's own folder, or copies of what lies in the store."""
    driver: str
    """Names this driver to the workers."""
    stored: Stored | None
    address: str
    """Where the run is, as a person would look for it."""

    def choose_checkpoint(self, request: RunRequest) -> list[str]: ...
    def newest(self) -> str | None: ...
    def identify(self) -> None: ...
    def ask_to_stop(self) -> None: ...
    def begin_anew(self) -> None: ...
    def news(self) -> list[str]: ...
    def check(self) -> None: ...
    def fetch_end(self) -> None: ...
    def leave_results(self) -> None: ...


@contextlib.contextmanager
def owned(config: RunConfig, note: Callable[[str], None], *, fresh: bool) -> Iterator[Home]:
    """The home of a run, which no other driver may use meanwhile; with ``fresh`` an earlier run is moved aside.

    Raises:
        RunBusyError: another driver owns it.
        RunFolderError: the folder cannot be written.
        StorageError: the store cannot be used; found out within seconds.
    """
    if stored_uri(config) is not None:
        stored = StoredHome.own(config, note, fresh=fresh)
        try:
            yield stored
        finally:
            stored.close()
        return
    root = run_root(config)
    if fresh and (aside := move_aside(root)) is not None:
        note(f"the earlier run was moved to {aside}")
    folder = RunFolder(root)
    folder.create()
    lock = DriverLock(folder.control)
    try:
        yield FolderHome(folder, lock.driver)
    finally:
        lock.release()


def stored_uri(config: RunConfig) -> str | None:
    """Where in a store the run lies, or None for one in a folder."""
    return f"{config.checkpoint.uri.rstrip('/')}/{config.name}" if is_s3(config.checkpoint.uri) else None


class FolderHome:
    """See ``Home``: what workers and driver write is there for both."""

    def __init__(self, folder: RunFolder, driver: str) -> None:
        self.stored: Stored | None = None
        self.folder = folder
        self.driver = driver
        self.address = str(folder.root)
        self.begin_anew()

    def choose_checkpoint(self, request: RunRequest) -> list[str]:
        """See ``preflight.choose_checkpoint``."""
        return choose_checkpoint(request, self.folder)

    def newest(self) -> str | None:
        """Where the newest checkpoint is."""
        existing = list_checkpoints(self.folder.checkpoints)
        return str(existing[-1]) if existing else None

    def identify(self) -> None:
        """Nothing: it lies there."""

    def ask_to_stop(self) -> None:
        """Ask the workers to save and stop."""
        self.folder.stop_request.touch()

    def begin_anew(self) -> None:
        """Forget that workers were asked to stop, and how the last ones ended."""
        self.folder.stop_request.unlink(missing_ok=True)
        self.folder.outcome.unlink(missing_ok=True)

    def news(self) -> list[str]:
        """None."""
        return []

    def check(self) -> None:
        """Nothing: the kernel's lock is not lost."""

    def fetch_end(self) -> None:
        """Nothing: it lies there."""

    def leave_results(self) -> None:
        """Nothing: they lie there."""


class StoredHome:
    """See ``Home``: ``folder`` is this driver's own, of copies; leave it by ``close``.

    A thread shows the store that the driver lives, and brings the records here. A store that does not answer is told
    of once in a while and does not end the run; a newer driver does, see ``check``.
    """

    def __init__(self, run: StoredRun, storage: StorageConfig, claim: Claim) -> None:
        self._run = run
        self._claim = claim
        self._given = Stored(run.uri, storage, claim.number)
        self.stored: Stored | None = self._given
        self.driver = str(claim.number)
        self.folder = RunFolder(working_folder(run.uri) / "driver")
        self.address = run.uri
        self._replica = Replica(self._given.run(quick=True).store, self.folder.root)
        self._news: list[str] = []
        self._error: OrchestratorError | None = None
        self._end = threading.Event()
        self._wake = threading.Event()
        self._wants_stop = False
        self._one_says_stop = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    @classmethod
    def own(cls, config: RunConfig, note: Callable[[str], None], *, fresh: bool) -> Self:
        """Become the run's driver, and bring here what is known of it."""
        from orchestrator.storage.s3 import endpoint_of  # boto3 only where S3 is used

        uri = stored_uri(config)
        assert uri is not None
        # Workers may run where the environment says nothing of a compatible store: its address goes with the order.
        storage = config.storage.model_copy(update={"endpoint_url": endpoint_of(config.storage)})
        run = StoredRun.reached(uri, storage)
        home = cls(run, storage, Claim.take(run.store, waiting=note))
        try:
            if fresh and (aside := run.move_aside()) is not None:
                note(f"the earlier run was moved to {aside}")
            shutil.rmtree(home.folder.root, ignore_errors=True)
            home.folder.create()
            run.pull(home.folder.root)
            run.store.delete(STOP, OUTCOME)
        except BaseException:
            home._let_go()
            raise
        home._thread.start()
        return home

    def choose_checkpoint(self, request: RunRequest) -> list[str]:
        """Set aside what is newer than the checkpoint asked for; whether one is whole the workers find out.

        Raises:
            CheckpointError: the one asked for does not exist.
        """
        if (wanted := request.from_checkpoint) is None:
            return []
        existing = self._run.checkpoints()
        chosen = [name for name in existing if name == wanted or name.rpartition("-")[0] == wanted]
        if not chosen:
            raise CheckpointError(
                f"--from-checkpoint {wanted}: no such checkpoint; there are: {', '.join(existing) or 'none'}"
            )
        newer = existing[existing.index(chosen[-1]) + 1 :]
        return [f"set aside {self._run.set_aside(name)}" for name in newer]

    def newest(self) -> str | None:
        """Where the newest checkpoint is."""
        existing = self._run.checkpoints()
        return f"{self._run.uri}/{CHECKPOINTS}{existing[-1]}" if existing else None

    def identify(self) -> None:
        """Leave in the store what the run is."""
        self._run.publish(self.folder.root, IDENTITY)

    def ask_to_stop(self) -> None:
        """Ask the workers to save and stop: as soon as the store answers, without which they could not save either."""
        self._wants_stop = True
        self._wake.set()

    def begin_anew(self) -> None:
        """Forget that workers were asked to stop, and how the last ones ended.

        Raises:
            StorageError: see ``Store``.
        """
        with self._one_says_stop:
            self._wants_stop = False
            self._run.store.delete(STOP, OUTCOME)
        self.folder.outcome.unlink(missing_ok=True)

    def news(self) -> list[str]:
        """What a person should hear, once."""
        told, self._news = self._news, []
        return told

    def check(self) -> None:
        """Raise if a newer driver owns the run.

        Raises:
            FencedError: it does.
        """
        if self._error is not None:
            raise self._error

    def fetch_end(self) -> None:
        """Bring the last records and rank 0's outcome here.

        Raises:
            StorageError: see ``Store``.
        """
        self._run.pull(self.folder.root)
        if (outcome := self._run.read(OUTCOME)) is not None:
            self.folder.outcome.write_bytes(outcome)

    def leave_results(self) -> None:
        """Write summary, report, this machine's logs and what trackers keep here to the store.

        Raises:
            StorageError: see ``Store``.
        """
        root = self.folder.root
        kept = (*self.folder.logs.glob("*.log"), *root.glob("tensorboard/*"), *root.glob(MLFLOW_RUN))
        logs = [path.relative_to(root).as_posix() for path in kept]
        self._run.publish(self.folder.root, (*RESULTS, *logs))

    def close(self) -> None:
        """Let the next driver in."""
        self._end.set()
        self._wake.set()
        self._thread.join()
        self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(StorageError):
            self._claim.release()

    def _follow(self) -> None:
        beat_at, told_at, failing = time.monotonic(), -TOLD_S, False
        while not self._ends_in(PULL_S):
            now = time.monotonic()
            try:
                if now - beat_at >= BEAT_S:
                    self._claim.beat()
                    beat_at = now
                self._say_stop()
                self._replica.pull()
            except FencedError as error:
                self._error = error
                return
            except StorageError as error:
                failing = True
                if now - told_at > TOLD_S:
                    self._news.append(f"{error}; the workers go on, and nothing can be shown until it is back")
                    told_at = now
            else:
                if failing:
                    self._news.append(f"{self._run.uri} answers again")
                failing, told_at = False, -TOLD_S

    def _ends_in(self, seconds: float) -> bool:
        """Wait so long, or until there is something to do; whether this is the end."""
        self._wake.wait(seconds)
        self._wake.clear()
        return self._end.is_set()

    def _say_stop(self) -> None:
        with self._one_says_stop:
            if self._wants_stop:
                self._given.run(quick=True).store.write(STOP, b"stop")
                self._wants_stop = False
