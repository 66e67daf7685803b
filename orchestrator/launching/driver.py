"""The driver of a run: check everything, plan, launch the workers, watch them, and say how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from orchestrator.config import RunConfig
from orchestrator.errors import FencedError, OrchestratorError, StorageError, StorageLostError, WorkerLostError
from orchestrator.job import Job, load
from orchestrator.launching.cluster import RayCluster, address_of, embedded_shape
from orchestrator.launching.failures import read_failures, to_error
from orchestrator.launching.homes import Home, owned, stored_uri
from orchestrator.launching.planner import make_job_plan, probed
from orchestrator.launching.preflight import (
    RunRequest,
    check_same_run,
    finished_summary,
    prepare,
    write_identity,
)
from orchestrator.launching.profiling import profile_job
from orchestrator.launching.telling import Teller
from orchestrator.launching.worker import Order
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import Plan
from orchestrator.storage.folder import RunFolder, read_json, write_json, write_text
from orchestrator.storage.stored_run import StoredRun
from orchestrator.telemetry.accounting import account, time_by_part
from orchestrator.telemetry.records import Follower, read
from orchestrator.telemetry.report import load_run, render
from orchestrator.telemetry.trackers import Tracking, make_trackers, require_trackers

if TYPE_CHECKING:
    from orchestrator.launching.trainer import Fit

__all__ = ["Listener", "run"]

POLL_S = 0.25
SAME_SIGNAL_S = 0.5


class Listener(Protocol):
    """Hears of a run as it goes. Six verbs: one for each thing a person watches, and how it is to be shown."""

    def planned(self, plan: Plan, folder: str) -> None: ...
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

    def planned(self, plan: Plan, folder: str) -> None:
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
    events: Follower

    @classmethod
    def of(cls, folder: RunFolder) -> _Followers:
        tables = (folder.metrics, folder.evaluations, folder.decisions, folder.events)
        return cls(*map(Follower, tables))


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
    if (uri := stored_uri(job.config)) is not None:
        StoredRun.reached(uri, job.config.storage)  # before data are prepared, which may take long
    sizes = prepare(job)
    address = address_of(request.address)
    profiled = None
    if address is None:
        shape = embedded_shape()
        profiled = profile_job(job, shape)
        make_job_plan(job, shape, sizes, profiled)  # refused before there is a folder or a cluster
    with owned(job.config, listener.note, fresh=request.fresh) as home:
        check_same_run(request, job, home.folder)
        if (done := finished_summary(request, home.folder)) is not None:
            listener.note(f"{job.config.name} is finished already; start it anew with --fresh")
            return done
        for note in home.choose_checkpoint(request):
            listener.note(note)
        return _launch(request, job, home, sizes, profiled, listener, started)


def _launch(
    request: RunRequest,
    job: Job,
    home: Home,
    sizes: tuple[int, int],
    profiled: tuple[Profile | None, str] | None,
    listener: Listener,
    started: float,
) -> dict[str, Any]:
    folder = home.folder
    folder.change.unlink(missing_ok=True)
    followers = _Followers.of(folder)
    for follower in followers:
        follower.poll()
    with RayCluster.connect(address_of(request.address), log=folder.logs / "ray.log") as cluster:
        profiled = profiled or profile_job(job, cluster.shape)  # the embedded cluster has the shape it was traced for
        plan = make_job_plan(job, cluster.shape, sizes, profiled)
        write_identity(request, job, folder)
        order = Order(
            job=job,
            root=folder.root,
            shape=cluster.shape,
            driver=home.driver,
            profile=profiled[0],
            stored=home.stored,
            lasting=cluster.lasting,
        )
        resumes = home.newest() is not None
        order, plan = probed(request, order, plan, sizes, profiled, listener.note, resumes=resumes)
        write_json(folder.plan, plan.to_dict())
        home.identify()
        listener.planned(plan, home.address)
        _note_resume(home, listener)
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
        state = "failed"
        try:
            outcome = _train(order, plan, home, followers, listener, teller)
            state = outcome["state"]
        except OrchestratorError as error:
            with contextlib.suppress(StorageLostError):  # whatever ended the run is what its user should read
                if not isinstance(error, FencedError):
                    _write_end(home, job.config, {"state": "failed"}, started)
            raise
        finally:
            teller.end(state)
            tracking.close(state)
            tracked.tell()
    return _write_end(home, job.config, outcome, started)


def _note_resume(home: Home, listener: Listener) -> None:
    if (newest := home.newest()) is not None:
        listener.note(f"going on from checkpoint {newest.rpartition('/')[2]}")
    elif home.folder.metrics.exists():
        listener.note("the earlier attempt left no checkpoint: starting from the beginning")


def _train(
    order: Order, plan: Plan, home: Home, followers: _Followers, listener: Listener, teller: Teller
) -> dict[str, Any]:
    """Have the workers train to the end, started anew in another way as often as a failure asks for that."""
    from orchestrator.launching.trainer import Fit, make_trainer  # Ray reads its environment when it is imported

    while True:
        attempt = Fit(make_trainer(order, plan, order.job.config))
        outcome = _watch(attempt, home, followers, listener, teller, order.job.config.failures.stop_grace_s)
        if outcome is not None:
            return outcome
        order = _changed(order, home.folder, listener)


def _changed(order: Order, folder: RunFolder, listener: Listener) -> Order:
    """The order with what is to be different after a failure."""
    change = read_json(folder.change) or {}
    folder.change.unlink()
    changed = dataclasses.replace(
        order,
        micro_batch_limit=change["micro_batch"] or order.micro_batch_limit,
        avoid=(*order.avoid, *change["avoid"]),
    )
    limit = f"at most {changed.micro_batch_limit} samples in a micro batch" if change["micro_batch"] else ""
    nodes = f"without node {', '.join(change['avoid'])}" if change["avoid"] else ""
    listener.note(f"{change['reason']}: starting the workers anew, {limit or nodes}")
    return changed


def _watch(
    attempt: Fit, home: Home, followers: _Followers, listener: Listener, teller: Teller, grace_s: float
) -> dict[str, Any] | None:
    """Show the run until it ends; a first signal asks it to save and stop, a second or the grace's end abandons it.

    Returns what rank 0 says of the end, or None where the workers are to be started in another way.
    """
    folder = home.folder
    asked_at: float | None = None
    known = len(_started(folder)) + 1  # this one's own start is no news
    with _signals() as signals:
        while attempt.running:
            home.check()
            _show(followers, listener)
            for text in home.news():
                listener.note(text)
            known = _note_restarts(folder, known, listener)
            teller.look()
            if (address := teller.address()) is not None:
                listener.note(f"metrics at http://{address}/metrics")
            if signals and asked_at is None:
                asked_at = time.monotonic()
                home.ask_to_stop()
                listener.note("stopping: the step is finished and saved; once more to stop at once")
            if asked_at is not None and (_asked_again(signals) or time.monotonic() - asked_at > grace_s):
                raise WorkerLostError(
                    "stopped without saving; run the same command again to go on from the last checkpoint"
                )
            time.sleep(POLL_S)
    _fetch_end(home, failed=attempt.error is not None)
    _show(followers, listener)
    if attempt.error is not None:
        if folder.change.exists() and asked_at is None:
            return None
        raise _explain(attempt.error, home)
    outcome = read_json(folder.outcome)
    if outcome is None:
        raise WorkerLostError(f"the workers ended without an outcome in {home.address}: is that folder shared by all?")
    return outcome


def _fetch_end(home: Home, *, failed: bool) -> None:
    try:
        home.fetch_end()
    except StorageError as error:
        if not failed:  # what failed before is what its user should read
            raise StorageLostError(f"the workers have ended, but what they say cannot be read: {error}") from None


def _show(followers: _Followers, listener: Listener) -> None:
    for record in followers.metrics.poll():
        listener.step(record)
    for record in followers.decisions.poll():
        listener.decision(record)
    for record in followers.evaluations.poll():
        listener.evaluation(record)
    for record in followers.events.poll():
        listener.note(record["text"])


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


def _explain(error: BaseException, home: Home) -> OrchestratorError:
    """The error as the user should read it: the worker's own words first, Ray's only where there are none."""
    causes = [failure for failure in read_failures(home.folder) if not failure.is_collateral]
    if causes:
        return to_error(causes[0])
    log = read(home.folder.failure_log)
    reason = log[-1]["reason"] if log else "the workers were lost"
    return WorkerLostError(
        f"{reason}; the last time with: {_first_line(error)}\n"
        f"run the same command again to go on from the last checkpoint; the logs are in {home.address}/logs"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _write_end(home: Home, config: RunConfig, outcome: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Write ``summary.json`` and the report; a failed run has both too, from what it recorded."""
    try:
        summary = _summary(home, config, outcome, started)
        write_json(home.folder.summary, summary)
        write_text(home.folder.report, render(load_run(home.folder.root)))
        home.leave_results()
    except StorageError as error:
        raise StorageLostError(f"the run has {outcome['state']}, but its summary cannot be written: {error}") from None
    return summary


def _summary(home: Home, config: RunConfig, outcome: Mapping[str, Any], started: float) -> dict[str, Any]:
    last = outcome.get("last") or {}
    train_time_s = last.get("train_time_s") or 0.0
    steps = read(home.folder.metrics)
    found = account(read(home.folder.attempts), steps)
    return {
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
        "checkpoint": home.newest(),
        "folder": home.address,
        "report": f"{home.address}/{home.folder.report.name}",
        "logs": f"{home.address}/{home.folder.logs.name}",
    }
