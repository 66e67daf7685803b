"""The one exception tree; every error a user can meet is one of these.

OrchestratorError                 exit code 1 unless said otherwise
├── RequestError                  exit code 2: the request is wrong, nothing was started
│   ├── ConfigError               a field of the config: its name, its value and the remedy
│   ├── JobError                  the job cannot be found, imported or called
│   ├── DataError                 missing, empty or unreadable data
│   │   └── CorruptDataError      a part of it is there and is not what was written
│   ├── StorageError              a store that cannot be reached, or that refuses
│   │   ├── NotFoundError         there is no such object
│   │   └── StorageUnavailableError  no answer within the budget: worth trying again later
│   ├── ClusterError              no such cluster, or one too small
│   ├── RunFolderError            folder unwritable, or it belongs to a different config
│   ├── RunBusyError              another live process owns the run
│   ├── CheckpointError           a checkpoint that fails its checks
│   └── ExportError               a model that a format or a method cannot take, or a package that is missing
└── RunError                      the run started and then failed
    ├── NonFiniteLossError        loss or gradient became NaN or infinite
    ├── FencedError               a newer attempt owns the run's folder
    ├── UserCodeError             the job's own code raised
    ├── StorageLostError          a store failed for longer than the run may wait for it
    ├── UnhealthyNodeError        a worker is far slower than the others, and its node is to be left
    ├── WorkerLostError           workers died more often than the budget allows
    └── ClusterLostError          the cluster a run was followed on is gone
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ClusterLostError",
    "ConfigError",
    "CorruptDataError",
    "DataError",
    "ExportError",
    "FencedError",
    "JobError",
    "NonFiniteLossError",
    "NotFoundError",
    "OrchestratorError",
    "RequestError",
    "RunBusyError",
    "RunError",
    "RunFolderError",
    "StorageError",
    "StorageLostError",
    "StorageUnavailableError",
    "UnhealthyNodeError",
    "UserCodeError",
    "WorkerLostError",
    "did_you_mean",
    "explain_oserror",
]


class OrchestratorError(Exception):
    """Root of the tree; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class RequestError(OrchestratorError):
    """The request is wrong; nothing was started."""

    exit_code = 2


class ConfigError(RequestError):
    """A config field has an impossible or unknown value."""


class JobError(RequestError):
    """The job cannot be found, imported, called, or does not return a ``Job``."""


class DataError(RequestError):
    """Data is missing, empty, corrupt, or lacks a column."""


class CorruptDataError(DataError):
    """A file or row group that is there and cannot be read; the message names it."""


class StorageError(RequestError):
    """A store cannot be used: address, credentials, bucket or permission; the message says which."""


class NotFoundError(StorageError):
    """There is no object or file of this key."""


class StorageUnavailableError(StorageError):
    """A store gave no answer within the budget for retries."""


class ClusterError(RequestError):
    """The cluster cannot be reached or cannot hold the run."""


class RunFolderError(RequestError):
    """The run's folder cannot be used for this run."""


class RunBusyError(RequestError):
    """Another live process owns the run's folder."""


class CheckpointError(RequestError):
    """A checkpoint is missing a file or fails its hashes."""


class ExportError(RequestError):
    """A model cannot be written in a format, or compressed as asked."""


class RunError(OrchestratorError):
    """The run started and then failed."""


class NonFiniteLossError(RunError):
    """The loss or the gradient norm became NaN or infinite."""


class FencedError(RunError):
    """This process belongs to an attempt that has been superseded."""


class UserCodeError(RunError):
    """The job's own code raised; the message carries rank, step and the user's frame."""


class StorageLostError(RunError):
    """A store failed for longer than ``failures.storage_budget_s``."""


class UnhealthyNodeError(RunError):
    """A worker's checks before the first step found it far behind the others; ``node`` is Ray's id of its node."""

    def __init__(self, message: str, node: str = "") -> None:
        super().__init__(message)
        self.node = node


class WorkerLostError(RunError):
    """Workers died more often than ``failures.max_restarts`` allows."""


class ClusterLostError(RunError):
    """The cluster that a submitted run was followed on is gone; the run itself may or may not be."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean X?)"`` for a near miss, always followed by the valid names."""
    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(choices)}"


def explain_oserror(path: Path, error: OSError) -> str:
    """One clear sentence for an operating-system error at ``path``."""
    return f"{path}: {error.strerror or error}"
