"""The best layout: the maximum of everything that may be chosen, and nothing outside of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTiming, fit_step_time
from orchestrator.scheduling.goodput import best_layout, rate, rated

MODEL = fit_step_time([StepTiming(1, 2, m, 0.03 + 1e-3 * m, 0.02 + 1e-3 * m) for m in (8, 32)])


def goodput(noise: float, reference: int, layout: Layout) -> float:
    """By hand."""
    batch = layout.workers * layout.micro_batch * layout.accumulation
    seconds = MODEL.step_time_s(
        nodes=1, workers=layout.workers, micro_batch=layout.micro_batch, accumulation=layout.accumulation
    )
    worth = 1.0 if math.isinf(noise) else (noise + reference) / (noise + batch)
    return batch / seconds * worth


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.1, 1e6) | st.just(math.inf),
    st.integers(1, 256),
    st.integers(1, 8),
    st.sets(st.integers(1, 64), min_size=1, max_size=6),
    st.integers(1, 300),
    st.integers(0, 600),
)
def test_it_is_the_maximum_within_the_bounds(noise, reference, workers, micro_batches, low, width) -> None:
    high = low + width
    possible = [Layout(workers, m, a) for m in micro_batches for a in range(1, 901) if low <= workers * m * a <= high]
    assume(possible)
    best = best_layout(
        MODEL,
        noise,
        reference,
        nodes=1,
        workers=workers,
        micro_batches=sorted(micro_batches),
        batch_range=(low, high),
    )
    assert Layout(workers, best.micro_batch, best.accumulation) in possible
    assert best.goodput == pytest.approx(max(goodput(noise, reference, layout) for layout in possible))


def test_a_range_without_a_layout_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"no global batch from 10 to 15 is a multiple .*\(16, 32\): widen the range"):
        best_layout(MODEL, 100.0, 16, nodes=1, workers=2, micro_batches=[8, 16], batch_range=(10, 15))


def test_a_noisier_gradient_wants_a_larger_batch() -> None:
    def batch(noise: float) -> int:
        best = best_layout(
            MODEL, noise, 16, nodes=1, workers=2, micro_batches=[2**i for i in range(7)], batch_range=(2, 1024)
        )
        return 2 * best.micro_batch * best.accumulation

    batches = [batch(noise) for noise in (1.0, 30.0, 300.0, 1e4, math.inf)]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1] == 1024


def test_of_equals_the_larger_micro_batch_comes_first() -> None:
    flat = fit_step_time([StepTiming(1, 1, m, 0.01 * m, 0.01 * m) for m in (1, 1000)])
    found = rated(flat, math.inf, 8, 1, [Layout(1, 2, 4), Layout(1, 8, 1), Layout(1, 4, 2)])
    times = [one.step_time_s for one in found]
    assert times == sorted(times)
    assert [rate(flat, math.inf, 8, 1, one.layout) for one in found] == found
