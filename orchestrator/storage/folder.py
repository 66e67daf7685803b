"""A run's folder: what lies where, and writes that are whole or absent."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import CheckpointConfig
from orchestrator.errors import ConfigError, RunFolderError, did_you_mean, explain_oserror
from orchestrator.storage.store import is_s3

__all__ = ["RunFolder", "find_run", "read_json", "write_json", "write_text"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, ``<checkpoint.uri>/<name>/``."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def job(self) -> Path:
        """Which job and arguments the run was started with."""
        return self.root / "job.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def probe(self) -> Path:
        """What was measured before the run, which its plan goes by."""
        return self.root / "probe.json"

    @property
    def metrics(self) -> Path:
        """One object per optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations.jsonl"

    @property
    def decisions(self) -> Path:
        """One object per decision of the policy, and one for what came of it."""
        return self.root / "decisions.jsonl"

    @property
    def events(self) -> Path:
        """One object per thing that a person should hear of, such as a store that does not answer."""
        return self.root / "events.jsonl"

    @property
    def attempts(self) -> Path:
        """One object per start and end of a worker group."""
        return self.root / "attempts.jsonl"

    @property
    def health(self) -> Path:
        """One object per start of a worker group: what its ranks found out about themselves before the first step."""
        return self.root / "health.jsonl"

    @property
    def failure_log(self) -> Path:
        """One object per attempt that failed: why, where, and what was done about it."""
        return self.root / "failures.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def summary(self) -> Path:
        """Result of the last attempt."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        """What Ray, DeepSpeed and the job's own code printed."""
        return self.root / "logs"

    @property
    def control(self) -> Path:
        """How driver and workers find each other: locks, tokens and last words. Nothing in it is a result."""
        return self.root / ".control"

    @property
    def failures(self) -> Path:
        """What workers said before they died, one file per rank."""
        return self.control / "failures"

    @property
    def outcome(self) -> Path:
        """What rank 0 says of the end of an attempt."""
        return self.control / "outcome.json"

    @property
    def change(self) -> Path:
        """What the workers are to be started with instead, after a failure that this may mend."""
        return self.control / "change.json"

    @property
    def stop_request(self) -> Path:
        """Exists while the driver asks the workers to save and stop."""
        return self.control / "stop"

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        Raises:
            RunFolderError: it cannot.
        """
        probe = self.root / f".probe-{secrets.token_hex(4)}"
        try:
            for folder in (self.root, self.control, self.checkpoints, self.logs, self.failures):
                folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run's folder: {explain_oserror(self.root, error)}; "
                "choose another with --set checkpoint.uri=FOLDER"
            ) from None


def find_run(name: str) -> RunFolder:
    """The folder of a run that exists, given by path or by its name below the default place.

    For a run in S3, given as ``s3://BUCKET/PREFIX/NAME``, it is a folder of copies on this machine, brought up to date.

    Raises:
        ConfigError: there is no run there; the message names those that are.
        StorageError: the store cannot be used.
    """
    if is_s3(name):
        from orchestrator.storage.stored_run import copy_of  # boto3 only where S3 is used

        return RunFolder(copy_of(name))
    default = Path(CheckpointConfig().uri)
    for root in (Path(name), default / name):
        if (root / "config.json").is_file():
            return RunFolder(root.absolute())
    known = sorted(path.parent.name for path in default.glob("*/config.json"))
    hint = did_you_mean(name, known) if known else f"there are no runs in {default.absolute()}: give the run's folder"
    raise ConfigError(f"no run at {name!r}; {hint}")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in ``path``, or None where there is no such file.

    Raises:
        RunFolderError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path}: cannot be read as JSON ({error}); remove it or start anew with --fresh"
        ) from None
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: holds {type(value).__name__}, not an object; start anew with --fresh")
    return value
