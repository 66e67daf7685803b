"""TEMPORARY stand-in so that other modules can be run until the real module lands here. Overwrite it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orchestrator.config import SGD
from orchestrator.scheduling.noise_scale import gain

LARGEST_UNMEASURED = 4.0


@dataclass(frozen=True)
class Scaling:
    learning_rate: float = 1.0
    beta2: float | None = None
    eps: float = 1.0
    weight_decay: float = 1.0
    momentum: float | None = None


def scale(rule: str, optimizer: Any, noise_scale: float | None, reference_batch: int, batch: int) -> Scaling:
    k = batch / reference_batch
    sgd = isinstance(optimizer, SGD)
    if k == 1 or rule == "none":
        return Scaling(1.0, None if sgd else optimizer.beta2, 1.0, 1.0, optimizer.momentum if sgd else None)
    g = float(gain(noise_scale, reference_batch, batch)) if noise_scale is not None else min(k, LARGEST_UNMEASURED)
    kk = k if noise_scale is not None else min(k, LARGEST_UNMEASURED)
    lr = {"auto": g if sgd else math.sqrt(g), "linear": kk, "sqrt": math.sqrt(kk), "adascale": g}[rule]
    if sgd:
        return Scaling(lr, momentum=optimizer.momentum ** min(k, 4))
    return Scaling(lr, optimizer.beta2**k, 1 / math.sqrt(k), k / lr, None)


def ramp(current: float, target: float, memory: float) -> float:
    if target <= current:
        return target
    up = current * 2 ** (1 - memory)
    return min(up, target)
