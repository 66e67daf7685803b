"""The driver of a run: check everything, plan, launch the workers, watch them, and say how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from orchestrator.config import RunConfig
from orchestrator.errors import FencedError, OrchestratorError, StorageError, StorageLostError, WorkerLostError
from orchestrator.job import Job, load
from orchestrator.launching.cluster import RayCluster, address_of, embedded_shape
from orchestrator.launching.failures import last_line, lost_mark, read_failures, to_error
from orchestrator.launching.fleet import FleetSettings
from orchestrator.launching.homes import Home, owned, stored_uri
from orchestrator.launching.jobs import hurried
from orchestrator.launching.membership import (
    Member,
    check_devices,
    registration,
    require_shared,
    seated,
    wait_for_devices,
)
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
from orchestrator.planning.cluster import ClusterShape
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
WAITED: Mapping[str, Any] = {"state": "stopped", "reason": "stop requested while it waited in its queue", "last": None}


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


class _Again(NamedTuple):
    """The workers are to be started in another way."""

    last: Mapping[str, Any] | None
    """The state that they saved, where the fleet asked them to stop."""
    cause: str = ""
    """What the next attempt is to say of the end of this one; empty: what the records say."""


class _Followers(NamedTuple):
    """The run's growing tables."""

    metrics: Follower
    evaluations: Follower
    decisions: Follower
    events: Follower
    failures: Follower

    @classmethod
    def of(cls, folder: RunFolder) -> _Followers:
        tables = (folder.metrics, folder.evaluations, folder.decisions, folder.events, folder.failure_log)
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
    require_shared(job.config, address)
    profiled = None
    if address is None:
        shape = embedded_shape()
        profiled = profile_job(job, shape)
        make_job_plan(job, shape, sizes, profiled)  # refused before there is a folder or a cluster
    if (warning := hurried(job.config)) is not None:
        listener.note(warning)
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
            pause_share=request.pause_share,
            lasting=cluster.lasting,
        )
        with _membership(job, plan, home) as member:
            if member is not None:
                write_json(folder.plan, plan.to_dict())  # whoever looks while it waits finds what it is
                home.identify()
                seat = _seat(order, cluster.shape, member, home, listener)
                if seat is None:
                    return _write_end(home, job.config, WAITED, started)
                order = seat
                check_devices(plan, member.here)
                plan = make_job_plan(order.job, order.shape, sizes, profiled)
            resumes = home.newest() is not None
            order, plan = probed(request, order, plan, sizes, profiled, listener.note, resumes=resumes)
            write_json(folder.plan, plan.to_dict())
            home.identify()
            listener.planned(plan, home.address)
            _note_resume(home, listener)
            outcome = _tracked(order, plan, home, followers, listener, member, started, embedded=cluster.embedded)
    return _write_end(home, job.config, outcome, started)


def _tracked(
    order: Order,
    plan: Plan,
    home: Home,
    followers: _Followers,
    listener: Listener,
    member: Member | None,
    started: float,
    *,
    embedded: bool,
) -> dict[str, Any]:
    """Train, with everything told to the trackers and to the hub."""
    folder, config = home.folder, order.job.config
    tracking = Tracking(
        functools.partial(
            make_trackers,
            config.telemetry.trackers,
            run=config.name,
            folder=folder.root,
            config=config.model_dump(mode="json"),
        )
    )
    tracked = _Tracked(listener, tracking)
    teller = Teller(folder, config, plan, embedded=embedded)
    state = "failed"
    try:
        outcome = _train(order, plan, home, followers, tracked, teller, member)
        state = outcome["state"]
    except OrchestratorError as error:
        with contextlib.suppress(StorageLostError):  # whatever ended the run is what its user should read
            if not isinstance(error, FencedError):
                _write_end(home, config, {"state": "failed"}, started)
        raise
    finally:
        teller.end(state)
        tracking.close(state)
        tracked.tell()
    return outcome


@contextlib.contextmanager
def _membership(job: Job, plan: Plan, home: Home) -> Iterator[Member | None]:
    """The run's part in the cluster's fleet, where it has a queue; ``plan`` is that for the whole cluster."""
    if job.config.fleet.queue is None:
        yield None
        return
    import ray

    driver = ray.get_runtime_context().get_job_id()
    facts = registration(job.config, plan, time.time())
    member = Member(facts, FleetSettings.of(job.config), home.folder, driver)
    try:
        yield member
    finally:
        member.leave()


def _seat(order: Order, shape: ClusterShape, member: Member, home: Home, listener: Listener) -> Order | None:
    """The order for the devices that the fleet gives, waited for; None where a signal came first."""
    with _signals() as signals:

        def goes_on() -> bool:
            home.check()
            return not signals

        told = wait_for_devices(member, listener.note, goes_on)
    if told is None:
        return None
    job, own = seated(order.job, shape, told)
    nodes = tuple(node for node, count in told.devices_per_node.items() for _ in range(count))
    listener.note(f"the fleet gives {told.devices} {told.device_type} on {len(set(nodes))} node(s)")
    why = "; ".join(told.reasons)
    return dataclasses.replace(order, job=job, shape=own, nodes=nodes, fewest=member.fewest, told=why)


def _note_resume(home: Home, listener: Listener) -> None:
    if (newest := home.newest()) is not None:
        listener.note(f"going on from checkpoint {newest.rpartition('/')[2]}")
    elif home.folder.metrics.exists():
        listener.note("the earlier attempt left no checkpoint: starting from the beginning")


def _train(
    order: Order,
    plan: Plan,
    home: Home,
    followers: _Followers,
    listener: Listener,
    teller: Teller,
    member: Member | None,
) -> dict[str, Any]:
    """Have the workers train to the end, started anew in another way as often as a failure or the fleet asks for it."""
    from orchestrator.launching.trainer import Fit, make_trainer  # Ray reads its environment when it is imported

    shape = order.shape
    while True:
        workers = order.job.config.scale.workers if member is not None else plan.layout.workers
        listener.note(f"starting {workers} worker{'s' if workers != 1 else ''} ...")
        if member is not None:
            member.learned.begins(time.time())
        attempt = Fit(make_trainer(order, plan, order.job.config))
        ended = _watch(attempt, home, followers, listener, teller, order.job.config.failures.stop_grace_s, member)
        if isinstance(ended, dict):
            return ended
        order = dataclasses.replace(_changed(order, home.folder, listener), cause=ended.cause)
        if member is not None:
            member.here = None
            member.avoid(order.avoid)
            home.begin_anew()
            teller.stands("waiting")
            again = _seat(order, shape, member, home, listener)
            if again is None:
                return {**WAITED, "last": ended.last}
            teller.stands("starting")
            order = again


def _changed(order: Order, folder: RunFolder, listener: Listener) -> Order:
    """The order with what is to be different after a failure."""
    change = read_json(folder.change)
    if change is None:
        return order
    folder.change.unlink()
    changed = dataclasses.replace(
        order,
        micro_batch_limit=change["micro_batch"] or order.micro_batch_limit,
        avoid=(*order.avoid, *change["avoid"]),
    )
    limit = f"at most {changed.micro_batch_limit} samples in a micro batch" if change["micro_batch"] else ""
    nodes = f"without node {', '.join(change['avoid'])}" if change["avoid"] else ""
    how = limit or nodes or "as the fleet says"
    listener.note(f"{change['reason']}: starting the workers anew, {how}")
    return changed


def _watch(
    attempt: Fit,
    home: Home,
    followers: _Followers,
    listener: Listener,
    teller: Teller,
    grace_s: float,
    member: Member | None,
) -> dict[str, Any] | _Again:
    """Show the run until it ends; a first signal asks it to save and stop, a second or the grace's end abandons it.

    Returns what rank 0 says of the end, or that the workers are to be started in another way.
    """
    folder = home.folder
    asked_at: float | None = None
    moved_at: float | None = None
    known = len(_started(folder)) + 1  # this one's own start is no news
    with _signals() as signals:
        while attempt.running:
            home.check()
            _show(followers, listener)
            _pass_on(home, teller, listener)
            known = _note_restarts(folder, known, listener)
            _note_want_of_room(attempt, folder, known, listener)
            if member is not None and moved_at is None and asked_at is None:
                moved_at = _moved(member, home, listener)
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
        if asked_at is None and (
            folder.change.exists() or (member is not None and _never_started(attempt, known, home))
        ):
            return _Again(None)
        raise _explain(attempt.error, home)
    outcome = read_json(folder.outcome)
    if outcome is None:
        raise WorkerLostError(f"the workers ended without an outcome in {home.address}: is that folder shared by all?")
    if member is not None and moved_at is not None and asked_at is None and outcome["state"] == "stopped":
        member.learned.stopped(time.monotonic() - moved_at)
        return _Again(outcome["last"], "resized" if member.has_devices else "preempted_by_the_fleet")
    return outcome


def _pass_on(home: Home, teller: Teller, listener: Listener) -> None:
    """Tell what is new of the run's place and of its metrics."""
    for text in home.news():
        listener.note(text)
    teller.look()
    if (address := teller.address()) is not None:
        listener.note(f"metrics at http://{address}/metrics")


def _moved(member: Member, home: Home, listener: Listener) -> float | None:
    """When the workers were asked to save and stop for the fleet's sake; None where they stay."""
    member.look()
    if (why := member.move()) is None:
        return None
    home.ask_to_stop()
    then = "to go on with that" if member.has_devices else "and giving its devices back"
    listener.note(f"the fleet: {why}; saving, {then}")
    return time.monotonic()


def _never_started(attempt: Fit, known: int, home: Home) -> bool:
    """Whether the workers found no place in time: the fleet is asked again."""
    controllers = type(attempt.error).__name__ == "ControllerError"
    return controllers and len(_started(home.folder)) < known and _stopped(home) is None


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
    for record in followers.failures.poll():
        if record["action"] == "restart":  # until the others are there may take a while
            listener.note(record["reason"])


def _note_restarts(folder: RunFolder, known: int, listener: Listener) -> int:
    """Say so when Ray Train has replaced the workers; returns the attempts that are known now."""
    started = _started(folder)
    if len(started) > known:
        listener.note(_restarted(started[-1]))
    return max(known, len(started))


def _note_want_of_room(attempt: Fit, folder: RunFolder, known: int, listener: Listener) -> None:
    """Say what workers that are to start wait for. Ray is asked only then: without its head it would not answer."""
    begun = len(_started(folder)) >= known and not lost_mark(folder).exists()
    if not begun and (text := attempt.room.wanting()) is not None:
        listener.note(text)


def _restarted(record: Mapping[str, Any]) -> str:
    cause, repeated = str(record.get("cause") or "").replace("_", " "), record.get("repeated_samples") or 0
    told = [text for text in (cause, f"{repeated:,} samples are taken again" if repeated else "") if text]
    line = f"workers were lost and replaced; going on from step {record['step']}"
    if cause == "resized":
        return f"now {record['workers']} workers; going on from step {record['step']}"
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
    stopped = _stopped(home)
    if stopped is None:
        said = f"Ray has given the workers up: {last_line(getattr(error, 'controller_failure', error))}"
    else:
        for failure in read_failures(home.folder):
            if failure.rank == stopped["rank"]:
                return to_error(failure)
        said = stopped["reason"]
        if stopped["message"]:
            said += f"; the last time with: {stopped['message']}"
    return WorkerLostError(
        f"{said}\nrun the same command again to go on from the last checkpoint; the logs are in {home.address}/logs"
    )


def _stopped(home: Home) -> Mapping[str, Any] | None:
    """The record of the failure after which this driver's run was given up, if one was."""
    log = [record for record in read(home.folder.failure_log) if record["driver"] == home.driver]
    return log[-1] if log and log[-1]["action"] == "stop" else None


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
    steps = read(home.folder.metrics)
    last = outcome.get("last") or _last_recorded(steps, home.folder)
    train_time_s = last.get("train_time_s") or 0.0
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


def _last_recorded(steps: Sequence[Mapping[str, Any]], folder: RunFolder) -> Mapping[str, Any]:
    """How far a run had come that could not say so at its end."""
    evaluations = read(folder.evaluations)
    known = {"evaluation": evaluations[-1]["metrics"]} if evaluations else {}
    return {**steps[-1], **known} if steps else known
