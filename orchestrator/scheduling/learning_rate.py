"""The learning rate, and what goes with it, when the batch becomes k times the one a recipe was tuned at.

1. One step at k times the batch is worth ``gain`` reference steps, ``(1 + Bn/B0) / (1 + Bn/B)`` with Bn the noise
   scale: AdaScale (Johnson et al. 2020, arXiv:2007.05105, equation 5). SGD's rate grows by the gain: k while the batch
   is small against the noise, flat above.
2. Adam's step is normalised, so its rate grows by the root of that (Malladi et al. 2022, arXiv:2205.10287, the square
   root rule of the SDE). Capped by the root of the gain it saturates before the fall that follows at B = Bn
   (Li et al. 2024, arXiv:2405.14578). LAMB's trust ratio takes out what the gain would add: root of k (You et al.
   2020, arXiv:1904.00962).
3. Averages keep their length in samples: beta2^k, momentum^k (k at most 4: an assumption, beyond it the average is
   shorter than a few steps), and eps / sqrt(k), since the root of the second moment falls as the gradient's noise
   does (Malladi et al. 2022). torch's momentum is a sum, not a mean: a gradient moves the weights by
   1 / (1 - momentum) times the rate in all. With less momentum each gradient therefore enters with the weight
   (1 - momentum^k) / (1 - momentum): sums and steps keep their size, also amid a run. AdamW's decay keeps its
   timescale in samples: lambda' eta' = k lambda eta (Wang & Aitchison 2024, arXiv:2405.13698).
4. Until the noise scale is known k counts as 4 at most.

At the reference batch all is the recipe's own, to the bit. ``none`` changes nothing at all; ``linear`` (Goyal et al.
2017, arXiv:1706.02677), ``sqrt`` and ``adascale`` set the rate as named, and the companions as above: what they follow
from is the batch, not the rule for the rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from orchestrator.config import LAMB, SGD, Adam, AdamW, Rule
from orchestrator.errors import ConfigError, did_you_mean
from orchestrator.scheduling.noise_scale import NoiseScale, gain

__all__ = ["LARGEST_UNMEASURED", "RULES", "Scaling", "ema_decay", "ramp", "scale", "step_worth"]

RULES: tuple[Rule, ...] = get_args(Rule)
LARGEST_UNMEASURED = 4.0
"""What k counts as at most while the noise scale is not known."""
LARGEST_MOMENTUM_POWER = 4.0
LOWEST_BETA2 = 0.5
"""Below it a second moment is hardly an average. Assumption; reached at k = 693 from 0.999, and k = 14 from 0.95."""


@dataclass(frozen=True)
class Scaling:
    """What another batch does to the optimizer's settings.

    ``learning_rate``, ``eps`` and ``weight_decay`` are factors on the recipe's; ``beta2`` and ``momentum`` are values,
    None where the optimizer has none. ``gradient`` is the weight with which a gradient enters momentum's sum.
    """

    learning_rate: float = 1.0
    beta2: float | None = None
    eps: float = 1.0
    weight_decay: float = 1.0
    momentum: float | None = None
    gradient: float = 1.0


def scale(
    rule: Rule,
    optimizer: SGD | Adam | AdamW | LAMB,
    noise_scale: float | NoiseScale | None,
    reference_batch: float,
    batch: float,
) -> Scaling:
    """Return how ``optimizer``'s settings follow from ``reference_batch`` to ``batch``, both in samples.

    Args:
        rule: One of ``RULES``.
        optimizer: The recipe's, as tuned at the reference batch.
        noise_scale: In samples; None while it is not known. Of one known only from below, the lower bound is used.
        reference_batch: Samples per step the recipe was tuned at.
        batch: Samples per step now.

    Raises:
        ConfigError: there is no such rule.
    """
    if rule not in RULES:
        raise ConfigError(f"policy.rule={rule!r}: there is no such rule; {did_you_mean(rule, RULES)}")
    k = batch / reference_batch
    momentum = optimizer.momentum if isinstance(optimizer, SGD) else None
    if k == 1.0 or rule == "none":
        return Scaling(beta2=None if isinstance(optimizer, SGD) else optimizer.beta2, momentum=momentum)
    counted = k if noise_scale is not None else min(k, LARGEST_UNMEASURED)
    rate = _rate(rule, optimizer, counted, _gain(noise_scale, reference_batch, batch, counted))
    if isinstance(optimizer, SGD):
        momentum = optimizer.momentum ** min(k, LARGEST_MOMENTUM_POWER)
        return Scaling(rate, momentum=momentum, gradient=(1.0 - momentum) / (1.0 - optimizer.momentum))
    return Scaling(
        learning_rate=rate,
        # Never below the floor, unless the recipe's own is.
        beta2=max(optimizer.beta2**k, min(optimizer.beta2, LOWEST_BETA2)),
        eps=1.0 / math.sqrt(k),
        weight_decay=k / rate if isinstance(optimizer, AdamW) else 1.0,
    )


def step_worth(noise_scale: NoiseScale | None, reference_batch: int, batch: int) -> float:
    """Return the reference samples that a step of ``batch`` is worth: the reference batch times the gain.

    At the reference batch exactly that; until the noise scale is known the batch, four reference batches at most.
    """
    if batch == reference_batch:
        return float(batch)
    if noise_scale is None:
        return min(batch, LARGEST_UNMEASURED * reference_batch)
    return float(reference_batch * gain(noise_scale.counted, reference_batch, batch))


def ema_decay(decay: float, k: float) -> float:
    """Return the decay of a model's moving average at k times the batch (Busbridge et al. 2023, arXiv:2307.13813)."""
    return float(decay**k)


def ramp(current: float, target: float, memory: float) -> float:
    """Return the next step's factor of the learning rate on its way from ``current`` to ``target``.

    Down at once; up by equal ratios, a doubling in about the 1 / (1 - ``memory``) steps that the optimizer's mean of
    gradients (beta1 or momentum) remembers, and exactly onto the target. ``current`` is above 0.
    """
    if target <= current:
        return target
    return min(target, current * float(2.0 ** (1.0 - memory)))


def _gain(noise_scale: float | NoiseScale | None, reference_batch: float, batch: float, counted: float) -> float:
    if noise_scale is None:
        return counted
    if isinstance(noise_scale, NoiseScale):
        noise_scale = noise_scale.counted
    return float(gain(noise_scale, reference_batch, batch))


def _rate(rule: Rule, optimizer: SGD | Adam | AdamW | LAMB, k: float, gained: float) -> float:
    match rule:
        case "linear":
            return k
        case "sqrt":
            return math.sqrt(k)
        case "adascale":
            return gained
        case _:
            pass
    if isinstance(optimizer, SGD):
        return gained
    return math.sqrt(k) if isinstance(optimizer, LAMB) else math.sqrt(gained)
