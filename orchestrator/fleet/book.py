"""The fleet's book: who is registered, who has what since when, and what was last decided; a value, without a cluster.

A service keeps one and writes it down after each change; what is read back goes on where it left off. The book never
looks at a clock: every change says when it happened. Who asks the policy when is ``due``; what it answers becomes the
book's after ``decide``, and each run asks ``told`` for its own part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.errors import ConfigError, RequestError, did_you_mean
from orchestrator.fleet.quotas import check_quotas
from orchestrator.fleet.view import Allocation, JobView, Node, Nodes, Policy
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel
from orchestrator.scheduling.goodput import rate

__all__ = ["Book", "Entry", "Registration", "Report", "Row"]

INTERVAL_S = 60.0
"""Between two decisions when nothing happens."""
SILENT_S = 900.0
"""A run that has not reported for so long is taken to be gone."""
FIRST_RESTART_COST_S = 60.0
"""Assumption, until a run has measured its own."""
VERSION = 1


@dataclass(frozen=True)
class Registration:
    """What a run says of itself when it arrives."""

    name: str
    reference_batch: int
    batch_range: tuple[int, int]
    micro_batch_range: tuple[int, int]
    workers_range: tuple[int, int]
    priority: int = 0
    queue: str = "default"
    deadline_s: float | None = None


@dataclass(frozen=True)
class Report:
    """What a run has learned of itself since."""

    progress: float
    remaining_progress: float | None = None
    noise_scale: float | None = None
    step_time: Mapping[str, StepTimeModel] | None = None
    restart_cost_s: float | None = None
    """None where it has not restarted yet."""
    avoid: frozenset[str] = frozenset()
    """Nodes that it will not use any more."""


@dataclass(frozen=True)
class Entry:
    """One run in the book."""

    facts: Registration
    submitted_s: float
    heard_s: float
    """When it last said anything."""
    counted_s: float
    """Until when ``attained_device_s`` is counted."""
    since_s: float
    """Since when it has what it has, or waits."""
    attained_device_s: float = 0.0
    restarts: int = 0
    paused: bool = False
    report: Report = field(default_factory=lambda: Report(0.0))
    current: Allocation | None = None
    why: tuple[str, ...] = ()
    """The reasons of what it has, or of why it waits."""
    said: tuple[str, int] | None = None
    """Queue and priority as its driver said them, where people have moved it since."""

    def registered(self, facts: Registration) -> Entry:
        """With what its driver says now; where that is what it said before, it stays where people have moved it."""
        if self.said != (facts.queue, facts.priority):
            return replace(self, facts=facts, said=None)
        return replace(self, facts=replace(facts, queue=self.facts.queue, priority=self.facts.priority))

    def moved(self, queue: str, priority: int) -> Entry:
        """In another queue, or of another priority."""
        said = self.said or (self.facts.queue, self.facts.priority)
        return replace(self, facts=replace(self.facts, queue=queue, priority=priority), said=said)

    def counted(self, now_s: float) -> Entry:
        """With what it has had until now."""
        devices = self.current.devices if self.current is not None else 0
        attained = self.attained_device_s + devices * max(0.0, now_s - self.counted_s)
        return replace(self, attained_device_s=attained, counted_s=max(now_s, self.counted_s))

    def view(self, now_s: float) -> JobView:
        """As a policy sees it."""
        cost = self.report.restart_cost_s
        return JobView(
            **vars(self.facts),
            submitted_s=self.submitted_s,
            age_s=max(0.0, now_s - self.submitted_s),
            attained_device_s=self.counted(now_s).attained_device_s,
            restarts=self.restarts,
            restart_cost_s=FIRST_RESTART_COST_S if cost is None else cost,
            progress=self.report.progress,
            remaining_progress=self.report.remaining_progress,
            step_time=self.report.step_time,
            noise_scale=self.report.noise_scale,
            current=self.current,
            avoid=self.report.avoid,
        )

    def given(self, answer: Allocation | None, why: Sequence[str], now_s: float) -> Entry:
        """With a policy's answer; only another place is a change."""
        before = self.counted(now_s)
        if _same_place(self.current, answer):
            return replace(before, current=answer, why=tuple(why))
        again = answer is not None and before.attained_device_s > 0.0
        return replace(before, current=answer, why=tuple(why), since_s=now_s, restarts=self.restarts + again)


@dataclass(frozen=True)
class Row:
    """One line of the queue, as a person wants to read it."""

    name: str
    queue: str
    priority: int
    state: str
    """running, waiting or paused."""
    device_type: str | None
    devices: int
    since_s: float
    ends_s: float | None
    """Expected at the present goodput; None where the run does not say how much is left, or never reported."""
    why: tuple[str, ...]


@dataclass(frozen=True)
class Book:
    """All entries by name, and when what was last decided."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)
    nodes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """As they were at the last decision."""
    decided_s: float | None = None
    changed: bool = False
    """Whether something happened since then that another decision should know of."""

    # -- what happens to runs --

    def register(self, facts: Registration, now_s: float) -> Book:
        """A run arrives, or comes back after its driver was restarted: then it keeps its place and its age.

        What its last driver avoided is forgotten with it, as it is where runs share nothing.

        Raises:
            ConfigError: a range that is none.
        """
        known = self.entries.get(facts.name)
        if known is None:
            entry = Entry(facts, submitted_s=now_s, heard_s=now_s, counted_s=now_s, since_s=now_s)
        else:
            report = replace(known.report, avoid=frozenset())
            entry = replace(known.registered(facts), heard_s=now_s, report=report)
        entry.view(now_s)  # what no policy could read is refused here
        changed = self.changed or known is None or known.facts != entry.facts or bool(known.report.avoid)
        return replace(self._with(entry), changed=changed)

    def report(self, name: str, report: Report, now_s: float) -> Book:
        """A run says how far it is; what it does not say stays as it was. Other nodes to avoid ask for a decision.

        Raises:
            RequestError: there is no such run.
        """
        entry = self._known(name).counted(now_s)
        before = entry.report
        merged = replace(
            report,
            noise_scale=before.noise_scale if report.noise_scale is None else report.noise_scale,
            step_time=before.step_time if report.step_time is None else report.step_time,
            restart_cost_s=before.restart_cost_s if report.restart_cost_s is None else report.restart_cost_s,
        )
        changed = self.changed or report.avoid != before.avoid
        return replace(self._with(replace(entry, report=merged, heard_s=now_s)), changed=changed)

    def end(self, name: str) -> Book:
        """A run is over, or was stopped.

        Raises:
            RequestError: there is no such run.
        """
        self._known(name)
        left = {key: entry for key, entry in self.entries.items() if key != name}
        return replace(self, entries=left, changed=True)

    def forget_silent(self, now_s: float, silent_s: float = SILENT_S) -> Book:
        """Without the runs that have not reported for ``silent_s``."""
        left = {name: entry for name, entry in self.entries.items() if now_s - entry.heard_s <= silent_s}
        return self if len(left) == len(self.entries) else replace(self, entries=left, changed=True)

    # -- what people ask for --

    def pause(self, name: str) -> Book:
        """The run gives its devices back at the next decision and gets none until it is resumed."""
        return self._asked(replace(self._known(name), paused=True))

    def resume(self, name: str) -> Book:
        """The run takes part again, where its age puts it."""
        return self._asked(replace(self._known(name), paused=False))

    def move(self, name: str, *, queue: str | None = None, priority: int | None = None) -> Book:
        """Put a run into another queue, or give it another priority."""
        entry = self._known(name)
        facts = entry.facts
        return self._asked(
            entry.moved(facts.queue if queue is None else queue, facts.priority if priority is None else priority)
        )

    def quota(self, queue: str, devices: int | None) -> Book:
        """Make a queue sure of so many devices; None takes its quota away.

        Raises:
            ConfigError: not a whole number of at least 0.
        """
        quotas = {name: count for name, count in self.quotas.items() if name != queue}
        if devices is not None:
            quotas[queue] = devices
        check_quotas(quotas)
        return replace(self, quotas=quotas, changed=True)

    def given_quotas(self, before: Mapping[str, int], given: Mapping[str, int]) -> Book:
        """With quotas that are written down elsewhere; where those are as they were ``before``, people's own stay.

        Raises:
            ConfigError: not whole numbers of at least 0.
        """
        book = self
        for queue in sorted({*before, *given}):
            if before.get(queue) != given.get(queue):
                book = book.quota(queue, given.get(queue))
        return book

    # -- deciding --

    def due(self, nodes: Mapping[str, tuple[str, int]], now_s: float) -> bool:
        """Whether to decide: something happened, the nodes are others, or a minute has passed with runs in the book."""
        if self.decided_s is None or self.changed or Nodes(nodes) != Nodes(self.nodes):
            return bool(self.entries) or self.changed
        return bool(self.entries) and now_s - self.decided_s >= INTERVAL_S

    def decide(self, policy: Policy, nodes: Mapping[str, tuple[str, int]], now_s: float) -> Book:
        """Ask the policy, and give every run its answer. Paused runs get nothing."""
        asked = [entry.view(now_s) for entry in self.entries.values() if not entry.paused]
        answers = policy.allocate(asked, nodes, now_s)
        entries = {}
        for name, entry in self.entries.items():
            answer = answers.get(name)
            if entry.paused:
                why: Sequence[str] = ("paused",)
            else:
                why = answer.reasons if answer is not None else (answers.waiting.get(name, ""),)
            entries[name] = entry.given(answer, why, now_s)
        return replace(self, entries=entries, nodes=dict(Nodes(nodes)), decided_s=now_s, changed=False)

    def told(self, name: str) -> Allocation | None:
        """What a run is to have; None: it waits with its checkpoint.

        Raises:
            RequestError: there is no such run.
        """
        return self._known(name).current

    def rows(self, now_s: float) -> list[Row]:
        """The queue: running runs first, then waiting and paused ones, each by submission."""
        order = {"running": 0, "waiting": 1, "paused": 2}
        found = [(_row(entry, now_s), entry.submitted_s) for entry in self.entries.values()]
        return [row for row, submitted_s in sorted(found, key=lambda one: (order[one[0].state], one[1], one[0].name))]

    # -- writing down --

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "version": VERSION,
            "entries": [_entry_to_dict(entry) for entry in self.entries.values()],
            "quotas": dict(self.quotas),
            "nodes": {name: list(node) for name, node in self.nodes.items()},
            "decided_s": self.decided_s,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], now_s: float) -> Book:
        """The inverse of ``to_dict``; every run counts as heard of now, since nobody listened meanwhile.

        Raises:
            ConfigError: written by another version.
        """
        if saved.get("version") != VERSION:
            raise ConfigError(
                f"the fleet's book is of version {saved.get('version')!r}, and this program reads {VERSION}: "
                "use the version that wrote it, or move the file away to begin a new one"
            )
        entries = [_entry_from_dict(one, now_s) for one in saved["entries"]]
        return cls(
            entries={entry.facts.name: entry for entry in entries},
            quotas=dict(saved["quotas"]),
            nodes={name: Node(*node) for name, node in saved["nodes"].items()},
            decided_s=saved["decided_s"],
            changed=True,
        )

    def _known(self, name: str) -> Entry:
        if name not in self.entries:
            raise RequestError(f"no run called {name!r} is in the queue: {did_you_mean(name, self.entries)}")
        return self.entries[name]

    def _with(self, entry: Entry) -> Book:
        return replace(self, entries={**self.entries, entry.facts.name: entry})

    def _asked(self, entry: Entry) -> Book:
        return replace(self._with(entry), changed=True)


def _same_place(one: Allocation | None, other: Allocation | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device_type == other.device_type and dict(one.devices_per_node) == dict(other.devices_per_node)


def _row(entry: Entry, now_s: float) -> Row:
    here = entry.current
    state = "paused" if entry.paused and here is None else "waiting" if here is None else "running"
    return Row(
        name=entry.facts.name,
        queue=entry.facts.queue,
        priority=entry.facts.priority,
        state=state,
        device_type=None if here is None else here.device_type,
        devices=0 if here is None else here.devices,
        since_s=entry.since_s,
        ends_s=_expected_end_s(entry, now_s),
        why=entry.why,
    )


def _expected_end_s(entry: Entry, now_s: float) -> float | None:
    here, report = entry.current, entry.report
    model = (report.step_time or {}).get(here.device_type) if here is not None else None
    if here is None or model is None or report.remaining_progress is None:
        return None
    noise = float(entry.facts.reference_batch) if report.noise_scale is None else report.noise_scale
    rated = rate(model, noise, entry.facts.reference_batch, len(here.devices_per_node), here.layout)
    return now_s + report.remaining_progress / rated.goodput


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    report = entry.report
    models = None if report.step_time is None else {kind: m.to_dict() for kind, m in report.step_time.items()}
    plain = replace(entry, report=replace(report, step_time=None))
    saved = {name: getattr(plain, name) for name in ("submitted_s", "counted_s", "since_s", "attained_device_s")}
    saved |= {"restarts": entry.restarts, "paused": entry.paused, "why": list(entry.why)}
    saved["said"] = None if entry.said is None else list(entry.said)
    return saved | {
        "facts": asdict(entry.facts),
        "report": {**asdict(plain.report), "step_time": models, "avoid": sorted(report.avoid)},
        "current": None if entry.current is None else asdict(entry.current),
    }


def _entry_from_dict(saved: Mapping[str, Any], now_s: float) -> Entry:
    facts, report, current = dict(saved["facts"]), dict(saved["report"]), saved["current"]
    for name in ("batch_range", "micro_batch_range", "workers_range"):
        facts[name] = tuple(facts[name])
    if report["step_time"] is not None:
        report["step_time"] = {kind: StepTimeModel.from_dict(one) for kind, one in report["step_time"].items()}
    report["avoid"] = frozenset(report.get("avoid", ()))
    if current is not None:
        current = Allocation(
            current["device_type"],
            dict(current["devices_per_node"]),
            Layout(**current["layout"]),
            tuple(current["reasons"]),
        )
    own = {key: value for key, value in saved.items() if key not in ("facts", "report", "current", "why", "said")}
    said = saved.get("said")
    return Entry(
        facts=Registration(**facts),
        report=Report(**report),
        current=current,
        why=tuple(saved["why"]),
        said=None if said is None else (said[0], said[1]),
        heard_s=now_s,
        **own,
    )
