"""A run's part in the fleet, on the driver's side: what it says of itself, and what it is told."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from orchestrator.config import Goodput, RunConfig
from orchestrator.errors import ClusterError, RequestError
from orchestrator.fleet.book import Registration, Report
from orchestrator.fleet.view import Allocation
from orchestrator.job import Job
from orchestrator.launching.fleet import FleetClient, FleetSettings, Seat
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.adaptive import batch_range
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.records import Follower

__all__ = ["Learned", "Member", "registration", "require_shared", "seated", "why_to_move"]

POLL_S = 1.0
FIT_S = 10.0
"""Between two fits of the step-time model."""
REFUSED_S = 20.0
"""For so long a name that is taken is asked for again: an earlier driver of this run may have just died."""


def require_shared(config: RunConfig, address: str | None) -> None:
    """Refuse a queue where there is nobody to share with, and workers that are no whole device.

    Raises:
        RequestError: names the remedy.
    """
    if config.fleet.queue is None:
        return
    if address is None:
        raise RequestError(
            f"fleet.queue={config.fleet.queue!r} needs a cluster that runs share: give --address HOST:PORT or set "
            "RAY_ADDRESS, or submit it; without a queue the run has this machine to itself"
        )
    if config.scale.cpus_per_worker != 1 and config.scale.accelerators_per_worker == 0:
        raise RequestError(
            f"scale.cpus_per_worker={config.scale.cpus_per_worker:g}: in a queue each worker on CPUs takes one: set "
            "scale.cpus_per_worker=1"
        )


def registration(config: RunConfig, plan: Plan, now_s: float) -> Registration:
    """What a run says of itself when it arrives; ``plan`` is that for the whole cluster."""
    workers = config.scale.workers
    low, high = _batches(config, plan)
    micro = config.layout.micro_batch
    largest = high if plan.device == "cpu" else plan.layout.micro_batch
    return Registration(
        name=config.name,
        reference_batch=config.recipe.batch,
        batch_range=(low, high),
        micro_batch_range=(1, largest) if micro == "auto" else (micro, micro),
        workers_range=workers if isinstance(workers, tuple) else (workers, workers),
        priority=config.fleet.priority,
        queue=config.fleet.queue or "default",
        deadline_s=None if config.fleet.deadline_s is None else now_s + config.fleet.deadline_s,
    )


def _batches(config: RunConfig, plan: Plan) -> tuple[int, int]:
    """Global batches that the run's own policy may come to."""
    policy, reference = config.policy, config.recipe.batch
    if not isinstance(policy, Goodput):
        return plan.layout.global_batch, plan.layout.global_batch
    return batch_range(policy, reference, plan.train_samples)


def seated(job: Job, shape: ClusterShape, told: Allocation) -> tuple[Job, ClusterShape]:
    """Job and cluster as they are for a run that has just these devices."""
    config = job.config
    scale = config.scale.model_copy(update={"workers": told.devices})
    layout = config.layout
    batch = config.recipe.batch if layout.global_batch == "auto" else layout.global_batch
    if batch % told.devices:  # only where the run's policy may choose another batch
        layout = layout.model_copy(update={"global_batch": told.layout.global_batch})
    own = dataclasses.replace(
        shape,
        nodes=len(told.devices_per_node),
        cpus=told.devices * scale.cpus_per_worker,
        accelerators=0 if told.device_type == "cpu" else told.devices,
    )
    return dataclasses.replace(job, config=config.model_copy(update={"scale": scale, "layout": layout})), own


class Learned:
    """What a run has learned of itself, from its records: step times by device type, noise, what a restart costs."""

    def __init__(self, folder: RunFolder) -> None:
        self._metrics, self._attempts = Follower(folder.metrics), Follower(folder.attempts)
        self._nodes: dict[int, int] = {}
        self._times: dict[str, StepTimes] = {}
        self._last: Mapping[str, Any] = {}
        self._began_at: float | None = None
        self._starting_s: float | None = None
        self._stopping_s = 0.0

    def close(self) -> None:
        """Look no more."""
        self._metrics.close()
        self._attempts.close()

    def begins(self, now_s: float) -> None:
        """Workers are being started."""
        self._began_at = now_s

    def stopped(self, took_s: float) -> None:
        """They were asked to save and stop, and did."""
        self._stopping_s = took_s

    def look(self, device_type: str) -> None:
        """Take in what was recorded since the last look."""
        for record in self._attempts.poll():
            if record["event"] == "started":
                self._nodes[record["attempt"]] = len(set(record.get("nodes") or ())) or 1
        for record in self._metrics.poll():
            self._last = record
            if self._began_at is not None and record["time"] >= self._began_at:
                self._starting_s, self._began_at = record["time"] - self._began_at, None
            self._times[device_type] = self._timed(self._times.get(device_type, StepTimes()), record)

    def report(self) -> Report:
        """As the fleet wants it."""
        progress, length = self._last.get("progress", 0.0), self._last.get("length")
        models = {kind: model for kind, times in self._times.items() if (model := times.model()) is not None}
        return Report(
            progress=progress,
            remaining_progress=None if length is None else max(0.0, length - progress),
            noise_scale=self._last.get("noise_scale"),
            step_time=models or None,
            restart_cost_s=None if self._starting_s is None else self._starting_s + self._stopping_s,
        )

    def _timed(self, times: StepTimes, record: Mapping[str, Any]) -> StepTimes:
        """A step on which the gradient noise was measured is longer than others, and does not count."""
        if record.get("skipped") or record.get("noise_cost_s"):
            return times
        return times.observe(
            nodes=self._nodes.get(record["attempt"], 1),
            workers=record["workers"],
            micro_batch=record["micro_batch"],
            accumulation=record["accumulation"],
            step_time_s=record["step_time_s"],
            accumulation_time_s=record.get("micro_batch_time_s"),
        )


class Member:
    """Asks the fleet every second, in a thread, so that a service that is away holds nobody up; end it by ``leave``."""

    def __init__(self, facts: Registration, settings: FleetSettings, folder: RunFolder, driver: str) -> None:
        self.learned = Learned(folder)
        self.here: Allocation | None = None
        """Where its workers are."""
        self._facts = facts
        self._driver = driver
        self._client = FleetClient(settings)
        self._seat: Seat | None = None
        self._report: Report | None = None
        self._fitted_at = -FIT_S
        self._away = ""
        self._avoid: frozenset[str] = frozenset()
        self._refused_at: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="fleet", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Take in what the run has recorded, and have it told."""
        if self.here is None:
            return
        self.learned.look(self.here.device_type)
        if time.monotonic() - self._fitted_at >= FIT_S:
            self._report, self._fitted_at = self._learned(), time.monotonic()

    def avoid(self, nodes: Collection[str]) -> None:
        """Tell the fleet which nodes the run will not use any more; what it was offered before counts no longer."""
        if frozenset(nodes) != self._avoid:
            self._avoid, self._seat = frozenset(nodes), None
            self._report = self._learned()

    def offer(self) -> Allocation | None:
        """Devices on which it can start now.

        Raises:
            RequestError: it cannot take part.
        """
        seat = self._seat
        if seat is None:
            return None
        if seat.refused:
            self._refused_at = self._refused_at or time.monotonic()
            if time.monotonic() - self._refused_at > REFUSED_S:
                raise RequestError(seat.refused)
        else:
            self._refused_at = None
        if seat.told is None or not self._avoid.isdisjoint(seat.told.devices_per_node):
            return None  # or an answer to what was asked before
        return seat.told if seat.ready else None

    def move(self) -> str | None:
        """Why its workers are to save and stop now; None where they stay."""
        return None if self._away or self._seat is None or self.here is None else why_to_move(self._seat, self.here)

    @property
    def fewest(self) -> int:
        """Workers with which the run can do."""
        return self._facts.workers_range[0]

    @property
    def has_devices(self) -> bool:
        """Whether the fleet gives it any, wherever they are and whoever still holds them."""
        return self._seat is not None and self._seat.told is not None

    def standing(self) -> str:
        """How it waits, as a person wants to read it."""
        seat, queue = self._seat, self._facts.queue
        if seat is None or self._away:
            return f"waiting in queue {queue}: {self._away or 'asking the fleet'}"
        if seat.told is not None:
            return f"waiting in queue {queue}: others are giving its devices back"
        if seat.why == ("paused",):
            return f"paused in queue {queue}, until `orchestrator queue resume {self._facts.name}`"
        place = f"{len(seat.before)} before it" if seat.before else "next in turn"
        before = f" ({', '.join(seat.before)})" if seat.before else ""
        running = f"; running: {', '.join(seat.running)}" if seat.running else ""
        return f"waiting in queue {queue}: {place}{before}; {'; '.join(filter(None, seat.why))}{running}"

    def leave(self) -> None:
        """The run has ended, however it did."""
        self._end.set()
        self._thread.join()
        self.learned.close()
        try:
            self._client.ask("end", self._facts.name, self._driver)
        except (OSError, RequestError):
            return  # it will be forgotten, as it says nothing any more

    def _learned(self) -> Report:
        return dataclasses.replace(self.learned.report(), avoid=self._avoid)

    def _ask(self) -> None:
        while not self._end.is_set():
            report = self._report
            try:
                self._seat = self._client.ask("poll", self._facts, self._driver, report)
                self._away = ""
            except (OSError, RequestError) as error:
                self._away = str(error)
            self._end.wait(POLL_S)


def why_to_move(seat: Seat, here: Allocation) -> str | None:
    """Why a run is to leave the devices that it has now; None where it stays."""
    told = seat.told
    if seat.refused or (told is not None and dict(told.devices_per_node) == dict(here.devices_per_node)):
        return None
    if not (seat.ready or seat.in_the_way or told is None):
        return None  # until its new devices are free it keeps those that it has
    return "; ".join(seat.why) or "its devices are given to others"


def wait_for_devices(member: Member, note: Callable[[str], None], goes_on: Callable[[], bool]) -> Allocation | None:
    """Wait in the queue until there are devices; None where ``goes_on`` says no. Each change of its standing is noted.

    Raises:
        RequestError: it cannot take part.
    """
    told_at, text = time.monotonic(), ""
    while goes_on():
        if (found := member.offer()) is not None:
            member.here = found
            return found
        if (standing := member.standing()) != text and time.monotonic() - told_at >= POLL_S:
            note(standing)
            told_at, text = time.monotonic(), standing
        time.sleep(POLL_S / 4)
    return None


def check_devices(plan: Plan, told: Allocation | None) -> None:
    """Refuse a run that was planned for CPUs where the fleet gives accelerators.

    Raises:
        ClusterError: names the remedy.
    """
    if told is not None and (plan.device == "cpu") != (told.device_type == "cpu"):
        raise ClusterError(
            f"the run is planned for {plan.device}, and the fleet of this cluster gives {told.device_type} devices: "
            "leave scale.accelerators_per_worker at auto, or take no part with fleet.queue=none"
        )
