"""What the policies decide, on runs whose truth is made up."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import SGD, Fixed, Goodput, LayoutConfig, Ramp, Recipe, RunConfig, Stop
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimes
from orchestrator.scheduling.adaptive import GoodputPolicy, _preferred
from orchestrator.scheduling.fixed import FixedPolicy
from orchestrator.scheduling.history import History
from orchestrator.scheduling.loss_trend import Deviation, LossTrend
from orchestrator.scheduling.noise_scale import NoiseScale
from orchestrator.scheduling.observation import Alternative, Change, Observation, Policy
from orchestrator.scheduling.policy import make_policy, measures_noise
from orchestrator.scheduling.ramp import RampPolicy
from orchestrator.scheduling.reach import Reach
from simulated import Simulation


def goodput(reach: Reach | None = None, **settings_: object) -> GoodputPolicy:
    return GoodputPolicy(Goodput(**settings_), reach or Reach())  # type: ignore[arg-type]


# -- goodput -----------------------------------------------------------------------------------


def test_the_batch_grows_while_steps_cost_little_more_and_stops_near_the_optimum() -> None:
    run = Simulation(goodput()).run(2500)
    batches = run.batches
    assert batches[0] == 16
    # goodput = B (Bn + B0) / ((Bn + B) T(B)) with T = 20 ms + 50 us B is largest at B = sqrt(Bn T0 / t) = 632
    assert 256 <= batches[-1] <= 1024
    assert all(new <= 2 * old for old, new in pairwise(batches))


def test_it_reaches_the_end_sooner_than_the_reference_batch() -> None:
    fixed = Simulation(FixedPolicy(), length=1e5)
    ours = Simulation(goodput(), length=1e5)
    for run in (fixed, ours):
        while run.progress < 1e5:
            run.run(1)
    assert ours.time_s < fixed.time_s / 3


@pytest.mark.slow
def test_a_gradient_without_noise_or_steps_without_fixed_cost_leave_the_batch_alone() -> None:
    quiet = Simulation(goodput(), noise_scale=lambda _: 2.0).run(1500)
    assert set(quiet.batches) == {16}
    costly = Simulation(goodput(), noise_scale=lambda _: 64.0, step_time=lambda layout: 1e-3 * layout.worker_batch)
    assert costly.run(1500).batches[-1] == 16


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "noise_scale"), [(0, 60.0), (1, 150.0), (2, 400.0), (3, 1500.0), (4, 3000.0)])
def test_a_stationary_run_is_left_alone_once_the_estimate_has_converged(seed: int, noise_scale: float) -> None:
    """At most one change of the batch that stays; a look at a larger one that is taken back is none, and comes once."""
    run = Simulation(goodput(), seed=seed, noise_scale=lambda _: noise_scale).run(2500)
    assert run.batches[100] > 16, "it has come to its batch by then"
    changes = batch_changes(run, after=100)
    looks = [
        one for one, other in pairwise(changes)
        if (one[0], other) == ("explore", ("settle", one[2], one[1]))
    ]  # fmt: skip
    assert len(looks) <= 1, changes
    assert len(changes) - 2 * len(looks) <= 1, changes


def batch_changes(run: Simulation, *, after: int) -> list[tuple[str, int, int]]:
    """Kind, batch before and batch after of each decision later than ``after`` that changed the global batch."""
    batches = [run.batches[0], *(decision.layout.global_batch for _, decision in run.decisions)]
    steps = ((step, decision.kind) for step, decision in run.decisions)
    found = zip(steps, pairwise(batches), strict=True)
    return [(kind, old, new) for (step, kind), (old, new) in found if step > after and new != old]


@pytest.mark.slow
def test_the_noise_grows_and_the_batch_follows() -> None:
    run = Simulation(goodput(), noise_scale=lambda progress: 30.0 + progress / 100.0).run(4000)
    assert run.batches[400] < run.batches[-1]
    assert run.batches[-1] >= 128


@pytest.mark.slow
def test_bounds_and_memory_hold() -> None:
    assert max(Simulation(goodput(max_batch=96)).run(1500).batches) <= 96
    assert max(Simulation(goodput(), train_samples=1000).run(1500).batches) <= 250
    limited = Simulation(goodput(), limit=16).run(1500)
    assert max(layout.micro_batch for layout in limited.layouts) <= 16
    assert max(limited.batches) > 16


def test_what_the_user_pins_stays() -> None:
    pinned = Simulation(goodput(Reach(pinned_micro_batch=8))).run(1500)
    assert {layout.micro_batch for layout in pinned.layouts} == {8}
    accumulated = Simulation(goodput(Reach(pinned_accumulation=1))).run(1500)
    assert {layout.accumulation for layout in accumulated.layouts} == {1}
    assert accumulated.batches[-1] > 16


def test_a_smaller_batch_is_taken_where_it_is_allowed_and_better() -> None:
    def slow(layout: Layout) -> float:
        return 1e-3 * layout.worker_batch

    run = Simulation(
        goodput(min_batch=4), noise_scale=lambda _: 4.0, step_time=slow, layout=Layout(2, 32, 1), reference=64
    )
    assert run.run(3000).batches[-1] <= 16
    kept = Simulation(goodput(), noise_scale=lambda _: 4.0, step_time=slow, layout=Layout(2, 32, 1), reference=64)
    assert set(kept.run(1000).batches) == {64}


def test_exploring_keeps_the_global_batch_and_ends_with_the_faster_layout() -> None:
    def by_halves(layout: Layout) -> float:
        return 0.03 if layout.micro_batch == 8 else 0.02

    run = Simulation(goodput(), step_time=by_halves, noise_scale=lambda _: 1.0).run(200)
    kinds = [decision.kind for _, decision in run.decisions]
    assert kinds == ["explore", "settle"]
    assert set(run.batches) == {16}
    assert run.layout == Layout(2, 4, 2)
    assert [d.kind for _, d in Simulation(goodput(explore=False), noise_scale=lambda _: 1.0).run(300).decisions] == []


def test_a_change_that_hurts_the_loss_is_taken_back_and_ambition_halved() -> None:
    def hurt(progress: float, layout: Layout) -> float:
        return 0.5 + 4.0 * progress**-0.3 + (0.6 if layout.global_batch > 32 else 0.0)

    # Three standard errors of a trend that is thirty steps old are much: one run in five does not see it.
    runs = [Simulation(goodput(), loss=hurt, seed=seed).run(60) for seed in range(5)]
    assert sum(any(d.kind == "revert" for _, d in run.decisions) for run in runs) >= 4
    run = Simulation(goodput(), loss=hurt, seed=1).run(600)
    reverts = [decision for _, decision in run.decisions if decision.kind == "revert"]
    assert reverts
    assert reverts[0].layout.global_batch == 32
    assert "above its trend" in reverts[0].reason
    assert run.history.ambition < 1.0


def test_a_change_that_turns_out_slower_is_left_as_soon_as_it_is_timed() -> None:
    """From 32 samples a worker on a step takes three times as long, which no timing before could tell."""

    def cliff(layout: Layout) -> float:
        return 0.004 + layout.accumulation * (0.016 + 1e-4 * layout.micro_batch) * (
            3.0 if layout.micro_batch > 31 else 1.0
        )

    run = Simulation(goodput(), step_time=cliff, layout=Layout(2, 8, 1)).run(400)
    grown = next(step for step, d in run.decisions if d.kind == "grow" and d.layout.micro_batch > 31)
    left, settled = next((step, d) for step, d in run.decisions if step > grown)
    assert settled.kind == "settle"
    assert settled.layout.micro_batch < 32
    assert "less than" in settled.reason
    assert left - grown <= 12
    assert settled.now is not None
    assert settled.then is not None
    assert settled.now.goodput < settled.then.goodput
    assert run.history.reversals >= 1


@pytest.mark.slow
def test_a_machine_that_others_use_too_is_read_right_all_the_same() -> None:
    """Its speed changes by a fifth every few dozen steps; a wrong turn is taken back at once."""
    changes = np.random.default_rng(5)
    speeds = [
        float(np.exp(changes.normal(0.0, 0.18))) for _ in range(600) for _ in range(int(changes.integers(20, 150)))
    ]

    def time_of(policy: Policy, layout: Layout) -> float:
        run = Simulation(policy, noise_scale=lambda progress: 60.0 + progress**0.5, layout=layout, reference=8)
        run.length, run.train_samples = 34_500.0, 1437
        run.step_time = lambda layout: 0.004 + layout.accumulation * (0.014 + 2.2e-4 * layout.micro_batch)
        run.speed = lambda _: speeds[int(30.0 * run.time_s) % len(speeds)]
        while run.progress < 34_500.0:
            run.run(1)
        return run.time_s

    best = min(time_of(FixedPolicy(), Layout(2, micro_batch, 1)) for micro_batch in (32, 64, 128))
    assert time_of(goodput(), Layout(2, 4, 1)) < 1.15 * best


def test_ambition_comes_back_as_the_run_gets_on() -> None:
    history = History().changed("grow", 10, 100.0, Layout(2, 8, 1), Layout(2, 16, 1))
    history = history.changed("revert", 20, 200.0, Layout(2, 16, 1), Layout(2, 8, 1))
    assert [history.ambition_at(progress) for progress in (200.0, 399.0, 400.0, 1e6)] == [0.5, 0.5, 1.0, 1.0]
    again = history.changed("revert", 30, 300.0, Layout(2, 16, 1), Layout(2, 8, 1))
    assert [again.ambition_at(progress) for progress in (300.0, 600.0, 1200.0, 1e6)] == [0.25, 0.5, 1.0, 1.0]
    assert History.from_dict(again.to_dict()) == again


def test_decisions_keep_their_distance_and_say_why() -> None:
    run = Simulation(goodput(min_interval_steps=50)).run(2000)
    grown = [step for step, decision in run.decisions if decision.kind == "grow"]
    assert all(later - earlier >= 50 for earlier, later in pairwise(grown))
    for _, decision in run.decisions:
        assert decision.reason
        if decision.kind == "grow":
            assert decision.now is not None
            assert decision.then is not None
            assert decision.then.goodput >= 1.05 * decision.now.goodput
            assert decision.alternatives[0] == decision.then


def test_nothing_is_changed_for_the_last_few_steps() -> None:
    run = Simulation(goodput(), length=16.0 * 30).run(30)
    assert all(decision.layout.global_batch == 16 for _, decision in run.decisions)


def test_a_run_that_is_resumed_decides_as_if_it_had_never_ended() -> None:
    """Saved while it explores, and while its batch grows with the noise."""
    whole = Simulation(goodput(), noise_scale=lambda progress: 10.0 + progress / 100.0)
    copies = [resumed(whole.run(steps)) for steps in (38, 72)]
    whole.run(210)
    assert [decision.kind for _, decision in copies[0].decisions] == ["explore"]
    assert [step for step, _ in whole.decisions if step > copies[1].step], "nothing is left to decide"
    for copy in copies:
        copy.run(whole.step - copy.step)
        assert copy.decisions == whole.decisions
        assert copy.layouts == whole.layouts
        assert copy.history == whole.history


def resumed(run: Simulation) -> Simulation:
    """The run as another process goes on with it: the history as written down, the policy new, the chances the same."""
    written = History.from_dict(json.loads(json.dumps(run.history.to_dict())))
    assert written == run.history
    lists = {"decisions": list(run.decisions), "layouts": list(run.layouts)}
    copy = dataclasses.replace(run, policy=goodput(), history=written, **lists)  # type: ignore[arg-type]
    copy.chance.bit_generator.state = run.chance.bit_generator.state
    return copy


@pytest.mark.slow
def test_seesaw_grows_the_batch_as_the_schedule_falls_and_only_to_the_noise_scale() -> None:
    def flat(layout: Layout) -> float:
        return 1e-3 * layout.worker_batch  # goodput alone would leave the batch

    length = 16.0 * 4000
    run = Simulation(goodput(seesaw=True), step_time=flat, noise_scale=lambda _: 100.0, length=length).run(3000)
    assert 32 <= run.batches[-1] <= 150
    without = Simulation(goodput(), step_time=flat, noise_scale=lambda _: 100.0, length=length).run(3000)
    assert without.batches[-1] == 16


# -- goodput, one look at a time ----------------------------------------------------------------


def look(layout: Layout, noise: NoiseScale, *, since: int = 10, **fields: object) -> Observation:
    """What is seen ``since`` steps after ``layout`` was grown into; 8 and 16 a worker were timed before it."""
    times = StepTimes()
    for each in (Layout(2, 8, 1), Layout(2, 16, 1), layout):
        for _ in range(8):
            seconds = 0.02 + 1e-4 * each.worker_batch
            place = dataclasses.asdict(each)
            times = times.observe(nodes=1, **place, step_time_s=seconds, accumulation_time_s=seconds - 0.004)
    change = Change("grow", 100, 1600.0, Layout(2, 8, 1), Deviation(LossTrend()))
    base = dataclasses.replace(Simulation(FixedPolicy(), layout=layout).observe(), progress=1760.0)
    seen = dataclasses.replace(base, step=100 + since, noise_scale=noise, times=times, change=change)
    return dataclasses.replace(seen, **fields)  # type: ignore[arg-type]


def test_half_the_ambition_decides_as_on_half_the_noise_scale() -> None:
    policy, layout = goodput(explore=False), Layout(2, 32, 1)
    for low in (60.0, 120.0, 240.0, 480.0, 1000.0):
        halved = policy.decide(look(layout, NoiseScale(2000.0, low, math.inf), ambition=0.5))
        as_on = policy.decide(look(layout, NoiseScale(2000.0, low / 2, math.inf)))
        assert (halved and halved.then) == (as_on and as_on.then)
    assert policy.decide(look(layout, NoiseScale(2000.0, 240.0, math.inf))) is not None
    assert policy.decide(look(layout, NoiseScale(2000.0, 240.0, math.inf), ambition=0.1)) is None


def test_shrinking_is_decided_on_the_upper_bound() -> None:
    """Sixty-four times the reference batch: too much for a noise scale of 30 samples, right for one of 5,000."""
    policy, layout = goodput(explore=False), Layout(2, 512, 1)
    surely_small = policy.decide(look(layout, NoiseScale(30.0, 20.0, 40.0)))
    assert surely_small is not None
    assert surely_small.kind == "shrink"
    assert surely_small.layout.global_batch == 512
    assert policy.decide(look(layout, NoiseScale(30.0, 20.0, 5000.0))) is None


def test_each_reversal_doubles_the_interval() -> None:
    policy, noise = goodput(explore=False, min_interval_steps=10), NoiseScale(900.0, 800.0, 1000.0)

    def first(reversals: int) -> int:
        due = (n for n in range(1, 200) if policy.decide(look(Layout(2, 32, 1), noise, since=n, reversals=reversals)))
        return next(due)

    assert [first(reversals) for reversals in range(4)] == [10, 20, 40, 80]


def test_more_micro_batches_must_promise_much_more() -> None:
    def rated_as(accumulation: int, goodput_: float) -> Alternative:
        return Alternative(Layout(2, 64 // accumulation, accumulation), 0.1, 1.0, goodput_)

    whole, parts = rated_as(1, 1000.0), rated_as(4, 1099.0)
    assert _preferred([parts, whole]) == whole
    assert _preferred([dataclasses.replace(parts, goodput=1101.0), whole]).layout == parts.layout
    assert _preferred([whole, parts]) == whole


def test_what_counts_as_taken_back() -> None:
    """A shrink, a revert, and a settling that no trial preceded."""
    history, small, large = History(), Layout(2, 8, 1), Layout(2, 16, 1)
    for kind, before, after, reversals in [
        ("grow", small, large, 0), ("shrink", large, small, 1), ("explore", small, large, 1),
        ("settle", large, small, 1), ("grow", small, large, 1), ("revert", large, small, 2),
    ]:  # fmt: skip
        history = history.changed(kind, 1, 1.0, before, after)  # type: ignore[arg-type]
        assert history.reversals == reversals


# -- ramp and fixed ----------------------------------------------------------------------------


def test_a_ramp_follows_what_is_written_down() -> None:
    policy = RampPolicy(Ramp(at=(0.0, 0.25, 0.5), batches=(16, 32, 100)), Reach())
    run = Simulation(policy, Ramp(batches=(16, 32, 100)), length=16.0 * 1000)
    while run.progress < run.length:
        run.run(1)
    assert list(dict.fromkeys(run.batches)) == [16, 32, 100]
    assert [decision.kind for _, decision in run.decisions] == ["ramp", "ramp"]


def test_a_ramp_rounds_to_what_the_workers_can_take_and_says_so() -> None:
    policy = RampPolicy(Ramp(at=(0.0,), batches=(33,)), Reach())
    decision = policy.decide(Simulation(policy, layout=Layout(4, 4, 1)).observe())
    assert decision is not None
    assert decision.layout == Layout(4, 8, 1)
    assert "asked for 33" in decision.reason


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 16), st.none() | st.integers(1, 64), st.none() | st.integers(1, 8))
def test_the_nearest_layout_factors_and_stays_within_memory(batch, workers, limit, accumulation) -> None:
    seen = Simulation(FixedPolicy(), layout=Layout(workers, 8, 1), limit=limit).observe()
    layout = Reach(pinned_accumulation=accumulation).nearest(batch, seen)
    assert layout.workers == workers
    assert layout.micro_batch >= 1
    assert limit is None or layout.micro_batch <= limit
    assert accumulation is None or layout.accumulation == accumulation
    if accumulation is None and limit is None and batch >= workers * 8:
        assert layout.global_batch == pytest.approx(batch, rel=0.2)


def test_a_fixed_batch_never_changes() -> None:
    assert Simulation(FixedPolicy(), Fixed()).run(300).decisions == []


def config(**fields: object) -> RunConfig:
    recipe = Recipe(batch=16, optimizer=SGD(learning_rate=0.1), stop=Stop(epochs=4))
    return RunConfig(name="a", recipe=recipe, **fields)  # type: ignore[arg-type]


def test_each_policy_of_the_config_has_its_value() -> None:
    assert make_policy(config(policy=Fixed())) == FixedPolicy()
    ramp = Ramp(at=(0.5,), batches=(32,))
    assert make_policy(config(policy=ramp)) == RampPolicy(ramp, Reach())
    pinned = config(layout=LayoutConfig(micro_batch=4))
    assert make_policy(pinned) == GoodputPolicy(Goodput(), Reach(pinned_micro_batch=4))


def test_only_a_run_that_stays_at_its_recipes_batch_needs_no_noise() -> None:
    assert not measures_noise(config(policy=Fixed()), 16)
    assert measures_noise(config(policy=Fixed()), 32)
    assert measures_noise(config(), 16)
    assert math.isfinite(Simulation(FixedPolicy(), Fixed()).run(10).progress)
