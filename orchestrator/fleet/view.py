"""What a fleet policy sees and what it answers: runs and nodes in, an allocation for each run out; all of it values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from orchestrator.errors import ConfigError
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel

__all__ = ["Allocation", "Allocations", "JobView", "Node", "Nodes", "Policy"]


class Node(NamedTuple):
    """One machine: the type of its devices, and how many of them the fleet may use."""

    device_type: str
    devices: int


class Nodes(Mapping[str, Node]):
    """The machines by name; iterates in the order of their names, whatever order they were given in.

    Raises:
        ConfigError: a number of devices that is not a whole number of at least 0.
    """

    def __init__(self, nodes: Mapping[str, tuple[str, int]]) -> None:
        self._nodes = {name: Node(*nodes[name]) for name in sorted(nodes)}
        for name, node in self._nodes.items():
            if node.devices != int(node.devices) or node.devices < 0:
                raise ConfigError(f"node {name}: {node.devices} devices; give a whole number, 0 or more")

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"Nodes({self._nodes!r})"


@dataclass(frozen=True)
class Allocation:
    """Devices of one type, by node, and what each step looks like on them."""

    device_type: str
    devices_per_node: Mapping[str, int]
    layout: Layout
    reasons: tuple[str, ...] = field(default=(), compare=False)
    """Why, in plain sentences; two allocations are equal whatever their reasons."""

    @property
    def devices(self) -> int:
        """All of them; one worker runs on each."""
        return sum(self.devices_per_node.values())


@dataclass(frozen=True)
class JobView:
    """Everything a policy may know of a run. Times are on one clock, in s; progress is in reference samples."""

    name: str
    submitted_s: float
    age_s: float
    """Since it was submitted."""
    attained_device_s: float
    """Devices times seconds it has had so far."""
    restarts: int
    restart_cost_s: float
    """What another restart would cost: from the last step before to the first step after."""
    progress: float
    remaining_progress: float | None
    """None where only time or a target ends it."""
    step_time: Mapping[str, StepTimeModel | None] | None
    """By device type; a type that is missing, or None, has not been timed."""
    noise_scale: float | None
    """In samples; None before it is known."""
    reference_batch: int
    batch_range: tuple[int, int]
    micro_batch_range: tuple[int, int]
    workers_range: tuple[int, int]
    priority: int = 0
    """Each point doubles its weight."""
    queue: str = "default"
    deadline_s: float | None = None
    """On the clock of ``submitted_s``."""
    current: Allocation | None = None
    """Where it runs now; None while it waits."""
    avoid: frozenset[str] = frozenset()
    """Nodes that it will not use, because its workers failed there again and again."""

    def __post_init__(self) -> None:
        for name in ("batch_range", "micro_batch_range", "workers_range"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"run {self.name}: {name} is ({low}, {high}); give two rising numbers from 1 on")


class Allocations(dict[str, Allocation | None]):
    """The answer: an allocation for each run that is to run, None for each that waits, and why those wait."""

    def __init__(self, allocations: Mapping[str, Allocation | None], waiting: Mapping[str, str] | None = None) -> None:
        super().__init__(allocations)
        self.waiting: dict[str, str] = dict(waiting or {})


class Policy(Protocol):
    """Decides who gets how many devices. One verb, because a policy answers and never acts."""

    def allocate(self, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]], now_s: float) -> Allocations:
        """An answer for every job. Pure: the same to the same numbers, in whatever order they come."""
        ...
