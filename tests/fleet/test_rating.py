"""Every size gets its best layout, and what nobody has timed is believed in with measure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import job, model, nodes, running
from orchestrator.errors import ConfigError
from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.rating import FIRST_ACROSS, Options, options
from orchestrator.fleet.view import JobView
from orchestrator.planning.step_time import StepTimeModel, StepTiming, fit_step_time, step_parts
from orchestrator.scheduling.goodput import best_layout, rate


def rated(*jobs: JobView, **devices: tuple[int, int]) -> Options:
    return options(Fleet.of(jobs, nodes(**(devices or {"gpu": (4, 8)}))))


def goodput_of(found: Options, index: int = 0, kind: int = 0) -> dict[int, float]:
    return {int(found.devices[row]): float(found.goodput[row]) for row in found.of(index) if found.kind[row] == kind}


@settings(max_examples=20)
@given(
    noise=st.floats(1.0, 1e6),
    speed=st.floats(0.1, 10.0),
    network_s=st.floats(1e-4, 1.0),
    batch=st.sampled_from([(64, 64), (64, 4096), (100, 1000), (512, 700)]),
    micro=st.sampled_from([(1, 64), (4, 4), (3, 200), (16, 16)]),
)
def test_the_layout_is_the_best_of_all(
    noise: float, speed: float, network_s: float, batch: tuple[int, int], micro: tuple[int, int]
) -> None:
    """Against the enumeration of ``scheduling.goodput`` over powers of two, and against its rate of the same layout."""
    fitted = model(speed, network_s)
    view = job(step_time={"gpu": fitted}, noise_scale=noise, batch_range=batch, micro_batch_range=micro)
    found = rated(view)
    sizes = [2**power for power in range(10) if micro[0] <= 2**power <= micro[1]] + list(micro)
    for row in found.of(0):
        layout = found.layout(row)
        count = -(-layout.workers // 8)
        assert batch[0] <= layout.global_batch <= batch[1]
        assert micro[0] <= layout.micro_batch <= micro[1]
        assert found.goodput[row] == pytest.approx(rate(fitted, noise, 64, count, layout).goodput)
    for workers in (1, 2, 4, 8, 16):
        try:
            best = best_layout(
                fitted, noise, 64, nodes=-(-workers // 8), workers=workers, micro_batches=sizes, batch_range=batch
            )
        except ConfigError:
            continue
        assert goodput_of(found)[workers] >= best.goodput * (1 - 1e-9)


def test_many_models_at_once_say_what_each_says_alone() -> None:
    chance = np.random.default_rng(1)
    models = [
        fit_step_time(
            [StepTiming(1, w, m, 0.1 * m / w**0.1 * chance.uniform(1, 2), 0.05 * m) for w in sizes for m in (4, 8)]
        )
        for sizes in ((1,), (1, 2, 4), (2, 8))
    ] + [model()]
    which = np.repeat(np.arange(len(models)), 6)
    workers = np.tile([1.0, 2.0, 3.0, 8.0, 16.0, 16.0], len(models))
    count, micro = np.where(workers > 8, 2.0, 1.0), np.tile([1.0, 4.0, 5.0, 8.0, 64.0, 2.0], len(models))
    accumulated, step = step_parts(models, which, count, workers, micro)
    for row, index in enumerate(which):
        asked: dict[str, Any] = {"nodes": count[row], "workers": workers[row], "micro_batch": micro[row]}
        one, three = (models[index].step_time_s(**asked, accumulation=a) for a in (1, 3))
        assert step[row] == pytest.approx(one)
        assert accumulated[row] == pytest.approx((three - one) / 2)


def test_sizes_that_were_never_tried_are_believed_in_up_to_twice_the_largest() -> None:
    assert max(goodput_of(rated(job(step_time={"gpu": model(timed=2)})))) == 4
    assert max(goodput_of(rated(job(step_time={"gpu": model(timed=8)})))) == 16
    assert max(goodput_of(rated(running(job(step_time={"gpu": model(timed=1)}), {"gpu-00": 4})))) == 8


def test_a_step_across_nodes_that_never_was_timed_is_taken_to_last_longer() -> None:
    inside = model(timed=8)
    across = replace(
        inside, centres=(*inside.centres, (4.0, 4.0, 1.0)), accumulation_weights=(0.0,) * 2, step_weights=(0.0,) * 2
    )
    assert (inside.most_nodes_timed, across.most_nodes_timed, model().most_nodes_timed) == (1, 2, None)
    cautious, timed = (goodput_of(rated(job(step_time={"gpu": one}))) for one in (inside, across))
    assert {size: cautious[size] for size in (1, 2, 4, 8)} == {size: timed[size] for size in (1, 2, 4, 8)}
    assert 0.999 / FIRST_ACROSS <= cautious[16] / timed[16] < 0.9


def test_a_run_that_was_never_timed_starts_small_and_doubles() -> None:
    assert goodput_of(rated(job(step_time=None))) == {1: 1.0}
    assert goodput_of(rated(job(step_time=None, workers_range=(2, 16)))) == {2: pytest.approx(2**0.85)}
    assert max(goodput_of(rated(running(job(step_time={"gpu": None}), {"gpu-00": 4})))) == 8
    layout = rated(job(step_time=None, reference_batch=200)).layout(0)
    assert layout.global_batch == 200


def test_a_type_that_was_never_timed_is_as_much_faster_as_for_others() -> None:
    others = [job(f"other-{i}", step_time={"gpu": model(4.0), "old": model(1.0)}) for i in range(3)]
    found = rated(job("a", age_s=700.0, step_time={"old": model(2.0)}), *others, gpu=(1, 8), old=(1, 8))
    ratio = goodput_of(found, 1, 0)[1] / goodput_of(found, 1, 1)[1]
    assert goodput_of(found, 0, 0)[1] == pytest.approx(ratio * goodput_of(found, 0, 1)[1])
    alone = rated(job("a", step_time={"old": model(2.0)}), gpu=(1, 8), old=(1, 8))
    assert goodput_of(alone, 0, 0)[1] == pytest.approx(goodput_of(alone, 0, 1)[1])


def test_anything_that_answers_step_time_s_will_do() -> None:
    class Doubling:
        def step_time_s(self, *, nodes: int, workers: int, micro_batch: Any, accumulation: Any) -> Any:
            return fitted.step_time_s(nodes=nodes, workers=workers, micro_batch=micro_batch, accumulation=accumulation)

    fitted: StepTimeModel = model()
    other: Any = Doubling()
    assert goodput_of(rated(job(step_time={"gpu": other}))) == pytest.approx(goodput_of(rated(job())))


@pytest.mark.parametrize("noise", [None, 0.0, math.inf])
def test_every_noise_scale_is_understood(noise: float | None) -> None:
    found = goodput_of(rated(job(noise_scale=noise)))
    assert len(found) == 5
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_a_run_whose_batch_fits_no_size_has_no_option() -> None:
    assert len(rated(job(batch_range=(3, 3), micro_batch_range=(2, 2))).of(0)) == 0
    assert len(options(Fleet.of([], nodes(gpu=(1, 8)))).owner) == 0
