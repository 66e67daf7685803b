"""What went wrong in a worker, written down before it ends, and what is to be done about it."""

from __future__ import annotations

import json
import linecache
import re
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from orchestrator import errors
from orchestrator.errors import (
    OrchestratorError,
    RequestError,
    StorageError,
    StorageLostError,
    UnhealthyNodeError,
    UserCodeError,
    WorkerLostError,
)
from orchestrator.storage.folder import RunFolder, read_json, write_json

__all__ = [
    "PEER_LOST",
    "Failure",
    "WorkerFailedError",
    "describe",
    "hanging",
    "last_line",
    "lost_mark",
    "read_failures",
    "restart_cause",
    "said_by",
    "say_ending",
    "to_error",
    "write_failure",
]

Kind = Literal["request", "run", "user", "memory", "peer", "storage", "hang", "slow"]
# A rank whose peer died fails in its next collective; the words are gloo's, NCCL's and torch's own.
PEER_LOST = re.compile(
    r"connection (closed|reset|refused)|peer|gloo|nccl|socket|broken pipe|timed? ?out|store", re.IGNORECASE
)
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|std::bad_alloc", re.IGNORECASE)
ENDING = "ending.json"
OURS = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Failure:
    """One worker's last words.

    ``step`` is the optimizer step it was in, counted from 1, and ``micro_batch`` what it ran there, 0 where it had not
    come so far; ``node``: of a slow one.
    """

    rank: int
    step: int
    kind: Kind
    error: str
    message: str
    frame: str
    trace: str
    node: str = ""
    micro_batch: int = 0

    @property
    def is_collateral(self) -> bool:
        """Whether the worker only noticed that another one had gone."""
        return self.kind == "peer"


class WorkerFailedError(Exception):
    """What a worker raises to Ray: its last words travel with it, wherever the worker ran."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return f"rank {self.failure.rank}: {self.failure.error}: {self.failure.message}"


def describe(error: BaseException, *, rank: int, step: int, micro_batch: int = 0) -> Failure:
    """Classify ``error`` and find the user's own frame in its traceback."""
    return Failure(
        rank=rank,
        step=step,
        kind=_kind(error),
        error=type(error).__name__,
        message=str(error) or type(error).__name__,
        frame=_user_frame(error),
        trace="".join(traceback.format_exception(error)),
        node=error.node if isinstance(error, UnhealthyNodeError) else "",
        micro_batch=micro_batch,
    )


def hanging(message: str, trace: str, *, rank: int, step: int) -> Failure:
    """The last words of a worker that takes no step any more; ``trace`` says where its threads stand."""
    return Failure(rank, step, "hang", "WorkerLostError", message, "", trace)


def write_failure(folder: RunFolder, failure: Failure) -> None:
    """Leave ``failure`` in the run's folder for the driver."""
    write_json(folder.failures / f"rank-{failure.rank:05d}.json", asdict(failure))


def read_failures(folder: RunFolder) -> list[Failure]:
    """What the workers of the last attempt left, causes before collateral, lowest rank first."""
    found = [Failure(**json.loads(path.read_text())) for path in sorted(folder.failures.glob("rank-*.json"))]
    return sorted(found, key=lambda failure: (failure.is_collateral, failure.rank))


def say_ending(folder: RunFolder, cause: str) -> None:
    """Leave word for the next attempt of what ended this one, where the controller knows."""
    write_json(folder.failures / ENDING, {"cause": cause})


def restart_cause(folder: RunFolder, attempts: Sequence[Mapping[str, object]]) -> str:
    """What ended the last of ``attempts``: "stopped", what ``say_ending`` left, a failure's kind, or "worker_lost"."""
    if not attempts:
        return ""
    if attempts[-1]["event"] == "ended":
        return "stopped"
    if (said := read_json(folder.failures / ENDING)) is not None:
        return str(said["cause"])
    causes = [failure for failure in read_failures(folder) if not failure.is_collateral]
    return causes[0].kind if causes else "worker_lost"


def said_by(exceptions: Mapping[int, BaseException]) -> list[Failure]:
    """The last words in what Ray says of each rank; a rank that was lost has none."""
    found = []
    for error in exceptions.values():
        seen: BaseException | None = error
        while seen is not None and not isinstance(seen, WorkerFailedError):
            seen = getattr(seen, "_base_exc", None) or seen.__cause__
        if seen is not None:
            found.append(seen.failure)
    return found


def last_line(error: BaseException) -> str:
    """In Ray's errors as in a traceback the last line says what it was; Ray's guesses at why are left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes include")[0] if lines else type(error).__name__


def lost_mark(folder: RunFolder) -> Path:
    """Exists from the loss of workers until others have taken their place."""
    return folder.control / "lost"


def to_error(failure: Failure) -> OrchestratorError:
    """The exception that the command ends with: the worker's own where it is one of ours."""
    if failure.kind == "storage":
        return StorageLostError(failure.message)
    if failure.kind == "hang":
        return WorkerLostError(f"rank {failure.rank}, step {failure.step}: {failure.message}\n\n{failure.trace}")
    own = getattr(errors, failure.error, None)
    if failure.kind in ("request", "run", "slow") and isinstance(own, type) and issubclass(own, OrchestratorError):
        return own(failure.message)
    where = f"rank {failure.rank}, step {failure.step}"
    frame = f"\n{failure.frame}" if failure.frame else ""
    remedy = (
        "\nset a smaller layout.micro_batch, or layout.activation_checkpointing=true"
        if failure.kind == "memory"
        else ""
    )
    return UserCodeError(f"{failure.error} on {where}: {failure.message}{frame}{remedy}\n\n{failure.trace.rstrip()}")


def _kind(error: BaseException) -> Kind:
    if isinstance(error, StorageError):
        return "storage"
    if isinstance(error, UnhealthyNodeError):
        return "slow"
    if isinstance(error, RequestError):
        return "request"
    if isinstance(error, OrchestratorError):
        return "run"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return "memory"
    in_collective = any("distributed" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    if isinstance(error, RuntimeError) and in_collective and PEER_LOST.search(str(error)):
        return "peer"
    return "user"


def _user_frame(error: BaseException) -> str:
    """``file:line in function: code`` of the innermost frame that is neither ours nor a library's."""
    libraries = {OURS, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*libraries, "<")) and frame.lineno is not None:
            line = linecache.getline(frame.filename, frame.lineno).strip()
            return f"  {frame.filename}:{frame.lineno} in {frame.name}\n    {line}"
    return ""
