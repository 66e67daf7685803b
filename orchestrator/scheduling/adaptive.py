"""The default policy: the layout of the highest predicted goodput, changed carefully and taken back when it hurts.

How it decides, in this order (each step is one method):

1. Guard. The loss since the last change lies above what the trend before it foretold, by ``guard_sigma`` standard
   errors and ``NOTABLE`` of its size: go back, and decide on half the noise scale from then on.
2. Verify. Once the new layout is timed, its goodput is held against that of the one it replaced, which ran just before:
   two timings of the same minutes are worth more than any model. The worse one is left.
3. Improve. Of all layouts within the bounds, memory and a factor of 2 of the batch in use, the one with the highest
   goodput, if it promises ``min_gain`` more and saves more time over the rest of the run than the change costs.
   Growing is decided on the lower bound of the noise scale, shrinking on the upper: what is not known argues for
   leaving things alone, and a stationary problem is left alone for good. Where the model of step times sees no gain in
   a batch that nobody has timed and that costs little of a sample's worth, it is tried once, and the better of the two
   is kept.
4. Explore, in ordinary training steps. Growing times a second micro batch by the way. A run that has not grown has
   timed one, which cannot tell the effect of its size from the fixed cost of a step: the same global batch is run in
   halves for a few steps, once.

Goodput (Qiao et al. 2021, arXiv:2008.12260) = batch / step time x efficiency; the efficiency is that of McCandlish et
al. 2018. An estimate made at a small batch is conservative for a large one, hence the factor of 2 and a new look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.config import Goodput
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel
from orchestrator.scheduling.goodput import rate, rated
from orchestrator.scheduling.noise_scale import statistical_efficiency
from orchestrator.scheduling.observation import Alternative, Decision, Kind, Observation
from orchestrator.scheduling.reach import Reach

__all__ = ["TIMED_STEPS", "GoodputPolicy", "batch_range"]

TIMED_STEPS = 4
"""Steps, warm-up not counted, that make a layout's time known."""
UNDISTURBED_STEPS = 16
"""Timed steps before the first exploration: the beginning of a run is not what the rest of it is like."""
WORTH_A_LOOK = 0.75
"""A batch is tried untimed only if a sample keeps this much of its worth. Assumption."""
LOOK_STEPS = 40
"""Steps that must be left for a look to pay."""
GUARD_STEPS = 10
GUARD_REACH = 1.25
"""The guard looks until progress has grown by this factor, and twice its steps: then a trend foretells nothing."""
SUSPECT = 0.5
"""A batch does not grow on while its loss is worse by this share of ``guard_sigma``. Assumption."""
NOTABLE = 0.02
"""A loss is worse only if it is so by this share of itself too. Assumption."""
SWITCH_STEPS = 3
"""What a change costs, in steps of the new layout: allocation, warm-up. Assumption, generous."""
VERIFIED_AT = (4, 8, 16)
"""Timed steps after which a change is held against what it replaced."""
DOUBT = 0.4
"""n timed steps may be off by this share over n: after four a loss of a tenth shows. Assumption."""
LARGEST_GROWTH = 2
MOST_DOUBLINGS = 8
ACCUMULATION_MARGIN = 0.1
"""More goodput that more micro batches must promise to be preferred to larger ones. Assumption."""
EXPLAINED = 6
"""Alternatives that a decision names."""


@dataclass(frozen=True)
class GoodputPolicy:
    """See the module."""

    settings: Goodput
    reach: Reach

    def decide(self, seen: Observation) -> Decision | None:
        """The change to make now, or None."""
        return self._guard(seen) or self._verify(seen) or self._improve(seen) or self._explore(seen)

    # -- 1. guard --

    def _guard(self, seen: Observation) -> Decision | None:
        if not self._is_worse(seen, self.settings.guard_sigma):
            return None
        change = seen.change
        assert change is not None
        deviation = change.deviation
        reason = (
            f"loss {deviation.mean:.3g} above its trend ({deviation.sigmas:.1f} standard errors in {deviation.steps} "
            f"steps) since batch {seen.layout.global_batch}: back, and half the ambition"
        )
        return Decision("revert", change.before, reason)

    def _is_worse(self, seen: Observation, sigmas: float) -> bool:
        """Whether the loss since the last change lies above its trend, notably and by so many standard errors."""
        change = seen.change
        if change is None or change.kind == "revert" or change.deviation.steps < GUARD_STEPS:
            return False
        deviation = change.deviation
        over = seen.progress > GUARD_REACH * change.progress and deviation.steps > 2 * GUARD_STEPS
        if over or change.before.global_batch == seen.layout.global_batch:
            return False
        loss = deviation.trend.wy / deviation.trend.weight
        return deviation.sigmas >= sigmas and deviation.mean >= NOTABLE * abs(loss)

    # -- 2. verify --

    def _verify(self, seen: Observation) -> Decision | None:
        change, timed = seen.change, _timed_steps(seen, seen.layout)
        if change is None or change.kind not in ("grow", "shrink") or timed not in VERIFIED_AT:
            return None
        low, high = self.bounds(seen)
        model = seen.times.model()
        if seen.noise_scale is None or model is None or not low <= change.before.global_batch <= high:
            return None
        known = seen.ambition * seen.noise_scale.low if change.kind == "grow" else seen.noise_scale.high
        now, before = (
            rate(model, known, seen.reference_batch, seen.nodes, one) for one in (seen.layout, change.before)
        )
        if now.goodput >= (1.0 - DOUBT / timed) * before.goodput:
            return None
        reason = (
            f"timed at {1e3 * now.step_time_s:.3g} ms a step, batch {seen.layout.global_batch} gives "
            f"{now.goodput:,.0f} reference samples/s, less than {before.goodput:,.0f} with batch "
            f"{change.before.global_batch}"
        )
        return Decision("settle", change.before, reason, now, before)

    # -- 3. improve --

    def _improve(self, seen: Observation) -> Decision | None:
        exploring = _is_exploring(seen)
        if _timed_steps(seen, seen.layout) < TIMED_STEPS or not (exploring or self._is_due(seen)):
            return None
        model = seen.times.model()
        if model is None:
            return None
        if exploring:
            return self._settle(seen, model)
        if seen.noise_scale is None:
            return None
        low, high = self.bounds(seen)
        batch = seen.layout.global_batch
        doubted = seen.ambition * seen.noise_scale.low
        # A loss that may yet turn out worse is looked at first: the next change would begin a new trend.
        suspect = self._is_worse(seen, SUSPECT * self.settings.guard_sigma)
        return (
            (None if suspect else self._best(seen, model, doubted, max(low, batch), min(high, LARGEST_GROWTH * batch)))
            or (None if suspect else self._try_larger(seen, doubted))
            or self._best(seen, model, seen.noise_scale.high, max(low, -(-batch // LARGEST_GROWTH)), min(high, batch))
        )

    def _is_due(self, seen: Observation) -> bool:
        """Every interval at first, then ever more seldom: what was not worth it does not soon become so.

        Each change that was taken back doubles the interval: where measurements contradict one another, more of them
        are needed, and a run never swings for ever.
        """
        interval = self.settings.min_interval_steps << min(seen.reversals, MOST_DOUBLINGS)
        intervals, rest = divmod(seen.steps_since_change, interval)
        if rest or not intervals:
            return False
        spacing = min(1 << max(intervals.bit_length() - 3, 0), 32)
        return intervals % spacing == 0

    def _settle(self, seen: Observation, model: StepTimeModel) -> Decision:
        """The better of the two layouts, now that both were timed."""
        assert seen.change is not None
        known = seen.noise_scale
        doubted = math.inf if known is None else seen.ambition * known.low
        found = rated(model, doubted, seen.reference_batch, seen.nodes, [seen.layout, seen.change.before])
        best = _preferred(found)
        other = found[1] if best == found[0] else found[0]
        now = best if best.layout == seen.layout else other
        reason = (
            f"{best.layout}: {1e3 * best.step_time_s:.3g} ms a step and {best.goodput:,.0f} reference samples/s, "
            f"against {1e3 * other.step_time_s:.3g} ms and {other.goodput:,.0f} with {other.layout}"
        )
        return Decision("settle", best.layout, reason, now, best, tuple(found))

    def bounds(self, seen: Observation) -> tuple[int, int]:
        """Smallest and largest global batch that it may come to now."""
        reference, settings = seen.reference_batch, self.settings
        low, high = batch_range(settings, reference, seen.train_samples)
        if settings.seesaw and seen.noise_scale is not None and 0.0 < seen.schedule_factor < 1.0:
            # Where the schedule would multiply the rate by alpha, the batch grows by 1 / alpha instead, and the rule
            # for the learning rate gives back what belongs to it; only while the batch is below the noise scale.
            wanted = min(reference / seen.schedule_factor, seen.ambition * seen.noise_scale.low)
            low = min(max(low, int(wanted)), LARGEST_GROWTH * seen.layout.global_batch)
        return low, max(low, high)

    def _best(
        self, seen: Observation, model: StepTimeModel, noise_scale: float, low: int, high: int
    ) -> Decision | None:
        """The best layout in ``low``..``high`` if it is worth the change, on this noise scale."""
        # How to lay out the same batch was settled by trying; differences of a few percent are noise there.
        batch = seen.layout.global_batch
        layouts = [layout for layout in self.reach.layouts(seen, low, high) if layout.global_batch != batch]
        if not layouts:
            return None
        found = rated(model, noise_scale, seen.reference_batch, seen.nodes, layouts)
        best, now = _preferred(found), rate(model, noise_scale, seen.reference_batch, seen.nodes, seen.layout)
        forced = seen.layout.global_batch < self.bounds(seen)[0]
        if not (forced or self._is_worth_it(seen, now, best)):
            return None
        kind: Kind = "grow" if best.layout.global_batch > batch else "shrink"
        reason = (
            f"goodput {now.goodput:,.0f} -> {best.goodput:,.0f} reference samples/s "
            f"({best.goodput / now.goodput - 1:+.0%}) at noise scale {seen.noise_scale}"
        )
        return Decision(kind, best.layout, reason, now, best, tuple(found[:EXPLAINED]))

    def _is_worth_it(self, seen: Observation, now: Alternative, best: Alternative) -> bool:
        if best.goodput < (1.0 + self.settings.min_gain) * now.goodput:
            return False
        if seen.length is None:
            return True
        remaining = max(seen.length - seen.progress, 0.0)
        saved_s = remaining / now.goodput - remaining / best.goodput
        return saved_s > SWITCH_STEPS * best.step_time_s

    def _try_larger(self, seen: Observation, low: float) -> Decision | None:
        """The doubled batch, where nobody knows how long its step takes and little is lost by looking."""
        layout, high = seen.layout, self.bounds(seen)[1]
        larger = replace(layout, micro_batch=2 * layout.micro_batch)
        if not self.settings.explore or larger.global_batch > high or _timed_steps(seen, larger):
            return None
        if larger.micro_batch not in self.reach.micro_batches(seen):
            return None
        worth = statistical_efficiency(low, layout.global_batch, larger.global_batch)
        if worth < WORTH_A_LOOK or _steps_left(seen) < LOOK_STEPS:
            return None
        reason = (
            f"batch {larger.global_batch} timed: a sample is still worth {worth:.0%} at noise scale {seen.noise_scale}"
        )
        return Decision("explore", larger, reason)

    # -- 4. explore --

    def _explore(self, seen: Observation) -> Decision | None:
        if not self.settings.explore or _is_exploring(seen) or _timed_steps(seen, seen.layout) < UNDISTURBED_STEPS:
            return None
        if seen.noise_scale is None or not self._is_due(seen):  # growing had no chance yet
            return None
        timed = seen.times.micro_batches(nodes=seen.nodes, workers=seen.layout.workers)
        if timed == {seen.layout.micro_batch}:
            other = _halved(seen.layout, self.reach)
            if other is not None:
                reason = f"micro batch {other.micro_batch} timed at the same global batch of {other.global_batch}"
                return Decision("explore", other, reason)
        return None


def batch_range(settings: Goodput, reference: int, train_samples: int) -> tuple[int, int]:
    """Smallest and largest global batch: the user's, or from the reference batch on to 64 times as much.

    At least four steps are left in an epoch.
    """
    low = reference if settings.min_batch == "auto" else settings.min_batch
    largest = max(reference, min(64 * reference, train_samples // 4))
    high = largest if settings.max_batch == "auto" else settings.max_batch
    return low, max(low, high)


def _preferred(found: list[Alternative]) -> Alternative:
    """The best, but of those with the fewest micro batches where more of them promise little.

    A larger micro batch is the surer way to a larger batch: that many small ones take as long as predicted depends on
    a time that is seldom measured alone. Accumulation wins where memory ends, or where the network dominates.
    """
    fewest = min(one.layout.accumulation for one in found)
    plain = next(one for one in found if one.layout.accumulation == fewest)
    return found[0] if found[0].goodput > (1.0 + ACCUMULATION_MARGIN) * plain.goodput else plain


def _steps_left(seen: Observation) -> float:
    """Steps of the batch in use to the end of the run, at most: later ones are worth less than the reference's."""
    if seen.length is None:
        return math.inf
    return (seen.length - seen.progress) / seen.layout.global_batch


def _is_exploring(seen: Observation) -> bool:
    return seen.change is not None and seen.change.kind == "explore"


def _timed_steps(seen: Observation, layout: Layout) -> int:
    return seen.times.count(nodes=seen.nodes, **vars(layout))


def _halved(layout: Layout, reach: Reach) -> Layout | None:
    """The same global batch with half the micro batch, where that can be had."""
    if reach.pinned_micro_batch or reach.pinned_accumulation or layout.micro_batch % 2:
        return None
    return replace(layout, micro_batch=layout.micro_batch // 2, accumulation=2 * layout.accumulation)
