"""The gradient noise scale: what one step at a given batch is worth, measured from the norms a step leaves behind.

Notation: ``G`` the true gradient, ``Sigma`` the covariance of one sample's gradient, ``Bn = tr(Sigma) / |G|^2`` the
noise scale in samples (McCandlish, Kaplan & Amodei 2018, arXiv:1812.06162, equation 2.9). A sampled step has ``n``
small batches of ``b`` samples, ``B = b n``.

1. One step gives unbiased ``g = |G|^2`` and ``t = tr(Sigma)``, both far too noisy to be divided (``NoiseSample``).
2. Steps of any layout are pooled with the weight ``w = b^2 n (n - 1)``. For Gaussian noise
   ``Var(g) = 4 G' Sigma G / B + 2 tr(Sigma^2) n / ((n - 1) B^2)``, and where the noise scale is hard to measure
   (B << Bn) the second term rules: ``w`` is its inverse. Elsewhere it is near enough: with half of the steps at twice
   the batch it costs 4 % of the standard error. It looks at the layout alone, because a weight that looks at the value
   biases the mean. ``t`` takes the same weight, so that both means are over the same mixture of steps.
3. The estimate is the ratio of the means, never a mean of ratios.
4. Its error is that of ``1 / Bn = mean(g) / mean(t)``, whose denominator is well known: by the delta method the
   standard error ``se`` of the mean of ``g - t / Bn``, over ``mean(t)``. Where B << Bn that is the standard error of
   ``g``; for larger batches it also holds the error of ``t``, which then is the greater part. The bounds are
   ``mean(t) / (mean(g) +- q se)`` with Student's quantile ``q`` (1.645 for many steps): 90 % nominal.
5. Noise scales drift by orders of magnitude in a run. The window grows as long as its newer and its older part agree
   and forgets the older one when they differ: adaptive windowing, Bifet & Gavaldà 2007 (ADWIN), with their exponential
   histogram, so that a window of K steps keeps about 8 log2(K / 8) sums. Where ten thousand steps are needed for one
   digit it has them; a moving average of fixed length has not. What cannot be told from chance is not cut: of a noise
   scale that grows tenfold in 1,500 measured steps the estimate lags by 20 % in the median, ``high`` is then too low
   about half of the time, and ``low`` holds (too high in 1 % of looks; measured). That is the careful side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["NoiseSample", "NoiseScale", "NoiseScaleWindow", "gain", "statistical_efficiency"]

Array = NDArray[np.float64]

FEWEST = 8
"""Steps that an estimate needs: with fewer, the spread is guessed from so little that the bounds are wider than useful
(Student's 95 % quantile is 6.3 for two steps, 2.1 for five, 1.9 for eight)."""
BLOCKS_PER_SIZE = 8
"""Blocks of one size before the two oldest are merged: a cut is placed to about 1/8 of the window. Also how many steps
pass between two looks at whether the window still agrees with itself."""
DISAGREEMENT = 3.0
"""Standard errors (normal; Student's t for few steps) between the newer and the older part that make the older one
forgotten. Assumption, chosen by simulation: 2 throws away half of a stationary window, 3.5 follows a drift later."""
SMALLEST_PART = 0.25
"""Share of the window, and ``FEWEST_IN_PART`` the steps, that either part has. Every few steps a new smallest part
would be another throw of the dice: without the share, nine of ten stationary windows were cut within 400 steps."""
FEWEST_IN_PART = 16
NOISIER = math.sqrt(3.0)
"""Ratio of tr(Sigma) from which the older half makes the mean less precise: with a standard deviation s times as large
the mean over both halves has (1 + s^2) / 4 of the newer half's variance, above 1 from s = sqrt(3)."""
Z_95 = 1.6448536269514722
"""95 % quantile of the normal distribution."""


# -- what a batch is worth ---------------------------------------------------------------------


@overload
def statistical_efficiency(noise_scale: float, reference_batch: float, batch: float) -> float: ...
@overload
def statistical_efficiency(noise_scale: float, reference_batch: float, batch: NDArray[Any]) -> Array: ...
def statistical_efficiency(noise_scale: float, reference_batch: float, batch: float | NDArray[Any]) -> float | Array:
    """Return the progress of one sample at ``batch`` relative to one at the reference batch: (Bn + B0) / (Bn + B).

    1 at the reference batch, below 1 above it, above 1 below it; 1 everywhere where the noise scale is infinite.

    Source: McCandlish, Kaplan & Amodei 2018 (arXiv:1812.06162), section 2: a run to a given loss takes
    ``E_min (1 + B / Bn)`` samples, here as the ratio of two batches.

    Args:
        noise_scale: Bn in samples, at least 0; may be infinite.
        reference_batch: B0 in samples, at least 0.
        batch: B in samples, above 0; a numpy array gives an array.
    """
    if math.isinf(noise_scale):
        return np.ones_like(batch, dtype=np.float64) if isinstance(batch, np.ndarray) else 1.0
    return (noise_scale + reference_batch) / (noise_scale + batch)


@overload
def gain(noise_scale: float, reference_batch: float, batch: float) -> float: ...
@overload
def gain(noise_scale: float, reference_batch: float, batch: NDArray[Any]) -> Array: ...
def gain(noise_scale: float, reference_batch: float, batch: float | NDArray[Any]) -> float | Array:
    """Return how many steps at the reference batch one step at ``batch`` is worth: (1 + Bn / B0) / (1 + Bn / B).

    With k = B / B0 it is k times the statistical efficiency: between 1 and k, about k where B << Bn, and never above
    1 + Bn / B0. Arguments are those of ``statistical_efficiency``, with a reference batch above 0.

    Source: AdaScale SGD, Johnson et al. 2020 (arXiv:2007.05105), the gain ratio ``(var + sqr) / (var / S + sqr)``
    with ``var / sqr = Bn / B0`` and ``S = k``.
    """
    return batch / reference_batch * statistical_efficiency(noise_scale, reference_batch, batch)


# -- one step ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseSample:
    """What one step tells about the gradient and its noise: unbiased, and very noisy."""

    gradient_sq: float
    """Estimate of |G|^2; may be negative."""
    noise_trace: float
    """Estimate of tr(Sigma), the variance of one sample's gradient summed over parameters."""
    small_batch: float
    """Samples b in a small batch."""
    small_batches: float
    """Small batches n in the step."""

    @classmethod
    def from_norms(
        cls, *, mean_small_sq: float, big_sq: float, small_batch: float, small_batches: float
    ) -> NoiseSample:
        """Solve ``E[mean_small_sq] = |G|^2 + tr(Sigma) / b`` and ``E[big_sq] = |G|^2 + tr(Sigma) / (b n)`` for both.

        Source: McCandlish, Kaplan & Amodei 2018 (arXiv:1812.06162), appendix A.1.

        Args:
            mean_small_sq: Mean over the small batches of the squared norm of their mean gradients.
            big_sq: Squared norm of the mean gradient over all of the step's samples.
            small_batch: b in samples. Of unequal small batches: their harmonic mean, because 1/b is what is averaged.
            small_batches: n above 1, so that b n is the step's batch. Of unequal small batches that is a fraction:
                halves of 3 and 5 samples are b = 3.75 and n = 8 / 3.75.

        Raises:
            ValueError: a norm is negative or not finite, b is not above 0, or n not above 1.
        """
        if not (math.isfinite(mean_small_sq) and math.isfinite(big_sq) and mean_small_sq >= 0 and big_sq >= 0):
            raise ValueError(f"squared norms must be finite and at least 0, got {mean_small_sq} and {big_sq}")
        if not (math.isfinite(small_batch) and math.isfinite(small_batches) and small_batch > 0 and small_batches > 1):
            raise ValueError(
                f"the noise shows between small batches: got {small_batches} of {small_batch} samples, "
                "use more than 1 of more than 0 samples"
            )
        return cls(
            gradient_sq=(small_batches * big_sq - mean_small_sq) / (small_batches - 1.0),
            noise_trace=small_batch * small_batches * (mean_small_sq - big_sq) / (small_batches - 1.0),
            small_batch=small_batch,
            small_batches=small_batches,
        )


# -- many steps --------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseScale:
    """The noise scale in samples, with nominal 90 % bounds: 5 % below ``low`` and 5 % above ``high``."""

    value: float
    """Best estimate; infinite where no gradient stands out of the noise."""
    low: float
    """Lower bound, finite and at least 0: what decisions are made on."""
    high: float
    """Upper bound; infinite where a gradient of zero would explain the data as well."""

    @property
    def counted(self) -> float:
        """What learning rate and progress go by: the estimate, or the lower bound where there is no upper one."""
        return self.low if math.isinf(self.high) else self.value

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {_number(self.low)}"
        return f"{_number(self.value)} ({_number(self.low)} to {_number(self.high)})"


def _number(samples: float) -> str:
    return f"{samples:,.0f}" if samples >= 100 else f"{samples:.3g}"


class Block(NamedTuple):
    """Sums over consecutive steps with weights w, gradients g and traces t: all that an estimate needs of them."""

    steps: int
    w: float
    ww: float
    wg: float
    wt: float
    wwgg: float
    wwgt: float
    wwtt: float

    @classmethod
    def of(cls, sample: NoiseSample) -> Block:
        """The sums over one step (item 2 of the module's derivation)."""
        w = sample.small_batch**2 * sample.small_batches * (sample.small_batches - 1.0)
        wg, wt = w * sample.gradient_sq, w * sample.noise_trace
        return cls(1, w, w * w, wg, wt, wg * wg, wg * wt, wt * wt)

    def merged(self, other: Block) -> Block:
        """The sums over the steps of both."""
        steps, *sums = (mine + theirs for mine, theirs in zip(self, other, strict=True))
        return Block(int(steps), *sums)


STEPS, W, WW, WT = (Block._fields.index(name) for name in ("steps", "w", "ww", "wt"))


@dataclass(frozen=True)
class NoiseScaleWindow:
    """The latest steps that agree on one noise scale; a value that goes into checkpoints.

    Adding a step costs some microseconds, and a window over any number of steps is a few kilobytes.
    """

    blocks: tuple[Block, ...] = ()
    """Sums over consecutive steps, oldest first; older blocks hold more steps."""

    @property
    def steps(self) -> int:
        """Sampled steps that the window holds."""
        return sum(block.steps for block in self.blocks)

    def add(self, sample: NoiseSample) -> NoiseScaleWindow:
        """Return the window with one more step, without the older ones that no longer agree with the newer."""
        blocks = _thinned([*self.blocks, Block.of(sample)])
        if sum(block.steps for block in blocks) % BLOCKS_PER_SIZE == 0:
            blocks = blocks[_first_that_agrees(np.array(blocks)) :]
        return NoiseScaleWindow(tuple(blocks))

    def estimate(self) -> NoiseScale | None:
        """Return the noise scale with its bounds; None with fewer than ``FEWEST`` steps, or where nothing varies."""
        if self.steps < FEWEST:
            return None
        sums = np.sum(np.array(self.blocks), axis=0)
        if not sums[WT] > 0.0:
            return None
        inverse, error = (float(x) for x in _inverse_and_error(sums))
        margin = _student(Z_95, _effective_steps(sums) - 1.0) * error
        # A squared norm is not below 0: a mean that is says "small", and the bound is made of the error alone.
        ceiling, floor = max(inverse, 0.0) + margin, inverse - margin
        if not ceiling > 0.0:
            return None
        return NoiseScale(
            value=1.0 / inverse if inverse > 0.0 else math.inf,
            low=1.0 / ceiling,
            high=1.0 / floor if floor > 0.0 else math.inf,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``from_dict`` reads, ready for JSON."""
        return {"blocks": [list(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> NoiseScaleWindow:
        """Return the window that ``to_dict`` wrote, equal to it."""
        return cls(tuple(Block(*block) for block in saved["blocks"]))


def _thinned(blocks: list[Block]) -> list[Block]:
    """Merge the two oldest blocks of a size of which there are too many, and so on for the next size."""
    end = len(blocks)
    while True:
        size = blocks[end - 1].steps
        start = end
        while start > 0 and blocks[start - 1].steps == size:
            start -= 1
        if end - start <= BLOCKS_PER_SIZE:
            return blocks
        blocks[start : start + 2] = [blocks[start].merged(blocks[start + 1])]
        end = start + 1


def _first_that_agrees(blocks: Array) -> int:
    """Return the first row of ``blocks`` (oldest first) that is kept: 0 where the whole window agrees with itself."""
    older = np.cumsum(blocks, axis=0)[:-1]
    newer = np.cumsum(blocks[::-1], axis=0)[-2::-1]
    smaller = np.minimum(older[:, STEPS], newer[:, STEPS])
    fair = (smaller >= max(FEWEST_IN_PART, SMALLEST_PART * blocks[:, STEPS].sum())) & (older[:, WT] > 0.0)
    split = np.flatnonzero(fair & (newer[:, WT] > 0.0))
    if not len(split):
        return 0
    older, newer, smaller = older[split], newer[split], smaller[split]
    (inverse_old, error_old), (inverse_new, error_new) = _inverse_and_error(older.T), _inverse_and_error(newer.T)
    allowed = _student(DISAGREEMENT, smaller - 1.0) * np.hypot(error_old, error_new)
    apart = np.abs(inverse_new - inverse_old) - allowed
    if apart.max() > 0.0:
        return int(split[np.argmax(apart)]) + 1
    # The weights are blind to the values, so steps with far more noise than today's would drown today's.
    noisier = older[:, WT] * newer[:, W] > NOISIER * newer[:, WT] * older[:, W]
    drowning = split[noisier & (newer[:, STEPS] >= older[:, STEPS])]
    return int(drowning[-1]) + 1 if len(drowning) else 0


def _inverse_and_error(sums: Array) -> tuple[Array, Array]:
    """Return 1 / Bn and its standard error from the sums of a block (item 4), or from columns of them."""
    _, _, _, wg, wt, wwgg, wwgt, wwtt = sums
    inverse = wg / wt
    square = np.maximum(wwgg - 2.0 * inverse * wwgt + inverse**2 * wwtt, 0.0)
    effective = _effective_steps(sums)
    # The residuals are about their own mean, which takes one of the steps: s^2 / K with s^2 over K - 1.
    return inverse, np.sqrt(square * effective / (effective - 1.0)) / wt


def _effective_steps(sums: Array) -> Any:
    # Kish: as many steps of equal weight have a mean of this variance. No less than 2, so that there is a spread.
    return np.maximum(sums[W] ** 2 / sums[WW], 2.0)


def _student(z: float, freedom: Any) -> Any:
    """Quantile of Student's t where the normal one is ``z`` (Abramowitz & Stegun 26.7.5): 1 % off at 3 for ``Z_95``."""
    return z + (z**3 + z) / (4.0 * freedom) + (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * freedom**2)
