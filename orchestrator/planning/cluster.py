"""What a cluster offers a run: workers' worth of CPUs, accelerators and memory, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.config import ScaleConfig
from orchestrator.errors import ClusterError
from orchestrator.planning.accelerators import Accelerator

__all__ = ["ClusterShape"]


@dataclass(frozen=True)
class ClusterShape:
    """Totals of a cluster. ``accelerator`` is Ray's type label, such as "A100", or empty."""

    nodes: int
    cpus: float
    accelerators: int = 0
    accelerator: str = ""
    memory_bytes: int = 0
    """Host memory that workers of a node may take together; 0 where it is not known."""
    device_memory_bytes: int = 0
    """Of one accelerator; 0: as the table has it."""
    network_gbit_per_s: float = 0.0
    """Of a node, to the others; 0: what is usual beside its accelerators."""
    imagined: bool = False
    """Whether it does not exist, so that its size follows what is asked."""
    tpus: int = 0
    """Which no run can use: they are counted so that none falls back to CPUs in silence."""

    @classmethod
    def imagine(
        cls,
        scale: ScaleConfig,
        accelerator: Accelerator,
        *,
        workers: int,
        nodes: int | None = None,
        network_gbit_per_s: float = 0.0,
    ) -> ClusterShape:
        """A cluster that holds just these workers, on as few nodes as their accelerators are usually built into.

        Raises:
            ClusterError: more nodes than workers.
        """
        if nodes is not None and nodes > workers:
            raise ClusterError(f"--nodes {nodes}: there are only {workers} workers; give at most {workers}")
        return cls(
            nodes=nodes or math.ceil(workers / accelerator.per_node),
            cpus=workers * scale.cpus_per_worker,
            accelerators=0 if accelerator.is_cpu else workers,
            accelerator="" if accelerator.is_cpu else accelerator.name,
            network_gbit_per_s=network_gbit_per_s,
            imagined=True,
        )

    def accelerators_per_worker(self, scale: ScaleConfig) -> int:
        """Resolve ``scale.accelerators_per_worker``: "auto" takes one where the cluster has any.

        Raises:
            ClusterError: all it has are TPUs.
        """
        if scale.accelerators_per_worker != 0 and self.tpus and not self.accelerators:
            raise ClusterError(
                f"the cluster's accelerators are {self.tpus} TPUs, and DeepSpeed, which takes every step here, has no "
                "device for them: use a cluster with GPUs, or scale.accelerators_per_worker=0 to train on its CPUs"
            )
        if scale.accelerators_per_worker == "auto":
            return 1 if self.accelerators else 0
        return scale.accelerators_per_worker

    def workers(self, scale: ScaleConfig) -> int:
        """How many workers the run starts with: the number asked for, or the most of a range that fit.

        Raises:
            ClusterError: the cluster holds fewer workers than the run needs.
        """
        low, high = scale.workers if isinstance(scale.workers, tuple) else (scale.workers, scale.workers)
        room = self.room(scale)
        if room < low:
            raise ClusterError(self._too_small(scale, low, room))
        return min(high, room)

    def room(self, scale: ScaleConfig) -> int:
        """How many such workers it holds, by CPUs and, where they take any, by accelerators.

        Raises:
            ClusterError: all it has are TPUs.
        """
        by_cpu = int(self.cpus / scale.cpus_per_worker + 1e-9)
        per_worker = self.accelerators_per_worker(scale)
        return min(by_cpu, self.accelerators // per_worker) if per_worker else by_cpu

    def _too_small(self, scale: ScaleConfig, needed: int, room: int) -> str:
        has = f"{self.cpus:g} CPUs and {self.accelerators} accelerators on {self.nodes} node(s)"
        per_worker = self.accelerators_per_worker(scale)
        needs = f"{scale.cpus_per_worker:g} CPU and {per_worker} accelerators each"
        remedies = [f"scale.workers={room}"] if room else []
        if self.cpus < needed * scale.cpus_per_worker:
            remedies.append(f"a smaller scale.cpus_per_worker (now {scale.cpus_per_worker:g})")
        if self.accelerators < needed * per_worker:
            remedies.append("scale.accelerators_per_worker=0")
        if not room:
            remedies.append("use a larger cluster")
        return f"scale.workers={needed} needs {needs}, and the cluster has {has}: set {', or '.join(remedies)}"
