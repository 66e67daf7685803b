"""The policy that leaves the batch alone."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.scheduling.observation import Observation

__all__ = ["FixedPolicy"]


@dataclass(frozen=True)
class FixedPolicy:
    """The global batch stays as planned, whatever happens to the workers."""

    def decide(self, seen: Observation) -> None:  # noqa: ARG002 - nothing it could see would change its answer
        """Never a change."""
        return
