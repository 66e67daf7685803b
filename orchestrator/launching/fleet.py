"""The fleet's service: one detached actor per cluster that keeps the book and tells each run its size.

Whoever comes first starts it; Ray starts it again when it dies, and it reads its book back. It never touches a run:
drivers ask it every second, and act. While it does not answer, runs keep what they have. Imports Ray when called.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig, StorageConfig
from orchestrator.errors import ClusterError, NotFoundError, OrchestratorError, RequestError, StorageError
from orchestrator.fleet.book import FIRST_RESTART_COST_S, Book, Registration, Report, Row
from orchestrator.fleet.earned import earned_devices
from orchestrator.fleet.policy import make_policy
from orchestrator.fleet.quotas import parse_quotas
from orchestrator.fleet.room import Host, Room
from orchestrator.fleet.view import Allocation, Allocations, JobView, Policy
from orchestrator.launching.cluster import RayCluster, address_of
from orchestrator.launching.homes import stored_uri
from orchestrator.launching.hub import HubClient, HubSettings
from orchestrator.launching.preflight import run_root
from orchestrator.storage.store import Store, open_store
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.observing import FleetFacts, observe_fleet
from orchestrator.telemetry.publisher import Publisher

__all__ = ["FleetActor", "FleetClient", "FleetSettings", "Patient", "Queue", "Seat", "fleet_at"]

NAME, NAMESPACE = "fleet-1", "orchestrator"  # the number changes with what is exchanged, so that versions do not meet
HEAD = "node:__internal_head__"
ANSWER_S = 10.0
READ_S = 0.5
"""Between two looks at the cluster."""
SILENT_S = 60.0
"""A driver asks every second: one that is silent for so long is gone, and its devices are free."""
RIVAL_S = 15.0
"""A run of this name that was heard of within so long is still there."""
WRITE_S = 30.0
"""Reports alone are written down so often; everything else at once."""


@dataclass(frozen=True)
class FleetSettings:
    """How the service decides and where it keeps its book; the first run on a cluster decides it.

    Where the head's environment has ``ORCHESTRATOR_FLEET_POLICY`` or ``ORCHESTRATOR_FLEET_URI``, these stand over
    ``policy`` and ``uri``, and ``ORCHESTRATOR_FLEET_QUOTAS`` is ``quotas``: who owns a cluster says how it is shared.
    """

    policy: str
    uri: str
    storage: StorageConfig
    hub: HubSettings | None = None
    """Where its metrics go; None: it tells none."""
    quotas: str = ""
    """Devices that queues are sure of, as in ``team-a=4,team-b=2``; what people set later wins."""

    @classmethod
    def of(cls, config: RunConfig) -> FleetSettings:
        """As the run's config says; by default the book is beside the runs."""
        uri = config.fleet.uri
        if uri is None:
            beside = stored_uri(config)
            uri = f"{config.checkpoint.uri.rstrip('/')}/.fleet" if beside else str(run_root(config).parent / ".fleet")
        hub = HubSettings.of(config.telemetry) if config.telemetry.enabled else None
        return cls(config.fleet.policy, uri, _reached(uri, config.storage), hub)

    def under(self, environment: Mapping[str, str]) -> FleetSettings:
        """As whoever owns the cluster wants it."""
        said = {name: environment.get(f"ORCHESTRATOR_FLEET_{name}", "") for name in ("POLICY", "URI", "QUOTAS")}
        uri = said["URI"] or self.uri
        return replace(
            self,
            policy=said["POLICY"] or self.policy,
            uri=uri,
            storage=_reached(uri, self.storage),
            quotas=said["QUOTAS"] or self.quotas,
        )


def _reached(uri: str, storage: StorageConfig) -> StorageConfig:
    """With the address of the store, so that it does not depend on who asks."""
    if not uri.startswith("s3://"):
        return storage
    from orchestrator.storage.s3 import endpoint_of  # boto3 only where S3 is used

    return storage.model_copy(update={"endpoint_url": endpoint_of(storage)})


@dataclass(frozen=True)
class Seat:
    """What a run is told: its devices, and how it stands."""

    told: Allocation | None
    """None: it waits with its checkpoint."""
    why: tuple[str, ...] = ()
    ready: bool = False
    """Whether its devices are free for it, or its own already."""
    in_the_way: bool = False
    """Whether another run waits for devices that it is to give up."""
    before: tuple[str, ...] = ()
    """Runs that wait before it."""
    running: tuple[str, ...] = ()
    """Runs that have devices."""
    refused: str = ""
    """Why it cannot take part at all."""


@dataclass(frozen=True)
class Queue:
    """Everything that a person may want to know."""

    rows: tuple[Row, ...]
    policy: str
    devices: int
    """That the fleet may use."""
    used: int
    quotas: Mapping[str, int]
    book: str
    trouble: str
    now_s: float


@dataclass
class _State:
    book: Book
    drivers: dict[str, str] = field(default_factory=dict)
    """Ray's id of each run's driver: by it a run's workers are told from everything else."""
    starts: int = 1
    """Of the service."""
    given: Mapping[str, int] = field(default_factory=dict)
    """Quotas of the environment, as they were last taken over."""


@dataclass(frozen=True)
class Patient:
    """A policy that asks no run to grow before its first steps have been timed: it would start twice to begin once."""

    policy: Policy

    def allocate(self, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]], now_s: float) -> Allocations:
        """See ``Policy``."""
        return self.policy.allocate([_settled(job) for job in jobs], nodes, now_s)


def _settled(job: JobView) -> JobView:
    if job.current is None or job.step_time:
        return job
    low, high = job.workers_range
    return replace(job, workers_range=(low, max(low, min(high, job.current.devices))))


class FleetActor:
    """What runs in the service's process. Its methods are called one at a time."""

    def __init__(self, settings: FleetSettings) -> None:
        self._settings = settings.under(os.environ)
        self._store: Store = open_store(self._settings.uri, self._settings.storage)
        self._key = f"{_cluster()}.json"
        self._state: _State | None = None
        self._room = Room()
        self._read_at = self._written_at = -SILENT_S
        self._unwritten = False
        self._trouble = ""
        self._facts = FleetFacts()
        self._publisher: Publisher | None = None

    def poll(self, facts: Registration, driver: str, report: Report | None) -> Seat:
        """A run says what it is, how far it is, and asks what it is to have. Decides where that is due."""
        state, now = self._known(), time.time()
        if (rival := self._rival(facts.name, driver, now)) is not None:
            return rival
        if state.drivers.get(facts.name) != driver or facts.name not in state.book.entries:
            known = state.book.entries.get(facts.name)
            facts = facts if known is None else replace(facts, deadline_s=known.facts.deadline_s)
            state.book = state.book.register(facts, now)
            state.drivers[facts.name] = driver
            self._unwritten = True
        if report is not None or facts.name in state.book.entries:
            state.book = state.book.report(facts.name, report or state.book.entries[facts.name].report, now)
        self._decide(now)
        self._write(now)
        return self._seat(facts.name)

    def end(self, name: str, driver: str) -> None:
        """A run is over; what another driver says of it counts for nothing."""
        state, now = self._known(), time.time()
        if state.drivers.get(name) == driver and name in state.book.entries:
            state.book = state.book.end(name)
            del state.drivers[name]
            self._changed(now)

    def queue(self) -> Queue:
        """How everybody stands."""
        state, now = self._known(), time.time()
        self._decide(now)
        devices = sum(node.devices for node in self._room.nodes().values())
        rows = tuple(state.book.rows(now))
        return Queue(
            rows=rows,
            policy=self._settings.policy,
            devices=devices,
            used=sum(row.devices for row in rows),
            quotas=dict(state.book.quotas),
            book=f"{self._store.uri}/{self._key}",
            trouble=self._trouble,
            now_s=now,
        )

    def pause(self, name: str) -> None:
        """See ``Book.pause``."""
        state = self._known()
        state.book = state.book.pause(name)
        self._changed(time.time())

    def resume(self, name: str) -> None:
        """See ``Book.resume``."""
        state = self._known()
        state.book = state.book.resume(name)
        self._changed(time.time())

    def move(self, name: str, queue: str | None, priority: int | None) -> None:
        """See ``Book.move``."""
        state = self._known()
        state.book = state.book.move(name, queue=queue, priority=priority)
        self._changed(time.time())

    def quota(self, queue: str, devices: int | None) -> None:
        """See ``Book.quota``."""
        state = self._known()
        state.book = state.book.quota(queue, devices)
        self._changed(time.time())

    def _known(self) -> _State:
        """The book, read back by the first who asks.

        Raises:
            StorageError: it cannot be read; nobody is told anything before it can.
            ConfigError: it was written by another version, or the quotas of the environment cannot be read.
        """
        if self._state is None:
            given = parse_quotas(self._settings.quotas)
            state = self._read_back()
            book = state.book.given_quotas(state.given, given)
            self._state = replace(state, book=book, given=given)
            self._publish(self._state.starts)
        return self._state

    def _read_back(self) -> _State:
        try:
            saved = json.loads(self._store.read(self._key))
        except NotFoundError:
            return _State(Book())
        book = Book.from_dict(saved["book"], time.time())
        return _State(book, dict(saved["drivers"]), saved["starts"] + 1, saved.get("given", {}))

    def _publish(self, starts: int) -> None:
        if self._settings.hub is not None:
            client = HubClient(self._settings.hub)
            self._publisher = Publisher(client, run="fleet", source="fleet", attempt=starts, sample=self._sample)

    def _sample(self, meter: Meter) -> None:
        """In the publisher's thread."""
        observe_fleet(meter, self._facts)

    def _rival(self, name: str, driver: str, now: float) -> Seat | None:
        """The answer to a second run of a name that is taken."""
        state = self._known()
        entry = state.book.entries.get(name)
        known = state.drivers.get(name)
        if entry is None or known in (None, driver) or now - entry.heard_s > RIVAL_S:
            return None
        return Seat(None, refused=f"another run called {name} is in this cluster's queue: choose another name")

    def _changed(self, now: float) -> None:
        self._unwritten = True
        self._decide(now)
        self._write(now, at_once=True)

    def _decide(self, now: float) -> None:
        """Look at the cluster, and ask the policy where that is due."""
        state = self._known()
        if now - self._read_at >= READ_S or now < self._read_at:
            self._room, self._read_at = self._room.read(_hosts(state.drivers)), now
            self._take_stock(state.book, now)
        book = state.book.forget_silent(now, SILENT_S)
        nodes = self._room.nodes()
        if book.due(nodes, now):
            try:
                policy = make_policy(self._settings.policy, quotas=book.quotas)
                decided = book.decide(Patient(policy), nodes, now)
            except OrchestratorError as error:
                self._trouble = f"no decision: {error}"
            else:
                self._trouble = ""
                self._count(book, decided)
                book = decided
            self._unwritten = True
        state.book = book
        state.drivers = {name: driver for name, driver in state.drivers.items() if name in book.entries}

    def _take_stock(self, book: Book, now: float) -> None:
        """What the metrics show until the next look."""
        self._facts = replace(
            self._facts,
            runs=tuple(_waiting(row, now) for row in book.rows(now)),
            capacity=sum(node.devices for node in self._room.nodes().values()),
            earned=sum(map(earned_devices, book.entries.values())),
        )

    def _count(self, before: Book, after: Book) -> None:
        """Take down what a decision changes for runs that run."""
        moved = [
            entry
            for name, entry in after.entries.items()
            if before.entries[name].current is not None and entry.since_s != before.entries[name].since_s
        ]
        costs = (entry.report.restart_cost_s for entry in moved)
        facts = self._facts
        self._facts = replace(
            facts,
            decisions=facts.decisions + 1,
            moves=facts.moves + len(moved),
            move_s=facts.move_s + sum(FIRST_RESTART_COST_S if cost is None else cost for cost in costs),
        )

    def _write(self, now: float, *, at_once: bool = False) -> None:
        """Write the book down: what happened at once, mere reports now and then. Its loss is told of, and no more."""
        state = self._known()
        if not (at_once or self._unwritten or now - self._written_at >= WRITE_S):
            return
        saved = {
            "book": state.book.to_dict(),
            "drivers": state.drivers,
            "starts": state.starts,
            "given": dict(state.given),
        }
        try:
            self._store.write(self._key, json.dumps(saved, indent=1).encode())
        except StorageError as error:
            self._trouble = f"the book cannot be written: {error}"
        else:
            self._unwritten, self._written_at = False, now
            self._trouble = "" if self._trouble.startswith("the book") else self._trouble

    def _seat(self, name: str) -> Seat:
        book = self._known().book
        entry = book.entries[name]
        told = book.told(name)
        waiting = sorted(
            (one for one in book.entries.values() if one.current is None and not one.paused),
            key=lambda one: (-one.facts.priority, one.submitted_s, one.facts.name),
        )
        names = [one.facts.name for one in waiting]
        return Seat(
            told=told,
            why=entry.why,
            ready=told is not None and self._room.has_place(name, told),
            in_the_way=self._room.is_in_the_way(name, {key: one.current for key, one in book.entries.items()}),
            before=tuple(names[: names.index(name)] if name in names else ()),
            running=tuple(sorted(key for key, one in book.entries.items() if one.current is not None)),
        )


class FleetClient:
    """Asks the cluster's fleet; with settings it starts one where there is none. For one thread."""

    def __init__(self, settings: FleetSettings | None = None) -> None:
        self._settings = settings
        self._actor: Any = None

    def ask(self, method: str, *values: Any) -> Any:
        """Call a method of the service.

        Raises:
            OSError: it does not answer.
            RequestError: it refuses, or there is none and this client starts none.
        """
        import ray

        try:
            if self._actor is None:
                self._actor = self._find()
            return ray.get(getattr(self._actor, method).remote(*values), timeout=ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StorageError) or not isinstance(error.cause, OrchestratorError):
                raise OSError(f"the fleet's service cannot answer: {error.cause}") from None
            raise RequestError(str(error.cause)) from None
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
            self._actor = None  # looked for again, and started anew if it is gone for good
            raise OSError(f"the fleet's service does not answer: {type(error).__name__}") from None

    def _find(self) -> Any:
        import ray

        if self._settings is None:
            try:
                return ray.get_actor(NAME, NAMESPACE)
            except ValueError:
                raise RequestError(
                    "there is no fleet on this cluster: one begins with the first run that names a queue, as in "
                    "`orchestrator submit JOB --queue team-a`"
                ) from None
        options = {
            "name": NAME,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "resources": {HEAD: 0.001},  # what the cluster cannot live without
            "max_restarts": -1,
        }
        return ray.remote(FleetActor).options(**options).remote(self._settings)


@contextlib.contextmanager
def fleet_at(address: str | None) -> Iterator[FleetClient]:
    """The fleet of the cluster at ``address``, or of that which ``RAY_ADDRESS`` names, for a person who asks.

    Raises:
        ClusterError: the cluster cannot be reached, or its fleet does not answer.
        RequestError: it has no fleet.
    """
    where = address_of(address)
    with tempfile.TemporaryDirectory() as logs, RayCluster.connect(where, log=Path(logs) / "ray.log"):
        try:
            yield FleetClient()
        except OSError as error:
            raise ClusterError(f"{error}; is the head up? `orchestrator doctor` looks closer") from None


def _waiting(row: Row, now: float) -> tuple[str, str, int, float]:
    return row.name, row.queue, row.devices, now - row.since_s if row.state == "waiting" else 0.0


def _hosts(drivers: Mapping[str, str]) -> dict[str, Host]:
    """Every machine that is alive, and who holds what of it. A run's workers are in placement groups of its driver."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    held = _held(drivers)
    found = {}
    for node in ray.nodes():
        name, resources = node["NodeID"], node["Resources"]
        if not node["Alive"] or name not in free:
            continue
        unit = "GPU" if resources.get("GPU") else "CPU"
        own = {run: shares[name].get(unit, 0.0) for run, shares in held.items() if name in shares}
        total = resources.get(unit, 0.0)
        found[name] = Host(_device_type(resources, unit), total, free[name].get(unit, 0.0), own)
    return found


def _held(drivers: Mapping[str, str]) -> dict[str, dict[str, dict[str, float]]]:
    """Resources by run and node that placement groups of the runs' drivers hold."""
    from ray.util import placement_group_table

    runs = {driver: run for run, driver in drivers.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number, group in placement_group_table().items():
        run = runs.get(number[-8:])  # the id of a placement group ends in that of its job
        if run is None or group["state"] not in ("CREATED", "RESCHEDULING"):
            continue
        for index, node in group["bundles_to_node_id"].items():
            share = found.setdefault(run, {}).setdefault(node, {})
            for resource, amount in group["bundles"][index].items():
                share[resource] = share.get(resource, 0.0) + amount
    return found


def _device_type(resources: Mapping[str, float], unit: str) -> str:
    if unit == "CPU":
        return "cpu"
    names = sorted(key.partition(":")[2] for key in resources if key.startswith("accelerator_type:"))
    return names[0] if names else "gpu"


def _cluster() -> str:
    """Names this cluster: a service that is started again reads its own book."""
    import ray

    return re.sub(r"\W+", "-", str(ray.get_runtime_context().gcs_address))
