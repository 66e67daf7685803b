"""How long a step takes, for every number of workers, micro batch and accumulation, from a handful of timings.

1. A micro batch of m samples takes ``T_acc = alpha_c + beta_c m``: launches and small kernels, then arithmetic.
2. Reducing over K workers takes ``T_net = alpha + beta 2 (K - 1) / K + lat log2 K``, with constants of its own inside a
   node and across nodes: bandwidth and latency of a ring and a tree (Thakur, Rabenseifner & Gropp 2005). No reduction
   for one worker.
3. The last micro batch overlaps with it: ``T_step = (a - 1) T_acc + (T_acc^g + T_net^g)^(1/g)``, g from 1 (none) to 10
   (all of it), as in Qiao et al. 2021 (arXiv:2008.12260, equations 8 to 11).
4. Fit: least squares on the logarithms of T_acc and T_step, which makes twice too slow as bad as twice too fast.
   T_acc counts twice: a step contains it a times. Parameters are positive (their logarithms are fitted) and drawn
   weakly (``RIDGE``) to what a look at the data suggests, so that one timing is enough for a cautious answer. Of four
   starts the two nearest are followed.
5. What the form misses near a timing (a kernel that changes at some size, a slow node) is added by interpolating the
   residuals, with a Gaussian kernel that reaches a factor of 2 (``REACH``) in micro batch, workers and nodes. So a
   timed configuration is answered with its timing, its neighbours lean on it, and the rest is the form. Nothing is
   extrapolated from a single point across nodes: far from it the residual counts for nothing.
6. During a run the median of the observed steps of a layout overrides all of this. Machines are shared and their speed
   drifts: what the layout in use gains or loses against its own beginning (``pace``) is put on the earlier timings of
   all others, so that timings of different minutes can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

__all__ = ["StepTimeModel", "StepTimes", "StepTiming", "fit_step_time", "step_parts"]

Array = NDArray[np.float64]

ACCUMULATION_WEIGHT = 2.0
RIDGE = 0.02
REACH = float(np.log(2.0))
"""Distance in log micro batch, log workers and log nodes over which a residual falls to 61 %."""
RESIDUAL, TIMING_ERROR = 0.3, 0.02
"""Standard deviations, relative: of the form's error, and of a timing."""
LARGEST_OVERLAP = 10.0
TOLERANCE = 1e-3
DIFFERENCE = float(np.sqrt(np.finfo(float).eps))
STARTS = ((0.0, 0.5), (-2.0, 0.5), (2.0, 0.1), (0.0, 0.9))
"""Overlap (0 is halfway) and share of a micro batch's time that does not depend on its size."""
REFINED = 2
"""Starts that are followed to their end: those that are nearest at their beginning."""
KEPT_STEPS = 16
WARM_UP_STEPS = 2
LEVEL_STEPS = 8
"""Timed steps of a layout that say how fast the machine is when its visit begins."""
LEVEL_MEMORY = 16.0
"""Steps over which the machine's speed is averaged afterwards; a hiccup counts as twice the usual time at most."""


@dataclass(frozen=True)
class StepTiming:
    """A timing of a step with one micro batch."""

    nodes: int
    workers: int
    micro_batch: float
    """Samples per worker."""
    step_time_s: float
    """The whole step."""
    accumulation_time_s: float
    """Its part without synchronisation: forward and backward."""


@dataclass(frozen=True)
class Observed:
    """A layout's step as it was observed: seconds, and what overrides the model."""

    nodes: int
    workers: int
    micro_batch: int
    accumulation: int
    step_time_s: float


@dataclass(frozen=True)
class StepTimeModel:
    """A fitted model; a value that can be written down."""

    parameters: tuple[float, ...]
    """Logarithms of alpha_c, beta_c, and alpha, beta, lat inside and across nodes; then the logit of the overlap."""
    centres: tuple[tuple[float, float, float], ...] = ()
    """Log micro batch, log workers, log nodes of each timing, in units of ``REACH``."""
    accumulation_weights: tuple[float, ...] = ()
    step_weights: tuple[float, ...] = ()
    observed: tuple[Observed, ...] = ()

    def step_time_s(self, *, nodes: int, workers: int, micro_batch: ArrayLike, accumulation: ArrayLike) -> Any:
        """Seconds per step; a float for numbers, an array [n] for arrays [n] of micro batches and accumulations."""
        sizes, counts = np.broadcast_arrays(np.asarray(micro_batch, float), np.asarray(accumulation, float))
        accumulated, step = _form(np.array(self.parameters), nodes, workers, sizes)
        near = self._nearness(nodes, workers, sizes)
        accumulated = accumulated * np.exp(near @ np.array(self.accumulation_weights))
        step = step * np.exp(near @ np.array(self.step_weights))
        seconds = (counts - 1.0) * accumulated + step
        for seen in self.observed:
            if (seen.nodes, seen.workers) == (nodes, workers):
                here = (sizes == seen.micro_batch) & (counts == seen.accumulation)
                seconds = np.where(here, seen.step_time_s, seconds)
        return float(seconds) if seconds.ndim == 0 else seconds

    @property
    def most_workers_timed(self) -> int | None:
        """The largest number of workers it was fitted to; None where it was fitted to nothing."""
        return round(float(np.exp(REACH * max(c[1] for c in self.centres)))) if self.centres else None

    @property
    def most_nodes_timed(self) -> int | None:
        """As ``most_workers_timed``, of nodes."""
        return round(float(np.exp(REACH * max(c[2] for c in self.centres)))) if self.centres else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StepTimeModel:
        """The inverse of ``to_dict``, also after a way through JSON."""
        return cls(
            parameters=tuple(saved["parameters"]),
            centres=tuple((c[0], c[1], c[2]) for c in saved["centres"]),
            accumulation_weights=tuple(saved["accumulation_weights"]),
            step_weights=tuple(saved["step_weights"]),
            observed=tuple(Observed(**seen) for seen in saved["observed"]),
        )

    def _nearness(self, nodes: int, workers: int, sizes: Array) -> Array:
        """Kernel between each size [...] and each timing: [..., timings]."""
        centres = np.array(self.centres).reshape(-1, 3)
        fixed = np.log([workers, nodes]) / REACH
        squares = (np.log(sizes)[..., None] / REACH - centres[:, 0]) ** 2 + ((centres[:, 1:] - fixed) ** 2).sum(axis=1)
        return np.asarray(np.exp(-0.5 * squares))


def fit_step_time(timings: Iterable[StepTiming]) -> StepTimeModel:
    """Fit the model to at least one timing; the same timings give the same model.

    Raises:
        ValueError: there is no timing, or one that is not above 0 or whose part is longer than the whole.
    """
    found = list(timings)
    if not found:
        raise ValueError("a step-time model needs at least one timing")
    for timing in found:
        if not 0.0 < timing.accumulation_time_s <= timing.step_time_s < np.inf or timing.micro_batch <= 0:
            raise ValueError(f"not a timing: {timing}")
    columns = np.array([[t.nodes, t.workers, t.micro_batch, t.accumulation_time_s, t.step_time_s] for t in found]).T
    starts = sorted((_Start(columns, *start) for start in STARTS), key=lambda start: start.cost)
    parameters = min((start.fit() for start in starts[:REFINED]), key=lambda fit: float(fit.cost)).x
    nodes, workers, sizes, accumulated, step = columns
    form = _form(parameters, nodes, workers, sizes)
    centres = np.log(np.array([sizes, workers, nodes])).T / REACH
    squares = ((centres[:, None] - centres[None]) ** 2).sum(axis=-1)
    kernel = np.exp(-0.5 * squares) + (TIMING_ERROR / RESIDUAL) ** 2 * np.eye(len(found))
    weights = [np.linalg.solve(kernel, np.log(t / f)) for t, f in zip((accumulated, step), form, strict=True)]
    return StepTimeModel(
        parameters=tuple(map(float, parameters)),
        centres=tuple((float(c[0]), float(c[1]), float(c[2])) for c in centres),
        accumulation_weights=tuple(map(float, weights[0])),
        step_weights=tuple(map(float, weights[1])),
    )


def step_parts(
    models: Sequence[StepTimeModel], which: NDArray[np.intp], nodes: Array, workers: Array, micro_batch: Array
) -> tuple[Array, Array]:
    """T_acc and T_step with one micro batch, in s, of many models at once: two arrays [n].

    A step of ``a`` micro batches takes ``(a - 1) T_acc + T_step``. What a model observed of single layouts (item 6) is
    left out: it is in the timings that the model was fitted to.

    Args:
        models: The models.
        which: Index [n] of the model that each row asks.
        nodes: [n].
        workers: [n].
        micro_batch: Samples per worker, [n].
    """
    most = max((len(model.centres) for model in models), default=0)
    # Absent timings are infinitely far away.
    centres, weights = np.full((len(models), most, 3), np.inf), np.zeros((2, len(models), most))
    for index, model in enumerate(models):
        if count := len(model.centres):
            centres[index, :count] = model.centres
            weights[0, index, :count], weights[1, index, :count] = model.accumulation_weights, model.step_weights
    parameters = np.array([model.parameters for model in models]).reshape(len(models), -1)
    accumulated, step = _form(parameters[which].T, nodes, workers, micro_batch)
    here = np.log(np.array([micro_batch, workers, nodes])) / REACH
    residuals = np.zeros((2, len(which)))
    for centre in range(most):  # one at a time: the rows are many
        near = np.exp(-0.5 * sum((centres[which, centre, axis] - here[axis]) ** 2 for axis in range(3)))
        residuals += near * weights[:, which, centre]
    return accumulated * np.exp(residuals[0]), step * np.exp(residuals[1])


class _Start:
    """Least squares from one start; ``constant`` is the share of T_acc that does not depend on the micro batch."""

    def __init__(self, columns: Array, overlap: float, constant: float) -> None:
        self._columns = columns
        _, workers, sizes, accumulated, step = columns
        network = np.maximum(step - accumulated, 1e-3 * step)
        typical = float(np.median(network[workers > 1])) if (workers > 1).any() else 0.1 * float(np.median(accumulated))
        guesses = [
            constant * accumulated.min(),
            float(np.median(accumulated / sizes)) * (1.0 - constant / 2.0),
            *(typical / part for part in (3.0, 3.0, 9.0)),
            *(typical / part for part in (3.0, 3.0, 9.0)),
        ]
        self._prior = np.append(np.log(guesses), overlap)
        self.cost = float((self._misses(self._prior) ** 2).sum())
        """Before anything is fitted."""

    def fit(self) -> Any:
        """Levenberg-Marquardt; digits that timings do not have are left out, since a run waits for this."""
        tolerance = {"ftol": TOLERANCE, "xtol": TOLERANCE, "max_nfev": 200}
        return least_squares(self._residuals, self._prior, jac=self._slopes, method="lm", **tolerance)

    def _misses(self, parameters: Array) -> Array:
        nodes, workers, sizes, accumulated, step = self._columns
        of_accumulation, of_step = _form(parameters, nodes, workers, sizes)
        found = [ACCUMULATION_WEIGHT * np.log(of_accumulation / accumulated), np.log(of_step / step)]
        return np.concatenate(found, axis=-1)

    def _residuals(self, parameters: Array) -> Array:
        return np.concatenate([self._misses(parameters), RIDGE * (parameters - self._prior)])

    def _slopes(self, parameters: Array) -> Array:
        """Forward differences, all in one call: a call for each costs ten times as much."""
        forward = parameters + DIFFERENCE * np.copysign(np.maximum(1.0, np.abs(parameters)), parameters)
        difference = forward - parameters  # as it is in floating point
        moved = np.column_stack([parameters, parameters[:, None] + np.diag(difference)])  # [9, 1 + 9]
        found = self._misses(moved[:, :, None])
        return np.concatenate([(found[1:] - found[0]).T / difference, RIDGE * np.eye(len(parameters))])


def _form(parameters: Array, nodes: ArrayLike, workers: ArrayLike, sizes: Array) -> tuple[Array, Array]:
    """T_acc and T_step with one micro batch, of items 1 to 3 above; parameters [9], or [9, ...] of several models."""
    positive = np.exp(parameters[:8])
    accumulated = positive[0] + positive[1] * sizes
    count = np.asarray(workers, float)
    ring, tree = 2.0 * (count - 1.0) / count, np.log2(count)
    inside, across = (positive[i] + positive[i + 1] * ring + positive[i + 2] * tree for i in (2, 5))
    network = np.where(count <= 1, 0.0, np.where(np.asarray(nodes) <= 1, inside, across))
    power = 1.0 + (LARGEST_OVERLAP - 1.0) / (1.0 + np.exp(-parameters[8]))
    # Divided by the larger first: powers of small times would underflow.
    largest = np.maximum(accumulated, network)
    step = largest * ((accumulated / largest) ** power + (network / largest) ** power) ** (1.0 / power)
    return accumulated, np.asarray(step)


# -- during a run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutTimes:
    """The latest steps of one layout, in s."""

    nodes: int
    workers: int
    micro_batch: int
    accumulation: int
    steps: int = 0
    """All that were timed; the latest are kept."""
    step_times_s: tuple[float, ...] = ()
    micro_batch_times_s: tuple[float, ...] = ()
    pace: float = 1.0
    """The machine's when the latest of them was taken."""

    def after(self, step_time_s: float | None, micro_batch_time_s: float | None, pace: float) -> LayoutTimes:
        """With one more step, or with its micro batches' time alone, at the machine's ``pace``."""
        steps, parts = self.step_times_s, self.micro_batch_times_s
        if step_time_s is not None:
            steps = (*steps, step_time_s)[-KEPT_STEPS:]
        if micro_batch_time_s is not None:
            parts = (*parts, micro_batch_time_s)[-KEPT_STEPS:]
        counted = self.steps + (step_time_s is not None)
        return LayoutTimes(*self.place, self.accumulation, counted, steps, parts, pace)

    @property
    def place(self) -> tuple[int, int, int]:
        """What the time of a micro batch depends on."""
        return self.nodes, self.workers, self.micro_batch


@dataclass(frozen=True)
class StepTimes:
    """What a run has observed of its own steps. Medians, so that a hiccup or a checkpoint does not count."""

    layouts: tuple[LayoutTimes, ...] = ()
    current: tuple[int, int, int, int] | None = None
    """The layout of the last step."""
    steps_in_a_row: int = 0
    """Steps of it in a row: the first ones, also after a return to it, are warm-up; a return is timed anew."""
    pace: float = 1.0
    """How much longer than at the start of the run the same work takes."""
    level_s: float = 0.0
    """Step time of the layout in use, averaged over its latest steps; 0 until it is known."""

    def observe(
        self,
        *,
        nodes: int,
        workers: int,
        micro_batch: int,
        accumulation: int,
        step_time_s: float | None,
        accumulation_time_s: float | None,
    ) -> StepTimes:
        """With one more step: its time, and the mean of its micro batches without synchronisation; None: not known."""
        key = (nodes, workers, micro_batch, accumulation)
        in_a_row = self.steps_in_a_row + 1 if key == self.current else 1
        if in_a_row <= WARM_UP_STEPS:
            return StepTimes(self.layouts, key, in_a_row, self.pace)
        known = self._of(key) if in_a_row > WARM_UP_STEPS + 1 else None
        others = tuple(layout for layout in self.layouts if (*layout.place, layout.accumulation) != key)
        known = known or LayoutTimes(*key)
        level_s, pace = self.level_s, self.pace
        levelled = step_time_s is not None and known.steps + 1 == LEVEL_STEPS
        if step_time_s is not None and level_s and not levelled:
            change = min(max(step_time_s / level_s, 0.5), 2.0) - 1.0
            level_s, pace = level_s * (1.0 + change / LEVEL_MEMORY), pace * (1.0 + change / LEVEL_MEMORY)
        known = known.after(step_time_s, accumulation_time_s, pace)
        if levelled:
            level_s = statistics.median(known.step_times_s)
        return StepTimes((*others, known), key, in_a_row, pace, level_s)

    def count(self, *, nodes: int, workers: int, micro_batch: int, accumulation: int) -> int:
        """Steps of this layout that were timed, the warm-up not counted."""
        known = self._of((nodes, workers, micro_batch, accumulation))
        return 0 if known is None else known.steps

    def micro_batches(self, *, nodes: int, workers: int) -> set[int]:
        """Micro batches that were timed on these workers."""
        return {t.micro_batch for t in self.layouts if (t.nodes, t.workers) == (nodes, workers) and t.step_times_s}

    def observed_step_time_s(self, *, nodes: int, workers: int, micro_batch: int, accumulation: int) -> float | None:
        """Median time of this layout's step; None where it was not timed."""
        known = self._of((nodes, workers, micro_batch, accumulation))
        return self._step_time_s(known) if known is not None and known.step_times_s else None

    def timings(self) -> tuple[StepTiming, ...]:
        """One timing for each micro batch, from all accumulations it was run with."""
        places: dict[tuple[int, int, int], list[LayoutTimes]] = {}
        for layout in self.layouts:
            if layout.step_times_s:
                places.setdefault(layout.place, []).append(self._now(layout))
        return tuple(_timing(place, layouts) for place, layouts in sorted(places.items()))

    def model(self) -> StepTimeModel | None:
        """The model fitted to all of it, which answers what was observed with what was observed; None before that."""
        timings = self.timings()
        if not timings:
            return None
        observed = tuple(
            Observed(*t.place, t.accumulation, self._step_time_s(t)) for t in self.layouts if t.step_times_s
        )
        return replace(fit_step_time(timings), observed=observed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StepTimes:
        """The inverse of ``to_dict``, also after a way through JSON."""
        lists = ("step_times_s", "micro_batch_times_s")
        layouts = (LayoutTimes(**{**one, **{name: tuple(one[name]) for name in lists}}) for one in saved["layouts"])
        current = saved["current"]
        current = None if current is None else tuple(current)
        return cls(tuple(layouts), current, saved["steps_in_a_row"], saved["pace"], saved["level_s"])

    def _step_time_s(self, layout: LayoutTimes) -> float:
        return statistics.median(layout.step_times_s) * self.pace / layout.pace

    def _now(self, layout: LayoutTimes) -> LayoutTimes:
        """As the machine would do it now."""
        drift = self.pace / layout.pace
        steps = tuple(drift * t for t in layout.step_times_s)
        return replace(
            layout, step_times_s=steps, micro_batch_times_s=tuple(drift * t for t in layout.micro_batch_times_s)
        )

    def _of(self, key: tuple[int, int, int, int]) -> LayoutTimes | None:
        return next((t for t in self.layouts if (*t.place, t.accumulation) == key), None)


def _timing(place: tuple[int, int, int], layouts: list[LayoutTimes]) -> StepTiming:
    medians = [(statistics.median(t.step_times_s), t.accumulation) for t in layouts]
    # A micro batch takes no longer than its share of a step; where it was never told apart, that is all that is known.
    longest = min(step / accumulation for step, accumulation in medians)
    parts = [time for t in layouts for time in t.micro_batch_times_s]
    accumulated = min(statistics.median(parts), longest) if parts else longest
    step = statistics.median(step - (accumulation - 1) * accumulated for step, accumulation in medians)
    return StepTiming(*place, step_time_s=max(step, accumulated), accumulation_time_s=accumulated)
