"""From a policy's name to the policy."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import ConfigError, did_you_mean
from orchestrator.fleet.fair import FairPolicy
from orchestrator.fleet.fifo import FifoPolicy
from orchestrator.fleet.goodput import GoodputPolicy
from orchestrator.fleet.view import Policy

__all__ = ["POLICIES", "make_policy"]

POLICIES = ("fifo", "fair", "goodput")


def make_policy(name: str = "goodput", *, quotas: Mapping[str, int] | None = None) -> Policy:
    """The policy of that name, with the devices that each queue is sure of.

    Raises:
        ConfigError: there is no such policy, or a quota is no number of devices.
    """
    sure = dict(quotas or {})
    match name:
        case "fifo":
            return FifoPolicy(sure)
        case "fair":
            return FairPolicy(sure)
        case "goodput":
            return GoodputPolicy(sure)
    raise ConfigError(f"no fleet policy is called {name!r}: {did_you_mean(name, POLICIES)}")
