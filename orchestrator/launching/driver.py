"""The driver of a run: check everything, plan, launch the workers, watch them, and say how it ended."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from orchestrator.config import RunConfig, differing_fields
from orchestrator.errors import CheckpointError, DataError, OrchestratorError, RunFolderError, WorkerLostError
from orchestrator.job import Job, load
from orchestrator.launching.cluster import RayCluster, address_of, embedded_shape
from orchestrator.launching.failures import read_failures, to_error
from orchestrator.launching.worker import Order
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder, read_json, write_json
from orchestrator.telemetry.records import Follower, read
from orchestrator.telemetry.report import load_run, render
from orchestrator.training.checkpoint import list_checkpoints, set_aside_after, verify
from orchestrator.training.data import open_dataset

__all__ = ["Listener", "RunRequest", "plan_job", "run"]

POLL_S = 0.1
# Sections that change what a run says or survives, but not what it computes.
FREE_TO_CHANGE = ("telemetry", "failures", "checkpoint")


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for.

    ``job`` is ``module:function``; ``args`` and ``overrides`` are ``name=value`` texts. ``from_checkpoint``
    names a checkpoint folder to go on from; newer ones are set aside.
    """

    job: str
    args: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    address: str | None = None
    fresh: bool = False
    force_config: bool = False
    from_checkpoint: str | None = None


class Listener(Protocol):
    """Hears of a run as it goes. Four verbs: one for each thing a person watches."""

    def planned(self, plan: Plan, folder: Path) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


def run(request: RunRequest, listener: Listener) -> dict[str, Any]:
    """Run the job to its end, or until it is stopped, and return its summary.

    The summary holds ``name``, ``state`` ("finished" or "stopped"), ``reason``, ``step``, ``samples``, ``progress``,
    ``loss``, ``metrics``, ``samples_per_s``, ``wall_s``, ``checkpoint``, ``folder``, ``report`` and ``logs``.

    Raises:
        RequestError: nothing was started; the message holds the remedy.
        RunError: the run failed; where it stands is in its folder.
    """
    started = time.monotonic()
    job = load(request.job, request.args, request.overrides)
    folder = RunFolder(_root(job.config))
    if request.fresh:
        _replace(folder, listener)
    folder.create()
    lock = DriverLock(folder.root)
    try:
        _check_same_run(request, job, folder)
        if (done := _already_finished(folder, request)) is not None:
            listener.note(f"{job.config.name} is finished already; start it anew with --fresh")
            return done
        _check_checkpoint(request, folder, listener)
        sizes = _prepare(job)
        return _launch(request, job, folder, lock.driver, sizes, listener, started)
    finally:
        lock.release()


def plan_job(request: RunRequest) -> tuple[Plan, Path]:
    """The plan that ``run`` would follow, and the run's folder, without starting anything."""
    job = load(request.job, request.args, request.overrides)
    train_samples, evaluation_samples = _prepare(job)
    folder = RunFolder(_root(job.config))
    address = address_of(request.address)
    if address is None:
        shape = embedded_shape()
    else:
        folder.create()
        with RayCluster.connect(address, log=folder.logs / "ray.log") as cluster:
            shape = cluster.shape
    return make_plan(job.config, shape, train_samples=train_samples, evaluation_samples=evaluation_samples), folder.root


# -- before anything is started ----------------------------------------------------------------


def _root(config: RunConfig) -> Path:
    """The run's folder, absolute. Inside a Ray job the working directory is a package that Ray deletes: use home."""
    uri = config.checkpoint.uri
    if "://" in uri:
        raise RunFolderError(f"checkpoint.uri={uri!r}: only folders of this machine or a shared filesystem can be used")
    base = Path.cwd()
    if "_ray_pkg_" in str(base):
        base = Path.home() / "orchestrator"
    return (base / Path(uri).expanduser() / config.name).absolute()


def _replace(folder: RunFolder, listener: Listener) -> None:
    """Move an earlier run of this name out of the way; it is not deleted."""
    if not folder.root.exists():
        return
    DriverLock(folder.root).release()  # refuses while it is running
    aside = folder.root.with_name(f".replaced-{folder.root.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.root.rename(aside)
    listener.note(f"the earlier run was moved to {aside}")


def _check_same_run(request: RunRequest, job: Job, folder: RunFolder) -> None:
    """Refuse to continue a run with another job or config, then write down what this one is."""
    new_config = job.config.model_dump(mode="json")
    new_job = {"job": request.job, "args": sorted(request.args)}
    old_config, old_job = read_json(folder.config), read_json(folder.job)
    if old_config is not None and not request.force_config:
        ours = {key: value for key, value in new_config.items() if key not in FREE_TO_CHANGE}
        theirs = {key: value for key, value in old_config.items() if key not in FREE_TO_CHANGE}
        changed = differing_fields(theirs, ours) + differing_fields(old_job or {}, new_job)
        if changed:
            raise RunFolderError(
                f"the run in {folder.root} was started with another configuration:\n  "
                + "\n  ".join(changed)
                + "\ncontinue it unchanged, give this run another name with --set name=..., start anew with --fresh, "
                "or accept the change with --force-config"
            )
    write_json(folder.config, new_config)
    write_json(folder.job, new_job)


def _already_finished(folder: RunFolder, request: RunRequest) -> dict[str, Any] | None:
    summary = read_json(folder.summary)
    if summary is None or summary.get("state") != "finished" or request.force_config or request.from_checkpoint:
        return None
    return summary


def _check_checkpoint(request: RunRequest, folder: RunFolder, listener: Listener) -> None:
    """Verify the checkpoint the run would go on from, before anything starts."""
    existing = list_checkpoints(folder.checkpoints)
    if request.from_checkpoint is not None:
        names = {path.name: path for path in existing}
        if request.from_checkpoint not in names:
            offer = ", ".join(names) or "none"
            raise CheckpointError(
                f"--from-checkpoint {request.from_checkpoint}: no such checkpoint; there are: {offer}"
            )
        for moved in set_aside_after(folder.checkpoints, names[request.from_checkpoint]):
            listener.note(f"set aside {moved}")
        existing = list_checkpoints(folder.checkpoints)
    if not existing:
        return
    try:
        verify(existing[-1])
    except CheckpointError as error:
        intact = next((path for path in reversed(existing[:-1]) if _is_intact(path)), None)
        remedy = (
            f"go on from the one before with --from-checkpoint {intact.name}" if intact else "start anew with --fresh"
        )
        raise CheckpointError(f"{error}; {remedy}") from None


def _is_intact(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def _prepare(job: Job) -> tuple[int, int]:
    """Run the job's prepare step and open its data; returns the numbers of samples."""
    if job.prepare is not None:
        try:
            job.prepare()
        except OSError as error:
            raise DataError(f"the job's prepare step failed: {error}") from error
    datasets = job.task.datasets()
    train_samples = len(open_dataset(datasets.train))
    if train_samples == 0:
        raise DataError("the training set is empty: there is nothing to train on")
    if datasets.evaluation is None:
        return train_samples, 0
    return train_samples, len(open_dataset(datasets.evaluation))


# -- the run itself ----------------------------------------------------------------------------


def _launch(
    request: RunRequest,
    job: Job,
    folder: RunFolder,
    driver: str,
    sizes: tuple[int, int],
    listener: Listener,
    started: float,
) -> dict[str, Any]:
    address = address_of(request.address)
    if address is None:
        _make_plan(job, embedded_shape(), sizes)  # refuse before a cluster is started for nothing
    folder.stop_request.unlink(missing_ok=True)
    folder.outcome.unlink(missing_ok=True)
    followers = Follower(folder.metrics), Follower(folder.evaluations)
    for follower in followers:
        follower.poll()
    with RayCluster.connect(address, log=folder.logs / "ray.log") as cluster:
        plan = _make_plan(job, cluster.shape, sizes)
        write_json(folder.plan, plan.to_dict())
        listener.planned(plan, folder.root)
        _note_resume(folder, listener)
        order = Order(job=job, root=folder.root, shape=cluster.shape, driver=driver)
        attempt = _Fit(order, plan, job.config)
        try:
            outcome = _watch(attempt, folder, followers, listener, job.config.failures.stop_grace_s)
        except OrchestratorError:
            _write_end(folder, job.config, {"state": "failed"}, started)
            raise
    return _write_end(folder, job.config, outcome, started)


def _make_plan(job: Job, shape: ClusterShape, sizes: tuple[int, int]) -> Plan:
    return make_plan(job.config, shape, train_samples=sizes[0], evaluation_samples=sizes[1])


def _note_resume(folder: RunFolder, listener: Listener) -> None:
    existing = list_checkpoints(folder.checkpoints)
    if existing:
        listener.note(f"going on from checkpoint {existing[-1].name}")
    elif folder.metrics.exists():
        listener.note("the earlier attempt left no checkpoint: starting from the beginning")


class _Fit:
    """``TorchTrainer.fit`` in a thread, so that the main thread hears signals and shows progress."""

    def __init__(self, order: Order, plan: Plan, config: RunConfig) -> None:
        self.error: BaseException | None = None
        from orchestrator.launching.trainer import make_trainer  # Ray reads its environment when it is imported

        self._trainer = make_trainer(order, plan, config)
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self.error = error


def _watch(
    attempt: _Fit, folder: RunFolder, followers: tuple[Follower, Follower], listener: Listener, grace_s: float
) -> dict[str, Any]:
    """Show the run until it ends; a first signal asks it to save and stop, a second or the grace's end abandons it."""
    asked_at: float | None = None
    restarts = 0
    with _signals() as signals:
        while attempt.running:
            _show(followers, listener)
            restarts = _note_restarts(folder, restarts, listener)
            if signals and asked_at is None:
                asked_at = time.monotonic()
                folder.stop_request.touch()
                listener.note("stopping: the step is finished and saved; once more to stop at once")
            abandoned = len(signals) > 1 or (asked_at is not None and time.monotonic() - asked_at > grace_s)
            if abandoned:
                raise WorkerLostError(
                    "stopped without saving; run the same command again to go on from the last checkpoint"
                )
            time.sleep(POLL_S)
    _show(followers, listener)
    if attempt.error is not None:
        raise _explain(attempt.error, folder)
    outcome = read_json(folder.outcome)
    if outcome is None:
        raise WorkerLostError(f"the workers ended without an outcome in {folder.root}: is that folder shared by all?")
    return outcome


def _show(followers: tuple[Follower, Follower], listener: Listener) -> None:
    metrics, evaluations = followers
    for record in metrics.poll():
        listener.step(record)
    for record in evaluations.poll():
        listener.evaluation(record)


def _note_restarts(folder: RunFolder, known: int, listener: Listener) -> int:
    """Say so when Ray Train has replaced the workers."""
    started = [r for r in read(folder.attempts) if r["event"] == "started"] if folder.attempts.exists() else []
    if known and len(started) > known:
        listener.note(f"workers were lost and replaced; going on from step {started[-1]['step']}")
    return len(started)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them."""
    heard: list[int] = []

    def hear(number: int, _: FrameType | None) -> None:
        heard.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: BaseException, folder: RunFolder) -> OrchestratorError:
    """The error as the user should read it: the worker's own words first, Ray's only where there are none."""
    causes = [failure for failure in read_failures(folder) if not failure.is_collateral]
    if causes:
        return to_error(causes[0])
    restarts = "failures.max_restarts"
    return WorkerLostError(
        f"workers were lost more often than {restarts} allows, the last time with: {_first_line(error)}\n"
        f"run the same command again to go on from the last checkpoint; the logs are in {folder.logs}"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _write_end(folder: RunFolder, config: RunConfig, outcome: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Write ``summary.json`` and the report; a failed run has both too, from what it recorded."""
    last = outcome.get("last") or {}
    existing = list_checkpoints(folder.checkpoints)
    train_time_s = last.get("train_time_s") or 0.0
    summary = {
        "name": config.name,
        "state": outcome["state"],
        "reason": outcome.get("reason", ""),
        "step": last.get("step"),
        "samples": last.get("samples"),
        "progress": last.get("progress"),
        "loss": last.get("loss"),
        "metrics": last.get("evaluation") or {},
        "samples_per_s": last["samples"] / train_time_s if train_time_s else None,
        "wall_s": time.monotonic() - started,
        "checkpoint": str(existing[-1]) if existing else None,
        "folder": str(folder.root),
        "report": str(folder.report),
        "logs": str(folder.logs),
    }
    write_json(folder.summary, summary)
    folder.report.write_text(render(load_run(folder.root)), encoding="utf-8")
    return summary
