"""Is a change good for the loss? What the loss was about to do, and how far it has gone from that since.

The trend is a straight line of the loss over the logarithm of progress, fitted by weighted least squares with
forgetting; most training curves are near a line there over a doubling of progress (Hestness et al. 2017,
arXiv:1712.00409, read as local power laws). They bend upwards, so a line extrapolated promises too much: only
``TRUST`` of the promised fall is expected. Assumption, not studied carefully: half.

A loss averaged over a batch has a variance of v / batch. Losses are therefore weighted by their batch, and v, the
variance of a single sample's loss, carries from one batch to another.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Deviation", "LossTrend"]

MEMORY = 0.35
"""e-folding length of the weights, in units of the logarithm of progress: about the last third of a run."""
TRUST = 0.5
FEWEST = 8
"""Effective steps without which there is no trend."""


@dataclass(frozen=True)
class LossTrend:
    """Sums of a weighted regression of y = loss on x = log(progress), relative to the last x."""

    x: float = 0.0
    steps: float = 0.0
    squares: float = 0.0
    """Sum of squared weights, the weight of the newest step being its batch."""
    weight: float = 0.0
    wx: float = 0.0
    wy: float = 0.0
    wxx: float = 0.0
    wxy: float = 0.0
    wyy: float = 0.0

    def after(self, progress: float, loss: float, batch: float) -> LossTrend:
        """The trend with one more step that ended at ``progress`` (above 0, reference samples)."""
        x = math.log(progress)
        shift = x - self.x if self.weight else 0.0
        keep = math.exp(-shift / MEMORY)
        # Sums are kept relative to the newest x, where all is small and nothing cancels.
        wxx = self.wxx - 2.0 * shift * self.wx + shift * shift * self.weight
        return LossTrend(
            x=x,
            steps=keep * self.steps + 1.0,
            squares=keep * keep * self.squares + batch * batch,
            weight=keep * self.weight + batch,
            wx=keep * (self.wx - shift * self.weight),
            wy=keep * self.wy + batch * loss,
            wxx=keep * wxx,
            wxy=keep * (self.wxy - shift * self.wy),
            wyy=keep * self.wyy + batch * loss * loss,
        )

    def expected(self, progress: float) -> tuple[float, float] | None:
        """Loss expected at ``progress`` and the variance of that expectation; None before there is a trend."""
        if self.effective_steps < FEWEST:
            return None
        mean_x, mean_y = self.wx / self.weight, self.wy / self.weight
        spread = self.wxx / self.weight - mean_x * mean_x
        slope = (self.wxy / self.weight - mean_x * mean_y) / spread if spread > 0 else 0.0
        ahead = math.log(progress) - self.x
        # A fall is believed by half, a rise in full: either way the loss may only be higher than this by chance.
        trusted = TRUST * slope if slope < 0 else slope
        distance = ahead - mean_x
        variance = self.residual_variance / self.effective_steps
        return (
            mean_y - slope * mean_x + trusted * ahead,
            variance * (1.0 + (distance * distance / spread if spread > 0 else 0.0)),
        )

    @property
    def effective_steps(self) -> float:
        """How many equally weighted steps would know as much."""
        return self.weight * self.weight / self.squares if self.squares else 0.0

    @property
    def residual_variance(self) -> float:
        """Variance of a step's loss about the line."""
        if not self.weight:
            return 0.0
        mean_x, mean_y = self.wx / self.weight, self.wy / self.weight
        sxx = self.wxx / self.weight - mean_x * mean_x
        sxy = self.wxy / self.weight - mean_x * mean_y
        syy = self.wyy / self.weight - mean_y * mean_y
        explained = sxy * sxy / sxx if sxx > 0 else 0.0
        free = max(self.effective_steps - 2.0, 1.0)
        return max(syy - explained, 0.0) * self.effective_steps / free

    @property
    def sample_variance(self) -> float:
        """Variance v of a single sample's loss: that of a step times its batch."""
        return self.residual_variance * self.weight / self.steps if self.steps else 0.0

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> LossTrend:
        """The inverse of ``to_dict``."""
        return cls(**saved)


@dataclass(frozen=True)
class Deviation:
    """How far losses since a change lie above what the trend before it foretold."""

    trend: LossTrend
    """As it was when the change was made."""
    steps: int = 0
    samples: float = 0.0
    above: float = 0.0
    """Sum over the steps of batch x (loss - expected loss)."""
    doubt: float = 0.0
    """Sum over the steps of batch x variance of the expected loss."""

    def after(self, progress: float, loss: float, batch: float) -> Deviation:
        """The deviation with one more step."""
        expected = self.trend.expected(progress)
        if expected is None:
            return self
        value, variance = expected
        return Deviation(
            self.trend,
            self.steps + 1,
            self.samples + batch,
            self.above + batch * (loss - value),
            self.doubt + batch * variance,
        )

    @property
    def mean(self) -> float:
        """How much the loss lies above expectation on average; negative where it is better."""
        return self.above / self.samples if self.samples else 0.0

    @property
    def sigmas(self) -> float:
        """The same in standard errors; 0 while nothing can be said."""
        if not self.samples:
            return 0.0
        # Errors of the expectation are the same error at each step: they do not average out.
        error = math.sqrt(self.trend.sample_variance / self.samples + self.doubt / self.samples)
        return self.mean / error if error > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Deviation:
        """The inverse of ``to_dict``."""
        return cls(**{**saved, "trend": LossTrend.from_dict(saved["trend"])})
