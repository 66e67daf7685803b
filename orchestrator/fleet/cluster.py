"""The cluster as the allocation needs it: device types, capacities, packed sizes, and which runs stand where they say.

Packed sizes are powers of two inside a node and whole nodes beyond. On nodes of one size that is a power of two, any
set of them that fits by number also fits by place, largest first, so that a solver need only count devices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from orchestrator.errors import ConfigError
from orchestrator.fleet.view import Allocation, JobView, Nodes

__all__ = ["Fleet", "Shunned", "packed_sizes"]

WHOLE_NODES = tuple(range(1, 9)) + tuple(unit * 2**octave for octave in range(1, 14) for unit in range(5, 9))
"""Numbers of whole nodes that are considered: each up to 8, then four in each doubling."""


@dataclass(frozen=True)
class Fleet:
    """Jobs in the order of their submission, and the cluster by device type."""

    jobs: tuple[JobView, ...]
    nodes: Nodes
    types: tuple[str, ...]
    capacity: tuple[int, ...]
    """Devices of each type."""
    node_size: tuple[int, ...]
    """Devices of the largest node of each type."""
    current: tuple[Allocation | None, ...]
    """Of each job, where its nodes are still there and have room for it, and it avoids none of them."""

    @classmethod
    def of(cls, jobs: Sequence[JobView], nodes: Mapping[str, tuple[str, int]]) -> Fleet:
        """Sort both, and find out which jobs run where they say.

        Raises:
            ConfigError: two jobs of one name.
        """
        ordered = tuple(sorted(jobs, key=lambda job: (job.submitted_s, job.name)))
        names = [job.name for job in ordered]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"two runs are called {twice[0]}: every run of a fleet needs a name of its own")
        known = Nodes(nodes)
        types = tuple(sorted({node.device_type for node in known.values() if node.devices}))
        sizes = [[node.devices for node in known.values() if node.device_type == kind] for kind in types]
        return cls(
            ordered, known, types, tuple(map(sum, sizes)), tuple(map(max, sizes)), tuple(_standing(ordered, known))
        )

    @property
    def devices(self) -> int:
        """Of all types."""
        return sum(self.capacity)

    def nodes_needed(self, kind: int, devices: int) -> int:
        """The fewest nodes of a type that hold so many devices."""
        return -(-devices // self.node_size[kind])

    def sizes(self, job: JobView, kind: int, most: int, current: int = 0) -> tuple[int, ...]:
        """Packed sizes of a job on a type, up to ``most``; its smallest and its ``current`` one always.

        Only those that the nodes it does not avoid could hold, if nothing else ran.
        """
        low, high = job.workers_range
        found = packed_sizes(low, min(high, max(most, low)), self.node_size[kind], self.capacity[kind])
        if job.avoid or self._uneven[kind]:
            found = tuple(size for size in found if self._has_room(kind, size, job.avoid))
            found = found or tuple(size for size in (low,) if self._has_room(kind, size, job.avoid))
        if low <= current <= min(high, self.capacity[kind]) and current not in found:
            return tuple(sorted((*found, current)))
        return found

    def _has_room(self, kind: int, devices: int, avoid: Collection[str]) -> bool:
        """Whether so many devices would fit without some nodes, if all others were free."""
        size, sizes = self.node_size[kind], self._sizes_without(kind, avoid)
        whole, rest = divmod(devices, size)
        return len(sizes) >= whole and all(one >= size for one in sizes[:whole]) and (sizes[whole:] or [0])[0] >= rest

    def _sizes_without(self, kind: int, avoid: Collection[str]) -> list[int]:
        """Devices of each node of a type but for some nodes, the largest first."""
        if avoid:
            return [size for name, size in self._by_size[kind] if name not in avoid]
        return [size for _, size in self._by_size[kind]]

    @cached_property
    def _by_size(self) -> list[list[tuple[str, int]]]:
        """Nodes of each type and their devices, the largest first."""
        found: dict[str, list[tuple[str, int]]] = {kind: [] for kind in self.types}
        for name, node in self.nodes.items():
            if node.devices:
                found[node.device_type].append((name, node.devices))
        return [sorted(of_kind, key=lambda one: -one[1]) for of_kind in found.values()]

    @cached_property
    def _uneven(self) -> list[bool]:
        """Of each type, whether its nodes differ: then the number of devices does not say what they hold."""
        return [of_kind[0][1] != of_kind[-1][1] for of_kind in self._by_size]

    @property
    def shunned(self) -> tuple[Shunned, ...]:
        """What runs that avoid the same nodes may have together: a solver that counts devices must know of it.

        There is one for each type, and each set of nodes that a run avoids; it holds for all runs that avoid at least
        those nodes.
        """
        known, found = frozenset(self.nodes), []
        for avoid in sorted({job.avoid & known for job in self.jobs if job.avoid}, key=sorted):
            owners = frozenset(index for index, job in enumerate(self.jobs) if job.avoid >= avoid)
            for kind in range(len(self.types)):
                devices = sum(self._sizes_without(kind, avoid))
                if devices < self.capacity[kind]:
                    found.append(Shunned(kind, owners, devices))
        return tuple(found)


@dataclass(frozen=True)
class Shunned:
    """Runs that avoid the same nodes, and the devices of one type that the other nodes have."""

    kind: int
    owners: frozenset[int]
    devices: int


@lru_cache(maxsize=4096)
def packed_sizes(low: int, high: int, node_size: int, capacity: int) -> tuple[int, ...]:
    """Sizes from ``low`` to ``high`` that pack; where none does, ``low`` itself, if the capacity allows it."""
    inside = {2**power for power in range(node_size.bit_length()) if 2**power <= node_size} | {node_size}
    whole = {count * node_size for count in WHOLE_NODES}
    found = tuple(sorted(size for size in inside | whole if low <= size <= min(high, capacity)))
    return found or ((low,) if low <= capacity else ())


def _standing(jobs: Sequence[JobView], nodes: Nodes) -> list[Allocation | None]:
    free = {name: node.devices for name, node in nodes.items()}
    found: list[Allocation | None] = []
    for job in jobs:
        here = job.current
        if here is not None and job.avoid.isdisjoint(here.devices_per_node) and _fits(here, nodes, free):
            for name, count in here.devices_per_node.items():
                free[name] -= count
            found.append(here)
        else:
            found.append(None)
    return found


def _fits(here: Allocation, nodes: Nodes, free: Mapping[str, int]) -> bool:
    return here.devices > 0 and all(
        name in nodes and nodes[name].device_type == here.device_type and 0 < count <= free[name]
        for name, count in here.devices_per_node.items()
    )
