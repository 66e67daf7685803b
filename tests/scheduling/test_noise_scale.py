"""The noise scale: its published values and laws, and its estimate against an experiment whose truth is known.

The experiment is linear regression, ``x ~ N(0, diag(h))`` with ``h_i = i^-1/2`` in 256 dimensions, label noise 1, at a
distance ``d`` from the optimum: ``G = H d`` and ``Sigma = (d'Hd + 1) H + G G'``, so the noise scale is exactly 413.23.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.scheduling.noise_scale import (
    NoiseSample,
    NoiseScale,
    NoiseScaleWindow,
    gain,
    statistical_efficiency,
)

Array = NDArray[np.float64]

noises = st.floats(0.0, 1e9) | st.just(math.inf)
batches = st.integers(1, 10**6)
norms = st.just(0.0) | st.floats(1e-12, 1e6)


# -- the experiment ----------------------------------------------------------------------------

H = np.arange(1, 257) ** -0.5
GRADIENT_SQ, TRACE = 0.10981, 45.377
TRUTH = TRACE / GRADIENT_SQ
LOSS = (TRACE - GRADIENT_SQ) / H.sum() - 1.0  # d'Hd, from tr(Sigma) = (d'Hd + 1) tr(H) + |G|^2


def _distance() -> Array:
    """The d along a power of h that has both |G|^2 and d'Hd."""
    low, high = 0.0, 0.5
    for _ in range(60):
        power = (low + high) / 2
        d = H**power * math.sqrt(GRADIENT_SQ / np.sum((H * H**power) ** 2))
        low, high = (power, high) if d @ (H * d) > LOSS else (low, power)
    return d


D = _distance()
G = H * D
SIGMA = (LOSS + 1.0) * np.diag(H) + np.outer(G, G)


def regression(rng: np.random.Generator, steps: int, *sizes: int) -> list[NoiseSample]:
    """Steps of the experiment from real samples, each in small batches of the given sizes."""
    edges = np.cumsum((0, *sizes))
    x = rng.standard_normal((steps, edges[-1], len(H)), dtype=np.float32) * np.sqrt(H).astype(np.float32)
    residual = x @ D.astype(np.float32) + rng.standard_normal((steps, edges[-1]), dtype=np.float32)
    sums = [np.einsum("ks,ksd->kd", residual[:, a:b], x[:, a:b]) for a, b in itertools.pairwise(edges)]
    small_sq = np.mean([((s / n) ** 2).sum(1) for s, n in zip(sums, sizes, strict=True)], axis=0)
    big_sq = ((sum(sums) / edges[-1]) ** 2).sum(1)
    harmonic = len(sizes) / sum(1.0 / n for n in sizes)
    return _samples(small_sq, big_sq, harmonic, edges[-1] / harmonic)


def gaussian(
    rng: np.random.Generator, steps: int, b: int, n: int, *, share: Array | float = 1.0, noise: Array | float = 1.0
) -> list[NoiseSample]:
    """The same with normal gradients, which is quick; ``share`` of |G|^2 and ``noise`` times tr(Sigma), by step."""
    z = rng.standard_normal((steps, n, len(H))) * np.sqrt((LOSS + 1.0) * H)
    z += G * rng.standard_normal((steps, n, 1))
    small = G * np.sqrt(np.broadcast_to(share, steps))[:, None, None]
    small = small + z * np.sqrt(np.broadcast_to(noise, steps) / b)[:, None, None]
    return _samples((small**2).sum(2).mean(1), (small.mean(1) ** 2).sum(1), b, n)


def _samples(small_sq: Array, big_sq: Array, b: float, n: float) -> list[NoiseSample]:
    return [
        NoiseSample.from_norms(mean_small_sq=float(s), big_sq=float(t), small_batch=b, small_batches=n)
        for s, t in zip(small_sq, big_sq, strict=True)
    ]


def predicted_error(b: int, n: int) -> float:
    """Relative standard error of one step's |G|^2: sqrt(4 rho / x + 2 n / ((n - 1) r_eff x^2))."""
    x = b * n / TRUTH
    rho = G @ SIGMA @ G / (GRADIENT_SQ * TRACE)
    rank = TRACE**2 / np.sum(SIGMA**2)
    return math.sqrt(4 * rho / x + 2 * n / ((n - 1) * rank * x**2))


def window_of(samples: Iterable[NoiseSample]) -> NoiseScaleWindow:
    window = NoiseScaleWindow()
    for sample in samples:
        window = window.add(sample)
    return window


def estimate_of(samples: Iterable[NoiseSample]) -> NoiseScale:
    estimate = window_of(samples).estimate()
    assert estimate is not None
    return estimate


def coverage(windows: Iterable[list[NoiseSample]]) -> float:
    """Share of windows whose bounds hold the truth."""
    estimates = [estimate_of(window) for window in windows]
    return sum(e.low <= TRUTH <= e.high for e in estimates) / len(estimates)


def test_the_experiment_is_the_one_described() -> None:
    found = (float(D @ (H * D)), float(G @ G), float(np.trace(SIGMA)), TRUTH)
    assert found == pytest.approx((LOSS, GRADIENT_SQ, TRACE, 413.23), rel=1e-5)


# -- what a batch is worth ---------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "samples", "steps"), [(32, 1.077, 13.913), (413.23, 2, 2), (1024, 3.478, 1.404)])
def test_published_costs(batch: float, samples: float, steps: float) -> None:
    """E / E_min against a reference batch of next to nothing, S / S_min against steps at an endless batch."""
    assert 1 / statistical_efficiency(413.23, 0.0, batch) == pytest.approx(samples, abs=5e-4)
    assert gain(413.23, batch, 1e12) == pytest.approx(steps, abs=5e-4)


def test_the_gain_of_adascale() -> None:
    assert gain(7.0, 1, 8) == pytest.approx(4.26667, rel=1e-5)


@given(noises, batches, st.floats(1.0, 1e3))
def test_gain_lies_between_one_step_and_all_of_the_batch(noise, reference, k) -> None:
    worth = gain(noise, reference, k * reference)
    assert 1.0 - 1e-12 <= worth <= min(k, 1.0 + noise / reference) * (1.0 + 1e-12)


@given(noises, batches, batches)
def test_efficiency_falls_with_the_batch_and_is_one_at_the_reference(noise, reference, batch) -> None:
    efficiency = statistical_efficiency(noise, reference, batch)
    assert statistical_efficiency(noise, reference, reference) == 1.0
    assert gain(noise, reference, reference) == 1.0
    assert statistical_efficiency(noise, reference, 2 * batch) <= efficiency
    assert 0.0 < efficiency <= 1.0 if batch >= reference else efficiency >= 1.0


@given(noises)
def test_arrays_of_batches_give_what_each_batch_gives(noise) -> None:
    several = np.array([16, 64, 4096])
    for formula in (statistical_efficiency, gain):
        assert formula(noise, 64, several).tolist() == [formula(noise, 64, int(batch)) for batch in several]


# -- one step ----------------------------------------------------------------------------------


@given(norms, norms, st.floats(0.5, 1e4), st.floats(1.5, 1e3))
def test_a_step_without_chance_gives_the_truth(gradient_sq, trace, b, n) -> None:
    sample = NoiseSample.from_norms(
        mean_small_sq=gradient_sq + trace / b, big_sq=gradient_sq + trace / (b * n), small_batch=b, small_batches=n
    )
    scale = (gradient_sq + trace / b) * n / (n - 1)
    assert sample.gradient_sq == pytest.approx(gradient_sq, rel=1e-9, abs=1e-9 * scale)
    assert sample.noise_trace == pytest.approx(trace, rel=1e-9, abs=1e-9 * scale * b)


@pytest.mark.parametrize(
    "change",
    [
        {"small_batches": 1},
        {"small_batches": math.inf},
        {"small_batch": 0},
        {"small_batch": math.nan},
        {"big_sq": math.nan},
        {"big_sq": -1.0},
        {"mean_small_sq": math.inf},
        {"mean_small_sq": -1.0},
    ],
)
def test_what_tells_nothing_is_refused(change) -> None:
    good = {"mean_small_sq": 2.0, "big_sq": 1.0, "small_batch": 4, "small_batches": 2}
    NoiseSample.from_norms(**good)
    with pytest.raises(ValueError, match="got"):
        NoiseSample.from_norms(**{**good, **change})


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (1, 2, 5)])
def test_both_estimates_are_unbiased_for_equal_and_unequal_small_batches(sizes) -> None:
    samples = regression(np.random.default_rng(1), 3000, *sizes)
    for name, truth in (("gradient_sq", GRADIENT_SQ), ("noise_trace", TRACE)):
        values = np.array([getattr(sample, name) for sample in samples])
        assert abs(values.mean() - truth) < 3.0 * values.std() / math.sqrt(len(values))
    # The test can tell: unequal batches read as equal ones are off by more than that.
    if len(set(sizes)) > 1:
        assert samples[0].small_batch < 0.9 * sum(sizes) / len(sizes)


# -- many steps --------------------------------------------------------------------------------


def test_the_reference_experiment() -> None:
    samples = regression(np.random.default_rng(0), 1500, 16, 16)
    error = predicted_error(16, 2)
    spread = np.std([sample.gradient_sq for sample in samples]) / GRADIENT_SQ
    assert spread == pytest.approx(error, rel=0.1)
    estimate = estimate_of(samples)
    assert abs(TRUTH / estimate.value - 1.0) < 1.5 * error / math.sqrt(1500)
    assert estimate.low < TRUTH < estimate.high
    # As wide as predicted: the bounds are 1.645 standard errors of 1 / noise scale away.
    assert (1 / estimate.low - 1 / estimate.high) * TRUTH == pytest.approx(2 * 1.645 * error / 1500**0.5, rel=0.1)


@pytest.mark.parametrize(("b", "n"), [(16, 2), (8, 4), (256, 2)])
@pytest.mark.parametrize(("steps", "least", "most"), [(8, 0.87, 0.96), (40, 0.85, 0.94)])
def test_the_bounds_hold_the_truth_about_as_often_as_they_say(b, n, steps, least, most) -> None:
    """256 x 2 is above the noise scale, where the error of the trace counts too."""
    rng = np.random.default_rng(3)
    assert least < coverage(gaussian(rng, steps, b, n) for _ in range(300)) < most


def test_real_samples_are_covered_too() -> None:
    samples = regression(np.random.default_rng(4), 4500, 8, 8)
    assert 0.84 < coverage(samples[i : i + 30] for i in range(0, 4500, 30)) < 0.96


def test_steps_of_different_layouts_are_pooled_by_what_they_tell() -> None:
    """30 steps at batch 16 add no noise to 30 at batch 64, and no bias: they would, if every step counted the same."""
    rng = np.random.default_rng(5)
    large = [gaussian(rng, 30, 16, 4) for _ in range(200)]
    mixed = [gaussian(rng, 30, 8, 2) + steps for steps in large]
    errors = {
        name: np.array([TRUTH / estimate_of(steps).value - 1.0 for steps in windows])
        for name, windows in (("large", large), ("mixed", mixed))
    }
    assert abs(errors["mixed"].mean()) < 3.0 * errors["mixed"].std() / math.sqrt(200)
    assert errors["mixed"].std() < 1.03 * errors["large"].std()
    alike = [np.mean([sample.gradient_sq for sample in steps]) / GRADIENT_SQ for steps in mixed]
    assert np.std(alike) > 1.5 * errors["mixed"].std()
    assert 0.84 < coverage(mixed) < 0.95


def test_many_steps_that_tell_little_do_not_make_the_bounds_narrower() -> None:
    rng = np.random.default_rng(12)
    few = gaussian(rng, 10, 256, 2)
    alone, among = estimate_of(few), estimate_of(gaussian(rng, 200, 1, 2) + few)
    assert (among.low, among.high) == pytest.approx((alone.low, alone.high), rel=0.02)


def test_a_stationary_window_keeps_its_steps_and_its_precision() -> None:
    rng = np.random.default_rng(6)
    windows = [window_of(gaussian(rng, 600, 16, 4)) for _ in range(20)]
    assert np.median([window.steps for window in windows]) == 600
    assert np.mean([window.steps for window in windows]) > 0.9 * 600
    values = [window.estimate().value for window in windows]
    assert np.std(TRUTH / np.array(values)) < 1.4 * predicted_error(16, 4) / math.sqrt(600)


def test_a_window_follows_a_noise_scale_that_grows_tenfold() -> None:
    share = np.geomspace(1.0, 0.1, 1500)
    rng, late, windows = np.random.default_rng(7), [], []
    for _ in range(4):
        window = NoiseScaleWindow()
        for step, sample in enumerate(gaussian(rng, 1500, 32, 4, share=share)):
            window = window.add(sample)
            if step >= 400 and step % 20 == 0:
                late.append((window.estimate(), TRUTH / share[step]))
        windows.append(window)
    assert abs(np.median([math.log(estimate.value / truth) for estimate, truth in late])) < 0.3
    # Decisions are made on the lower bound: it may lag, but it runs ahead no more often than it says.
    assert np.mean([estimate.low > truth for estimate, truth in late]) < 0.06
    # Without forgetting the end would be taken for the mean of the run.
    assert np.median([window.estimate().value for window in windows]) > 2 * TRUTH / share.mean()
    assert max(window.steps for window in windows) < 1000


def test_a_jump_is_forgotten_within_a_third_of_what_was_before() -> None:
    share = np.repeat([1.0, 0.2], [600, 200])
    window = window_of(gaussian(np.random.default_rng(8), 800, 32, 8, share=share))
    assert window.steps <= 256
    estimate = window.estimate()
    assert estimate.low <= 5 * TRUTH <= estimate.high


def test_noisy_old_steps_do_not_drown_quiet_new_ones() -> None:
    """|G|^2 and tr(Sigma) fall by the same factor of 16: the noise scale does not move, the steps' weight does."""
    quiet = np.repeat([1.0, 1.0 / 16.0], [200, 200])
    rng = np.random.default_rng(9)
    windows = [window_of(gaussian(rng, 400, 32, 8, share=quiet, noise=quiet)) for _ in range(20)]
    assert all(window.steps <= 256 for window in windows)
    error = predicted_error(32, 8) / math.sqrt(200)
    assert np.std([TRUTH / window.estimate().value for window in windows]) < 1.4 * error


@given(st.integers(0, 40))
def test_a_few_steps_are_no_estimate(steps) -> None:
    estimate = window_of(gaussian(np.random.default_rng(steps), steps, 256, 2)).estimate()
    assert (estimate is None) == (steps < 8)


@given(st.integers(0, 1000), st.sampled_from([(1, 2), (16, 2), (64, 8)]))
def test_bounds_are_in_order(seed, layout) -> None:
    estimate = estimate_of(gaussian(np.random.default_rng(seed), 10, *layout))
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high
    assert math.isfinite(estimate.low)


def test_without_a_gradient_there_is_only_a_lower_bound() -> None:
    bounds = [estimate_of(gaussian(np.random.default_rng(seed), 200, 16, 2, share=0.0)) for seed in range(20)]
    assert sum(math.isinf(bound.high) for bound in bounds) >= 18
    assert all(math.isfinite(bound.low) for bound in bounds)
    assert min(bound.low for bound in bounds) > TRUTH


def test_steps_that_say_nothing_are_no_estimate() -> None:
    nothing = NoiseSample.from_norms(mean_small_sq=0.0, big_sq=0.0, small_batch=4, small_batches=2)
    assert window_of([nothing] * 100).estimate() is None
    noise_only = NoiseSample.from_norms(mean_small_sq=2.0, big_sq=1.0, small_batch=4, small_batches=2)
    assert window_of([noise_only] * 100).estimate() is None
    # A learning signal after them is not lost in them.
    assert window_of([nothing] * 100 + gaussian(np.random.default_rng(0), 100, 16, 2)).estimate() is not None


# -- as a value --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 200))
def test_a_window_survives_json_unchanged(steps) -> None:
    window = window_of(gaussian(np.random.default_rng(steps), steps, 8, 2))
    again = NoiseScaleWindow.from_dict(json.loads(json.dumps(window.to_dict())))
    assert again == window
    assert again.estimate() == window.estimate()


def test_adding_leaves_the_window_as_it_was() -> None:
    samples = gaussian(np.random.default_rng(0), 65, 8, 2)
    window = window_of(samples[:64])
    before = window.to_dict()
    assert window.add(samples[64]) == window.add(samples[64]) != window
    assert window.to_dict() == before


def test_a_long_window_is_a_few_sums() -> None:
    window = window_of(gaussian(np.random.default_rng(10), 3000, 8, 2))
    assert window.steps == 3000
    assert len(window.blocks) <= 8 * math.ceil(math.log2(3000 / 8) + 1)


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        (NoiseScale(413.2, 380.4, 454.6), "413 (380 to 455)"),
        (NoiseScale(math.inf, 119.7, math.inf), "at least 120"),
        (NoiseScale(900.0, 119.7, math.inf), "at least 120"),
        (NoiseScale(12345.6, 9.876, 23456.7), "12,346 (9.88 to 23,457)"),
    ],
)
def test_a_noise_scale_in_words(scale, text) -> None:
    assert str(scale) == text
