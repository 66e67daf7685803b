"""From what the config asks for to the policy that answers."""

from __future__ import annotations

from orchestrator.config import Fixed, Ramp, RunConfig
from orchestrator.scheduling.adaptive import GoodputPolicy
from orchestrator.scheduling.fixed import FixedPolicy
from orchestrator.scheduling.observation import Policy
from orchestrator.scheduling.ramp import RampPolicy
from orchestrator.scheduling.reach import Reach

__all__ = ["make_policy", "measures_noise"]


def make_policy(config: RunConfig) -> Policy:
    """The policy of ``config.policy``, within what ``config.layout`` pins."""
    reach = Reach.of(config.layout)
    match config.policy:
        case Fixed():
            return FixedPolicy()
        case Ramp():
            return RampPolicy(config.policy, reach)
        case settings:
            return GoodputPolicy(settings, reach)


def measures_noise(config: RunConfig, batch: int) -> bool:
    """Whether a run needs to know its gradient noise: not at a batch that is, and stays, the recipe's own."""
    return not (isinstance(config.policy, Fixed) and batch == config.recipe.batch)
