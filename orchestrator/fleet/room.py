"""What a cluster's machines have for the fleet: all of their devices but those that somebody else holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.fleet.view import Allocation, Node

__all__ = ["Host", "Room"]

READINGS = 3
"""What others hold is the middle of so many readings: what is free and what runs hold is not known at one moment."""


@dataclass(frozen=True)
class Host:
    """One machine as it was read: devices that it has and that are free, and those that runs of the fleet hold."""

    device_type: str
    total: float
    free: float
    held: Mapping[str, float] = field(default_factory=dict)
    """By run."""

    @property
    def others(self) -> float:
        """Devices that are neither free nor a run's."""
        return max(0.0, self.total - self.free - sum(self.held.values()))


@dataclass(frozen=True)
class Room:
    """The machines by name, as the latest readings show them."""

    hosts: Mapping[str, Host] = field(default_factory=dict)
    others: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The latest readings of what others hold."""

    def read(self, hosts: Mapping[str, Host]) -> Room:
        """With one more reading; machines that are gone are forgotten."""
        others = {name: (*self.others.get(name, ()), host.others)[-READINGS:] for name, host in hosts.items()}
        return Room(dict(hosts), others)

    def nodes(self) -> dict[str, Node]:
        """What a policy may give away. Where any machine has accelerators, only those."""
        whole = {
            name: Node(host.device_type, max(0, int(host.total - statistics.median_high(self.others[name]) + 1e-6)))
            for name, host in self.hosts.items()
        }
        accelerated = {name: node for name, node in whole.items() if node.device_type != "cpu"}
        return accelerated or whole

    def has_place(self, run: str, told: Allocation) -> bool:
        """Whether the run could start where it is told to: what it needs there is free, or its own."""
        return all(
            name in self.hosts and self.hosts[name].free + self.hosts[name].held.get(run, 0.0) >= count - 1e-6
            for name, count in told.devices_per_node.items()
        )

    def is_in_the_way(self, run: str, told: Mapping[str, Allocation | None]) -> bool:
        """Whether another run waits for devices that this one holds and is not to have any more."""
        for name, host in self.hosts.items():
            if host.held.get(run, 0.0) <= _share(told.get(run), name):
                continue
            for other, allocation in told.items():
                lacks = _share(allocation, name) - host.held.get(other, 0.0)
                if other != run and lacks > host.free + 1e-6:
                    return True
        return False


def _share(allocation: Allocation | None, node: str) -> int:
    return 0 if allocation is None else allocation.devices_per_node.get(node, 0)
