"""What a cluster offers a run: workers' worth of CPUs and accelerators, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import ScaleConfig
from orchestrator.errors import ClusterError

__all__ = ["ClusterShape"]


@dataclass(frozen=True)
class ClusterShape:
    """Totals of a cluster that exists. ``accelerator`` is Ray's type label, such as "A100", or empty."""

    nodes: int
    cpus: float
    accelerators: int = 0
    accelerator: str = ""

    def accelerators_per_worker(self, scale: ScaleConfig) -> int:
        """Resolve ``scale.accelerators_per_worker``: "auto" takes one where the cluster has any."""
        if scale.accelerators_per_worker == "auto":
            return 1 if self.accelerators else 0
        return scale.accelerators_per_worker

    def workers(self, scale: ScaleConfig) -> int:
        """How many workers the run starts with: the number asked for, or the most of a range that fit.

        Raises:
            ClusterError: the cluster holds fewer workers than the run needs.
        """
        low, high = scale.workers if isinstance(scale.workers, tuple) else (scale.workers, scale.workers)
        room = self._room(scale)
        if room < low:
            raise ClusterError(self._too_small(scale, low, room))
        return min(high, room)

    def _room(self, scale: ScaleConfig) -> int:
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
