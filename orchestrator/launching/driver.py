"""The driver of a run: check everything, plan, launch the workers, watch them, and say how it ended."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from orchestrator.config import RunConfig
from orchestrator.errors import OrchestratorError, WorkerLostError
from orchestrator.job import Job, load
from orchestrator.launching.cluster import RayCluster, address_of, embedded_shape
from orchestrator.launching.failures import read_failures, to_error
from orchestrator.launching.planner import make_job_plan, probed
from orchestrator.launching.preflight import (
    RunRequest,
    check_same_run,
    choose_checkpoint,
    finished_summary,
    move_aside,
    prepare,
    run_root,
    write_identity,
)
from orchestrator.launching.profiling import profile_job
from orchestrator.launching.telling import Teller
from orchestrator.launching.worker import Order
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import Plan
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder, read_json, write_json, write_text
from orchestrator.telemetry.accounting import account, time_by_part
from orchestrator.telemetry.records import Follower, read
from orchestrator.telemetry.report import load_run, render
from orchestrator.telemetry.trackers import Tracking, make_trackers, require_trackers
from orchestrator.training.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from orchestrator.launching.trainer import Fit

__all__ = ["Listener", "run"]

POLL_S = 0.25
SAME_SIGNAL_S = 0.5


class Listener(Protocol):
    """Hears of a run as it goes. Six verbs: one for each thing a person watches, and how it is to be shown."""

    def planned(self, plan: Plan, folder: Path) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def decision(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def begins(self, config: RunConfig) -> None: ...


@dataclass(frozen=True)
class _Tracked:
    """A listener whose records go to the trackers as well."""

    listener: Listener
    tracking: Tracking

    def planned(self, plan: Plan, folder: Path) -> None:
        self.listener.planned(plan, folder)

    def step(self, record: Mapping[str, Any]) -> None:
        self.listener.step(record)
        self.tracking.step(record)
        self.tell()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self.listener.evaluation(record)
        self.tracking.evaluation(record)

    def decision(self, record: Mapping[str, Any]) -> None:
        self.listener.decision(record)

    def note(self, text: str) -> None:
        self.listener.note(text)

    def begins(self, config: RunConfig) -> None:
        self.listener.begins(config)

    def tell(self) -> None:
        """Pass on what went wrong with a tracker."""
        for line in self.tracking.trouble():
            self.listener.note(line)


class _Followers(NamedTuple):
    """The run's growing tables."""

    metrics: Follower
    evaluations: Follower
    decisions: Follower


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
    listener.begins(job.config)
    require_trackers(job.config.telemetry.trackers)
    root = run_root(job.config)
    sizes = prepare(job)
    address = address_of(request.address)
    profiled = None
    if address is None:
        shape = embedded_shape()
        profiled = profile_job(job, shape)
        make_job_plan(job, shape, sizes, profiled)  # refused before there is a folder or a cluster
    if request.fresh and (aside := move_aside(root)) is not None:
        listener.note(f"the earlier run was moved to {aside}")
    folder = RunFolder(root)
    folder.create()
    lock = DriverLock(folder.control)
    try:
        check_same_run(request, job, folder)
        if (done := finished_summary(request, folder)) is not None:
            listener.note(f"{job.config.name} is finished already; start it anew with --fresh")
            return done
        for note in choose_checkpoint(request, folder):
            listener.note(note)
        return _launch(request, job, folder, lock.driver, sizes, profiled, listener, started)
    finally:
        lock.release()


def _launch(
    request: RunRequest,
    job: Job,
    folder: RunFolder,
    driver: str,
    sizes: tuple[int, int],
    profiled: tuple[Profile | None, str] | None,
    listener: Listener,
    started: float,
) -> dict[str, Any]:
    folder.stop_request.unlink(missing_ok=True)
    folder.outcome.unlink(missing_ok=True)
    followers = _Followers(Follower(folder.metrics), Follower(folder.evaluations), Follower(folder.decisions))
    for follower in followers:
        follower.poll()
    with RayCluster.connect(address_of(request.address), log=folder.logs / "ray.log") as cluster:
        profiled = profiled or profile_job(job, cluster.shape)  # the embedded cluster has the shape it was traced for
        from orchestrator.launching.trainer import Fit, make_trainer  # Ray reads its environment when it is imported

        plan = make_job_plan(job, cluster.shape, sizes, profiled)
        write_identity(request, job, folder)
        order = Order(job=job, root=folder.root, shape=cluster.shape, driver=driver, profile=profiled[0])
        order, plan = probed(request, order, plan, sizes, profiled, listener.note)
        write_json(folder.plan, plan.to_dict())
        listener.planned(plan, folder.root)
        _note_resume(folder, listener)
        listener.note(f"starting {plan.layout.workers} worker{'s' if plan.layout.workers > 1 else ''} ...")
        tracking = Tracking(
            functools.partial(
                make_trackers,
                job.config.telemetry.trackers,
                run=job.config.name,
                folder=folder.root,
                config=job.config.model_dump(mode="json"),
            )
        )
        listener = tracked = _Tracked(listener, tracking)
        teller = Teller(folder, job.config, plan, embedded=cluster.embedded)
        attempt = Fit(make_trainer(order, plan, job.config))
        state = "failed"
        try:
            outcome = _watch(attempt, folder, followers, listener, teller, job.config.failures.stop_grace_s)
            state = outcome["state"]
        except OrchestratorError:
            _write_end(folder, job.config, {"state": "failed"}, started)
            raise
        finally:
            teller.end(state)
            tracking.close(state)
            tracked.tell()
    return _write_end(folder, job.config, outcome, started)


def _note_resume(folder: RunFolder, listener: Listener) -> None:
    existing = list_checkpoints(folder.checkpoints)
    if existing:
        listener.note(f"going on from checkpoint {existing[-1].name}")
    elif folder.metrics.exists():
        listener.note("the earlier attempt left no checkpoint: starting from the beginning")


def _watch(
    attempt: Fit, folder: RunFolder, followers: _Followers, listener: Listener, teller: Teller, grace_s: float
) -> dict[str, Any]:
    """Show the run until it ends; a first signal asks it to save and stop, a second or the grace's end abandons it."""
    asked_at: float | None = None
    known = len(_started(folder)) + 1  # this one's own start is no news
    with _signals() as signals:
        while attempt.running:
            _show(followers, listener)
            known = _note_restarts(folder, known, listener)
            teller.look()
            if (address := teller.address()) is not None:
                listener.note(f"metrics at http://{address}/metrics")
            if signals and asked_at is None:
                asked_at = time.monotonic()
                folder.stop_request.touch()
                listener.note("stopping: the step is finished and saved; once more to stop at once")
            if asked_at is not None and (_asked_again(signals) or time.monotonic() - asked_at > grace_s):
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


def _show(followers: _Followers, listener: Listener) -> None:
    for record in followers.metrics.poll():
        listener.step(record)
    for record in followers.decisions.poll():
        listener.decision(record)
    for record in followers.evaluations.poll():
        listener.evaluation(record)


def _note_restarts(folder: RunFolder, known: int, listener: Listener) -> int:
    """Say so when Ray Train has replaced the workers; returns the attempts that are known now."""
    started = _started(folder)
    if len(started) > known:
        listener.note(_restarted(started[-1]))
    return max(known, len(started))


def _restarted(record: Mapping[str, Any]) -> str:
    cause, repeated = str(record.get("cause") or "").replace("_", " "), record.get("repeated_samples") or 0
    told = [text for text in (cause, f"{repeated:,} samples are taken again" if repeated else "") if text]
    line = f"workers were lost and replaced; going on from step {record['step']}"
    return f"{line} ({'; '.join(told)})" if told else line


def _started(folder: RunFolder) -> list[Mapping[str, Any]]:
    return [r for r in read(folder.attempts) if r["event"] == "started"] if folder.attempts.exists() else []


@contextlib.contextmanager
def _signals() -> Iterator[list[float]]:
    """Collect the moments of SIGINT and SIGTERM in a list instead of dying of them."""
    heard: list[float] = []

    def hear(_: int, __: FrameType | None) -> None:
        heard.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_again(signals: list[float]) -> bool:
    """Whether a second signal came; a terminal and a parent process often deliver the same one twice."""
    return signals[-1] - signals[0] > SAME_SIGNAL_S


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
    steps = read(folder.metrics)
    found = account(read(folder.attempts), steps)
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
        "goodput_ratio": found.goodput_ratio(found.last),
        "lost_s": dict(found.lost_s),
        "restarts": dict(found.restarts),
        "parts_s": time_by_part(steps),
        "checkpoint": str(existing[-1]) if existing else None,
        "folder": str(folder.root),
        "report": str(folder.report),
        "logs": str(folder.logs),
    }
    write_json(folder.summary, summary)
    write_text(folder.report, render(load_run(folder.root)))
    return summary
