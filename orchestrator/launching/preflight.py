"""What is checked before a run starts: its folder, its identity, its checkpoint and its data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig, differing_fields
from orchestrator.errors import CheckpointError, DataError, RunFolderError
from orchestrator.job import Job
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder, read_json, write_json
from orchestrator.training.checkpoint import list_checkpoints, set_aside, set_aside_after, verify
from orchestrator.training.data import open_dataset

__all__ = [
    "RunRequest",
    "check_same_run",
    "choose_checkpoint",
    "finished_summary",
    "identity",
    "move_aside",
    "prepare",
    "run_root",
    "write_identity",
]

# Sections that change what a run says or survives, or on how many workers it goes on, but not what it computes.
FREE_TO_CHANGE = ("telemetry", "failures", "health", "checkpoint", "scale", "storage", "fleet")
PATIENCE_S = 10.0


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for.

    ``job`` is ``module:function``; ``args`` and ``overrides`` are ``name=value`` texts. ``from_checkpoint``
    names a checkpoint folder to go on from; newer ones are set aside. ``probe`` says whether micro batches are tried
    first; None leaves it to the plan. ``pause_share`` is the share of its length after which the run is to save and
    stop, at the next evaluation; the same request without it goes on from there.
    """

    job: str
    args: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    address: str | None = None
    fresh: bool = False
    force_config: bool = False
    from_checkpoint: str | None = None
    probe: bool | None = None
    pause_share: float | None = None


def run_root(config: RunConfig) -> Path:
    """The run's folder, absolute. Inside a Ray job the working directory is a package that Ray deletes: use home.

    Raises:
        RunFolderError: ``checkpoint.uri`` is no folder.
    """
    uri = config.checkpoint.uri
    if "://" in uri:
        raise RunFolderError(
            f"checkpoint.uri={uri!r}: runs live in folders or, but for searches, in s3://BUCKET/PREFIX"
        )
    base = Path.cwd()
    if "_ray_pkg_" in str(base):
        base = Path.home() / "orchestrator"
    return (base / Path(uri).expanduser() / config.name).absolute()


def move_aside(root: Path) -> Path | None:
    """Move an earlier run of this name out of the way, without deleting anything; returns where to.

    Raises:
        RunBusyError: it is running.
    """
    folder = RunFolder(root)
    if not folder.control.is_dir():
        return None
    DriverLock(folder.control).release()
    aside = root.with_name(f".replaced-{root.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return root.rename(aside)


def check_same_run(request: RunRequest, job: Job, folder: RunFolder) -> None:
    """Refuse to continue a run with another job or config.

    Raises:
        RunFolderError: names every field that differs.
    """
    old_config, old_job = read_json(folder.config), read_json(folder.job)
    if old_config is None or request.force_config:
        return
    new_config = job.config.model_dump(mode="json")
    ours = {key: value for key, value in new_config.items() if key not in FREE_TO_CHANGE}
    theirs = {key: value for key, value in old_config.items() if key not in FREE_TO_CHANGE}
    changed = differing_fields(theirs, ours) + differing_fields(old_job or {}, identity(request))
    if changed:
        raise RunFolderError(
            f"the run in {folder.root} was started with another configuration:\n  "
            + "\n  ".join(changed)
            + "\ncontinue it unchanged, give this run another name with --set name=..., start anew with --fresh, "
            "or accept the change with --force-config"
        )


def write_identity(request: RunRequest, job: Job, folder: RunFolder) -> None:
    """Write down what this run is, for the next time its command is given."""
    write_json(folder.config, job.config.model_dump(mode="json"))
    write_json(folder.job, identity(request))


def finished_summary(request: RunRequest, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, or None."""
    summary = read_json(folder.summary)
    if summary is None or summary.get("state") != "finished" or request.force_config or request.from_checkpoint:
        return None
    return summary


def choose_checkpoint(request: RunRequest, folder: RunFolder) -> list[str]:
    """Find the checkpoint that the run goes on from, and set aside what is newer or not whole; returns what was done.

    Raises:
        CheckpointError: the one asked for does not exist or is not whole, or none of those that exist is.
    """
    existing = list_checkpoints(folder.checkpoints)
    if request.from_checkpoint is not None:
        names = {path.name: path for path in existing}
        if request.from_checkpoint not in names:
            offer = ", ".join(names) or "none"
            raise CheckpointError(
                f"--from-checkpoint {request.from_checkpoint}: no such checkpoint; there are: {offer}"
            )
        verify(names[request.from_checkpoint])
        return [f"set aside {path}" for path in set_aside_after(folder.checkpoints, names[request.from_checkpoint])]
    done: list[str] = []
    for newest in reversed(existing):
        try:
            verify(newest)
        except CheckpointError as error:
            done.append(f"{error}; set aside as {set_aside(newest).name}")
        else:
            return done
    if done:
        raise CheckpointError("\n".join([*done, "no other checkpoint is left: start anew with --fresh"]))
    return done


def prepare(job: Job) -> tuple[int, int]:
    """Run the job's prepare step and open its data; returns the numbers of training and evaluation samples.

    Raises:
        DataError: the data cannot be written or read, or there is none.
    """
    if job.prepare is not None:
        try:
            job.prepare()
        except OSError as error:
            raise DataError(f"the job's prepare step failed: {error}") from error
    # Whoever waits for the prompt wants to know soon that a store does not answer; the run itself is more patient.
    budget_s = min(PATIENCE_S, job.config.storage.retry_budget_s)
    config = job.config.model_copy(
        update={"storage": job.config.storage.model_copy(update={"retry_budget_s": budget_s})}
    )
    datasets = job.task.datasets()
    train_samples = len(open_dataset(datasets.train, config))
    if train_samples == 0:
        raise DataError("the training set is empty: there is nothing to train on")
    if datasets.evaluation is None:
        return train_samples, 0
    return train_samples, len(open_dataset(datasets.evaluation, config))


def identity(request: RunRequest) -> dict[str, Any]:
    return {"job": request.job, "args": sorted(request.args)}
