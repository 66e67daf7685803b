"""How a recipe's settings follow the batch: the published values, and laws that hold at every batch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import LAMB, SGD, Adam, AdamW
from orchestrator.errors import ConfigError
from orchestrator.scheduling.learning_rate import RULES, Scaling, ema_decay, ramp, scale
from orchestrator.scheduling.noise_scale import NoiseScale, gain

OPTIMIZERS = [
    SGD(learning_rate=0.1),
    SGD(learning_rate=0.1, momentum=0.0),
    Adam(learning_rate=0.1),
    AdamW(learning_rate=0.1),
    LAMB(learning_rate=0.1),
]
optimizers = st.sampled_from(OPTIMIZERS)
rules = st.sampled_from(RULES)
noises = st.none() | st.floats(0.1, 1e9)
factors = st.floats(1.0, 1000.0)


# -- published values --------------------------------------------------------------------------


def test_adascale() -> None:
    """Variance 7 and squared norm 1 of the reference step, scale 8."""
    assert scale("adascale", SGD(learning_rate=0.1), 7.0, 1, 8).learning_rate == pytest.approx(4.26667, rel=1e-5)
    assert scale("auto", SGD(learning_rate=0.1), 7.0, 1, 8).learning_rate == pytest.approx(4.26667, rel=1e-5)


def test_adam_at_eight_times_the_batch() -> None:
    scaling = scale("sqrt", Adam(learning_rate=1.0), 1e6, 32, 256)
    assert scaling.learning_rate == pytest.approx(2.8284, rel=1e-4)
    assert scaling.beta2 == pytest.approx(0.99203, rel=1e-5)
    assert 1e-8 * scaling.eps == pytest.approx(3.536e-9, rel=1e-3)
    assert scaling.weight_decay == 1.0  # Adam's L2 is part of the loss


def test_the_average_of_a_model() -> None:
    assert ema_decay(0.9999, 8) == pytest.approx(0.9992003, rel=1e-7)


def test_adamw_keeps_the_timescale_of_its_decay_in_samples() -> None:
    for noise in (10.0, 1e4):
        scaling = scale("auto", AdamW(learning_rate=0.1), noise, 64, 256)
        assert scaling.learning_rate == pytest.approx(math.sqrt(gain(noise, 64, 256)))
        assert scaling.weight_decay * scaling.learning_rate == pytest.approx(4.0)


def test_lamb_follows_the_root_whatever_the_noise() -> None:
    assert scale("auto", LAMB(learning_rate=0.1), 1.0, 64, 1024).learning_rate == 4.0


def test_momentum_keeps_its_length_in_samples_up_to_four_times_the_batch() -> None:
    momentum = [scale("auto", SGD(learning_rate=0.1), 1e4, 64, 64 * k).momentum for k in (0.5, 2, 4, 32)]
    assert momentum == pytest.approx([0.9**0.5, 0.9**2, 0.9**4, 0.9**4])


def test_a_gradient_weighs_as_much_in_all_whatever_the_momentum() -> None:
    for k in (0.5, 2, 4, 32):
        scaling = scale("auto", SGD(learning_rate=0.1), 1e4, 64, 64 * k)
        assert scaling.momentum is not None
        assert scaling.gradient / (1.0 - scaling.momentum) == pytest.approx(10.0)


def test_until_the_noise_is_known_four_times_is_the_most() -> None:
    assert scale("auto", SGD(learning_rate=0.1), None, 64, 64 * 3).learning_rate == 3.0
    assert scale("linear", SGD(learning_rate=0.1), None, 64, 64 * 50).learning_rate == 4.0
    assert scale("auto", AdamW(learning_rate=0.1), None, 64, 64 * 50).learning_rate == 2.0


def test_a_noise_scale_known_only_from_below_counts_as_its_lower_bound() -> None:
    bound = NoiseScale(value=1e9, low=200.0, high=math.inf)
    assert scale("auto", SGD(learning_rate=0.1), bound, 64, 256) == scale(
        "auto", SGD(learning_rate=0.1), 200.0, 64, 256
    )
    known = NoiseScale(value=300.0, low=200.0, high=400.0)
    assert scale("auto", SGD(learning_rate=0.1), known, 64, 256) == scale(
        "auto", SGD(learning_rate=0.1), 300.0, 64, 256
    )


def test_a_rule_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"policy\.rule='lineer': there is no such rule; .*linear"):
        scale("lineer", SGD(learning_rate=0.1), None, 64, 64)  # type: ignore[arg-type]


# -- laws --------------------------------------------------------------------------------------


@given(rules, optimizers, noises, st.integers(1, 10**6))
def test_at_the_reference_batch_nothing_changes_to_the_bit(rule, optimizer, noise, batch) -> None:
    scaling = scale(rule, optimizer, noise, batch, batch)
    own = Scaling(momentum=optimizer.momentum) if isinstance(optimizer, SGD) else Scaling(beta2=optimizer.beta2)
    assert scaling == own


@given(optimizers, noises, factors)
def test_the_rule_none_changes_nothing_anywhere(optimizer, noise, k) -> None:
    assert scale("none", optimizer, noise, 64, 64 * k) == scale("none", optimizer, noise, 64, 64)


@given(rules, optimizers, noises, factors, factors)
def test_a_larger_batch_never_lowers_the_rate(rule, optimizer, noise, k, more) -> None:
    low = scale(rule, optimizer, noise, 64, 64 * k).learning_rate
    high = scale(rule, optimizer, noise, 64, 64 * k * more).learning_rate
    assert low * (1 + 1e-12) >= 1.0
    assert low <= high * (1 + 1e-12)


@given(optimizers, noises, factors)
def test_the_rate_stays_below_the_rules_cap(optimizer, noise, k) -> None:
    caps = {"none": 1.0, "linear": k, "sqrt": math.sqrt(k), "adascale": k}
    caps["auto"] = k if isinstance(optimizer, SGD) else math.sqrt(k)
    for rule, cap in caps.items():
        assert scale(rule, optimizer, noise, 64, 64 * k).learning_rate <= cap * (1 + 1e-12)


@given(optimizers, st.floats(0.1, 1e9), st.floats(0.01, 1.0))
def test_a_smaller_batch_lowers_the_rate_by_no_more_than_it_is_smaller(optimizer, noise, k) -> None:
    rate = scale("auto", optimizer, noise, 64, 64 * k).learning_rate
    assert k * (1 - 1e-12) <= rate <= 1 + 1e-12


@given(st.sampled_from(OPTIMIZERS[2:]), noises, st.floats(0.01, 1e4))
def test_beta2_stays_an_average(optimizer, noise, k) -> None:
    beta2 = scale("auto", optimizer, noise, 64, 64 * k).beta2
    assert 0.5 <= beta2 < 1.0


# -- the way there -----------------------------------------------------------------------------


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.floats(0.0, 0.99))
def test_the_ramp_reaches_its_target_exactly_and_never_overshoots(current, target, memory) -> None:
    doublings = max(0.0, math.log2(target / current))
    steps = 0
    while current != target:
        following = ramp(current, target, memory)
        assert current < following <= target or (target < current and following == target)
        current, steps = following, steps + 1
        assert steps <= math.ceil(doublings / (1 - memory)) + 1
    assert ramp(current, target, memory) == target


def test_downwards_there_is_no_ramp() -> None:
    assert ramp(4.0, 1.0, 0.99) == 1.0
