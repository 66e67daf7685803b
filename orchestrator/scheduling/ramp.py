"""The policy that follows batches written down beforehand, by progress."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import Ramp
from orchestrator.scheduling.observation import Decision, Observation
from orchestrator.scheduling.reach import Reach

__all__ = ["RampPolicy"]


@dataclass(frozen=True)
class RampPolicy:
    """From each share of the run's length on, its batch; rounded to what the workers can take."""

    settings: Ramp
    reach: Reach

    def decide(self, seen: Observation) -> Decision | None:
        """The batch that belongs to where the run is, where it is not in use."""
        if seen.length is None:
            return None
        share = seen.progress / seen.length
        due = [batch for at, batch in zip(self.settings.at, self.settings.batches, strict=True) if at <= share]
        if not due:
            return None
        layout = self.reach.nearest(due[-1], seen)
        if layout.global_batch == seen.layout.global_batch:
            return None
        rounded = "" if layout.global_batch == due[-1] else f" (asked for {due[-1]})"
        reason = f"batch {layout.global_batch}{rounded} from {share:.0%} of the run on, as written down"
        return Decision("ramp", layout, reason)
