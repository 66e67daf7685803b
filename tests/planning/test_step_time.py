"""The step-time model: it recovers a known truth, answers what was observed with it, and stays sane on little data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.step_time import StepTimeModel, StepTimes, StepTiming, fit_step_time

Truth = Callable[[int, int, float, int], float]


def truth(
    constant: float = 0.02,
    slope: float = 1e-3,
    inside: tuple[float, float, float] = (0.002, 0.01, 0.001),
    across: tuple[float, float, float] = (0.01, 0.05, 0.004),
    overlap: float = 2.0,
) -> Truth:
    """The form of the module's docstring, written out anew."""

    def step_time(nodes: int, workers: int, micro_batch: float, accumulation: int) -> float:
        accumulated = constant + slope * micro_batch
        network = 0.0
        if workers > 1:
            alpha, beta, lat = inside if nodes == 1 else across
            network = alpha + beta * 2 * (workers - 1) / workers + lat * math.log2(workers)
        last = (accumulated**overlap + network**overlap) ** (1 / overlap)
        return (accumulation - 1) * accumulated + last

    return step_time


def timing(of: Truth, nodes: int, workers: int, micro_batch: float) -> StepTiming:
    whole = of(nodes, workers, micro_batch, 1)
    return StepTiming(nodes, workers, micro_batch, whole, of(nodes, workers, micro_batch, 2) - whole)


PROFILE = [(1, 1, 8), (1, 1, 64), (1, 2, 8), (1, 2, 64), (1, 8, 8), (1, 8, 64), (2, 16, 8), (2, 16, 64), (3, 24, 16)]


# -- the fit -----------------------------------------------------------------------------------


def test_a_known_truth_is_recovered_where_it_was_timed_and_between() -> None:
    of = truth()
    model = fit_step_time([timing(of, *place) for place in PROFILE])
    for nodes, workers, micro_batch in [*PROFILE, (1, 1, 24), (1, 4, 32), (1, 8, 24), (2, 16, 32)]:
        for accumulation in (1, 2, 8):
            predicted = model.step_time_s(
                nodes=nodes, workers=workers, micro_batch=micro_batch, accumulation=accumulation
            )
            assert predicted == pytest.approx(of(nodes, workers, micro_batch, accumulation), rel=0.08)


def test_more_nodes_than_were_timed_are_predicted_within_a_quarter() -> None:
    of = truth()
    model = fit_step_time([timing(of, *place) for place in PROFILE])
    predicted = model.step_time_s(nodes=8, workers=64, micro_batch=32, accumulation=1)
    assert predicted == pytest.approx(of(8, 64, 32, 1), rel=0.25)


def test_arrays_and_numbers_agree() -> None:
    model = fit_step_time([timing(truth(), *place) for place in PROFILE])
    sizes, counts = np.array([4.0, 8.0, 24.0]), np.array([1, 2, 5])
    together = model.step_time_s(nodes=1, workers=2, micro_batch=sizes, accumulation=counts)
    alone = [
        model.step_time_s(nodes=1, workers=2, micro_batch=m, accumulation=a) for m, a in zip(sizes, counts, strict=True)
    ]
    assert isinstance(alone[0], float)
    assert together == pytest.approx(alone, rel=1e-12)


def test_the_same_timings_give_the_same_model_and_json_gives_it_back() -> None:
    timings = [timing(truth(), *place) for place in PROFILE]
    model = fit_step_time(timings)
    assert model == fit_step_time(timings)
    assert StepTimeModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


timings = st.builds(
    lambda nodes, workers, size, part, more: StepTiming(nodes, nodes * workers, size, part * more, part),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 512),
    st.floats(1e-4, 10.0),
    st.floats(1.0, 4.0),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(timings, min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 8), st.integers(1, 1024))
def test_any_timings_give_finite_times_that_grow_with_accumulation(found, nodes, workers, size) -> None:
    model = fit_step_time(found)
    times = [
        model.step_time_s(nodes=nodes, workers=nodes * workers, micro_batch=size, accumulation=a) for a in (1, 2, 64)
    ]
    assert all(math.isfinite(t) and t > 0 for t in times)
    assert times == sorted(times)


def test_one_timing_gives_a_cautious_line_through_it() -> None:
    only = StepTiming(1, 2, 16, 0.05, 0.04)
    model = fit_step_time([only])
    at = [model.step_time_s(nodes=1, workers=2, micro_batch=m, accumulation=1) for m in (1, 16, 32)]
    assert at[1] == pytest.approx(0.05, rel=0.02)
    assert at[0] < at[1] < at[2] < 2 * at[1]


@pytest.mark.parametrize(
    "wrong",
    [
        StepTiming(1, 2, 16, 0.05, 0.06),
        StepTiming(1, 2, 16, 0.05, 0.0),
        StepTiming(1, 2, 0, 0.05, 0.04),
        StepTiming(1, 2, 16, math.inf, 0.04),
    ],
)
def test_what_cannot_be_a_timing_is_refused(wrong: StepTiming) -> None:
    with pytest.raises(ValueError, match="not a timing"):
        fit_step_time([wrong])


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit_step_time([])


# -- during a run ------------------------------------------------------------------------------


def watch(times: StepTimes, layout: tuple[int, int], seconds: list[float], part: float | None = None) -> StepTimes:
    for second in seconds:
        times = times.observe(
            nodes=1,
            workers=2,
            micro_batch=layout[0],
            accumulation=layout[1],
            step_time_s=second,
            accumulation_time_s=part,
        )
    return times


def at(layout: tuple[int, int]) -> dict[str, int]:
    return {"nodes": 1, "workers": 2, "micro_batch": layout[0], "accumulation": layout[1]}


def test_the_first_steps_of_a_layout_are_warm_up_and_hiccups_do_not_count() -> None:
    times = watch(StepTimes(), (8, 1), [9.0, 9.0, 0.02, 0.03, 0.02, 5.0, 0.02])
    assert times.observed_step_time_s(**at((8, 1))) == 0.02
    assert times.count(**at((8, 1))) == 5
    back = watch(watch(times, (4, 1), [0.01]), (8, 1), [9.0, 9.0, 0.02])
    assert back.observed_step_time_s(**at((8, 1))) == 0.02
    assert back.count(**at((8, 1))) == 1, "a return is timed anew"
    assert times.micro_batches(nodes=1, workers=2) == {8}


def test_only_the_latest_steps_count() -> None:
    times = watch(StepTimes(), (8, 1), [9.0, 9.0, *[0.02] * 50, *[0.04] * 16])
    assert times.observed_step_time_s(**at((8, 1))) == pytest.approx(0.04)
    assert times.count(**at((8, 1))) == 66


def test_before_anything_is_timed_there_is_no_model() -> None:
    assert StepTimes().model() is None
    assert watch(StepTimes(), (8, 1), [0.1, 0.1]).model() is None
    assert StepTimes().observed_step_time_s(**at((8, 1))) is None


def test_an_observed_layout_overrides_the_model() -> None:
    times = watch(StepTimes(), (8, 1), [0.02] * 6, 0.015)
    times = watch(times, (16, 2), [0.07] * 6, 0.03)
    model = times.model()
    assert model is not None
    assert model.step_time_s(**at((8, 1))) == 0.02
    assert model.step_time_s(**at((16, 2))) == 0.07
    sizes = np.array([8, 16, 16])
    answers = model.step_time_s(nodes=1, workers=2, micro_batch=sizes, accumulation=np.array([1, 2, 3]))
    assert answers[:2].tolist() == [0.02, 0.07]
    assert answers[2] == pytest.approx(0.10, rel=0.1)


def test_accumulation_is_taken_out_of_a_step() -> None:
    times = watch(StepTimes(), (16, 3), [0.10] * 6, 0.03)
    (found,) = times.timings()
    assert found == StepTiming(1, 2, 16, pytest.approx(0.04), 0.03)


def test_a_micro_batch_never_told_apart_takes_at_most_its_share_of_the_step() -> None:
    (found,) = watch(StepTimes(), (16, 2), [0.10] * 6).timings()
    assert found == StepTiming(1, 2, 16, 0.05, 0.05)


def test_a_micro_batchs_time_may_come_without_a_steps() -> None:
    times = watch(StepTimes(), (8, 1), [0.02] * 6)
    times = times.observe(**at((8, 1)), step_time_s=None, accumulation_time_s=0.012)
    assert times.count(**at((8, 1))) == 4
    assert times.timings()[0].accumulation_time_s == 0.012


def test_json_gives_the_times_back() -> None:
    times = watch(watch(StepTimes(), (8, 1), [0.02] * 6, 0.015), (4, 2), [0.03] * 3)
    assert StepTimes.from_dict(json.loads(json.dumps(times.to_dict()))) == times


@given(st.floats(0.5, 3.0), st.floats(0.001, 1.0))
def test_what_the_machine_gains_or_loses_is_put_on_all_layouts(slower: float, seconds: float) -> None:
    """The same work takes ``slower`` times as long from some step on: the layout that was left is told so too."""
    times = watch(StepTimes(), (8, 1), [seconds] * 20)
    times = watch(times, (16, 1), [1.5 * seconds] * 20)
    assert times.observed_step_time_s(**at((8, 1))) == pytest.approx(seconds)
    times = watch(times, (16, 1), [1.5 * slower * seconds] * 200)
    assert times.observed_step_time_s(**at((16, 1))) == pytest.approx(1.5 * slower * seconds)
    assert times.observed_step_time_s(**at((8, 1))) == pytest.approx(slower * seconds, rel=0.01)
    assert StepTimes.from_dict(json.loads(json.dumps(times.to_dict()))) == times


def test_a_hiccup_is_no_slower_machine() -> None:
    times = watch(StepTimes(), (8, 1), [0.02] * 20)
    times = watch(times, (16, 1), [0.03] * 20 + [5.0] + [0.03] * 60)
    assert times.observed_step_time_s(**at((8, 1))) == pytest.approx(0.02, rel=0.01)
