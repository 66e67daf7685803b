"""When to save: so often that neither saving nor repeating what a failure took costs more than it must.

With a save that holds the run up for C seconds and a mean time M between failures, the least is lost at

    W = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C    for C < 2M,    W = M otherwise

between two saves (Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37; its first factor is Young's of 1974). C is
measured in the run. Of M little is known at first: failures so far over the time so far, beginning from one failure in
``PRIOR_S``. Assumption: a spot machine's day.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.config import CheckpointConfig

__all__ = ["Cadence", "optimal_interval_s"]

PRIOR_S = 86_400.0
UNMEASURED_S = 60.0
"""Before the first save has shown its cost."""
SHORTEST_S = 10.0
COST_MEMORY = 0.5
"""Weight of what saves have cost before against the newest."""


def optimal_interval_s(cost_s: float, between_failures_s: float) -> float:
    """Return the seconds between saves that lose the least, for a save's cost and the mean time between failures."""
    share = cost_s / (2.0 * between_failures_s)
    if share >= 1.0:
        return between_failures_s
    longer = 1.0 + math.sqrt(share) / 3.0 + share / 9.0
    return math.sqrt(2.0 * cost_s * between_failures_s) * longer - cost_s


@dataclass(frozen=True)
class Cadence:
    """When the next save is due; a value that each save replaces. Times are s on one clock that never goes back."""

    settings: CheckpointConfig
    began_at: float
    saved_at: float
    failures: int = 0
    """Attempts before this one that did not end by themselves."""
    lived_s: float = 0.0
    """From the run's first attempt to the beginning of this one."""
    cost_s: float = 0.0
    progress: float = 0.0
    """Reference samples at the last save, or at the beginning of this attempt."""

    @classmethod
    def begin(
        cls, settings: CheckpointConfig, now: float, *, failures: int, lived_s: float, progress: float = 0.0
    ) -> Cadence:
        """The cadence of an attempt that begins ``now``."""
        return cls(settings, now, now, failures, lived_s, progress=progress)

    def due(self, step: int, progress: float, now: float, *, uploading: bool = False) -> bool:
        """Whether the state after optimizer step ``step`` should be saved; ``progress`` is that before it.

        By time or progress not while the save before is ``uploading``; a save by steps, of which there is one moment,
        waits for it.
        """
        steps, samples = self.settings.interval_steps, self.settings.interval_samples
        by_steps = steps is not None and step % steps == 0
        by_progress = samples is not None and progress // samples > self.progress // samples
        by_time = now - self.saved_at >= self.interval_s(now)
        return by_steps or (not uploading and (by_time or by_progress))

    def interval_s(self, now: float) -> float:
        """Seconds between two saves, as set or as computed."""
        if self.settings.interval_s != "auto":
            return self.settings.interval_s
        if not self.cost_s:
            return UNMEASURED_S
        between_failures_s = (PRIOR_S + self.lived_s + now - self.began_at) / (1.0 + self.failures)
        return max(SHORTEST_S, optimal_interval_s(self.cost_s, between_failures_s))

    def saved(self, now: float, cost_s: float, progress: float) -> Cadence:
        """After a save, at ``progress``, that ended ``now`` and held the run up for ``cost_s``."""
        cost_s = cost_s if not self.cost_s else COST_MEMORY * self.cost_s + (1.0 - COST_MEMORY) * cost_s
        return replace(self, saved_at=now, cost_s=cost_s, progress=progress)
