"""Learning-rate schedules as a factor of the peak rate over the share of a run that is done.

A schedule sees shares of the run's length and never steps, so it means the same at every batch and every
number of workers. Two shares belong to a step: where it starts and where it ends. The warm-up looks at the
end, so that the first step already learns; the decay looks at the start, so that the first step after the
warm-up is at the peak. A rate of ``final`` is therefore reached exactly at the end of the run, and not before.
"""

from __future__ import annotations

import math

from orchestrator.config import Constant, Cosine, Exponential, Linear, Step, WarmupStableDecay

__all__ = ["factor"]


def factor(
    schedule: Constant | Linear | Cosine | Step | Exponential | WarmupStableDecay, start: float, end: float
) -> float:
    """Return the learning rate of the step from ``start`` to ``end`` as a factor of the peak, in [0, 1].

    With w the warm-up's share: ``end / w`` where the step starts within the warm-up (at most 1), and after it the
    decay at ``p = (start - w) / (1 - w)``. The warm-up is that of Goyal et al. 2017, section 2.2 (arXiv:1706.02677).

    Args:
        schedule: Which schedule, with its warm-up.
        start: Share of the run's length done before the step, clipped to [0, 1].
        end: Share done after it, clipped to [start, 1].
    """
    start = min(max(start, 0.0), 1.0)
    end = min(max(end, start), 1.0)
    if start < schedule.warmup:
        return min(end / schedule.warmup, 1.0)
    if schedule.warmup >= 1.0:
        return 1.0
    match schedule:
        case Linear():
            return linear(_after_warmup(schedule.warmup, start), schedule.final)
        case Cosine():
            return cosine(_after_warmup(schedule.warmup, start), schedule.final)
        case Exponential():
            return exponential(_after_warmup(schedule.warmup, start), schedule.final)
        case Step():
            return step(start, schedule.at, schedule.factor)
        case WarmupStableDecay():
            return stable_decay(start, schedule.decay, schedule.final)
        case _:
            return 1.0


def _after_warmup(warmup: float, start: float) -> float:
    return min((start - warmup) / (1.0 - warmup), 1.0)


def linear(p: float, final: float) -> float:
    """Return ``1 - (1 - final) p`` for ``p`` in [0, 1]."""
    return _between(final, 1.0, 1.0 - p)


def cosine(p: float, final: float) -> float:
    """Return ``final + (1 - final) (1 + cos(pi p)) / 2`` for ``p`` in [0, 1] (Loshchilov & Hutter 2017, equation 5).

    Source: arXiv:1608.03983, without its restarts.
    """
    return _between(final, 1.0, (1.0 + math.cos(math.pi * p)) / 2.0)


def exponential(p: float, final: float) -> float:
    """Return ``final ** p`` for ``p`` in [0, 1] and ``final`` above 0."""
    return float(final**p)


def step(start: float, at: tuple[float, ...], drop: float) -> float:
    """Return ``drop ** n``, where n of the shares ``at`` (of the whole run, warm-up included) have been reached."""
    return float(drop ** sum(start >= share for share in at))


def stable_decay(start: float, decay: float, final: float) -> float:
    """Return 1 up to the last ``decay`` of the run, then a straight line to ``final`` at its end.

    Hu et al. 2024 (MiniCPM, arXiv:2404.06395), section 4; the straight line is what Hägele et al. 2024
    (arXiv:2405.18392) also start from.
    """
    begins = 1.0 - decay
    return 1.0 if start <= begins else _between(final, 1.0, (1.0 - start) / decay)


def _between(low: float, high: float, share: float) -> float:
    # Exact at both ends, and never outside of them by a rounding error.
    return min(max(low + (high - low) * share, low), high)
