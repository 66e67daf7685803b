"""What a probe tries, and how what it found corrects memory, times and the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.choice import Choice, Setting, choose, space_of
from orchestrator.planning.memory import activation_bytes, memory_use
from orchestrator.planning.probe import ACCUMULATION, MOST_TRIALS, Probe, Trial, next_micro_batch
from settings import GIB, chosen, setting


def tried(planned: int, candidates: list[int], peak: Callable[[int], float], capacity: float) -> list[Trial]:
    """All trials on a device of ``capacity`` GiB where a micro batch has this peak."""
    trials: list[Trial] = []
    while (size := next_micro_batch(trials, candidates, planned=planned, capacity_bytes=GIB * capacity)) is not None:
        trials.append(Trial(size, int(GIB * peak(size)) if peak(size) <= capacity else None, 0.1, 0.04))
    return trials


def test_first_a_quarter_then_the_planned_then_the_largest_that_should_fit() -> None:
    trials = tried(8, [1, 2, 4, 8, 16, 32, 64, 128], lambda m: 1.0 + 0.1 * m, capacity=10.0)
    assert [trial.micro_batch for trial in trials] == [2, 8, 64]
    assert all(trial.peak_bytes is not None for trial in trials)


def test_what_does_not_fit_is_closed_in_on() -> None:
    # The line through 2 and 8 promises that 64 fits; the device says no.
    trials = tried(8, [1, 2, 4, 8, 16, 32, 64], lambda m: 1.0 + 0.1 * m + 0.002 * m * m, capacity=10.0)
    assert [(trial.micro_batch, trial.peak_bytes is not None) for trial in trials] == [
        (2, True),
        (8, True),
        (64, False),
        (16, True),
        (32, True),
    ]


@given(
    constant=st.floats(0.0, 5.0),
    growth=st.floats(0.001, 2.0),
    bend=st.floats(0.0, 0.01),
    planned=st.integers(1, 64),
    sizes=st.sets(st.integers(1, 512), min_size=1, max_size=12),
)
def test_trials_end_never_repeat_and_stay_inside_what_is_open(
    constant: float, growth: float, bend: float, planned: int, sizes: set[int]
) -> None:
    trials = tried(planned, sorted(sizes), lambda m: constant + growth * m + bend * m * m, capacity=10.0)
    tried_sizes = [trial.micro_batch for trial in trials]
    assert len(set(tried_sizes)) == len(tried_sizes) <= MOST_TRIALS
    assert set(tried_sizes) <= sizes
    fitting = [trial.micro_batch for trial in trials if trial.peak_bytes is not None]
    failing = [trial.micro_batch for trial in trials if trial.peak_bytes is None]
    assert max(fitting, default=0) < min(failing, default=10**9)


def probe_of(made: Setting, sizes: list[int], factor: float = 1.0, extra: float = 0.0, slowdown: float = 1.0) -> Probe:
    """A probe of what ``made`` chooses, on a device that needs and takes so much more than predicted."""
    best = chosen(made)
    combination = (best.zero_stage, best.offload, best.activation_checkpointing)
    trials = []
    for size in sizes:
        use = memory_use(
            made.profile,
            made.config,
            zero_stage=best.zero_stage,
            workers=made.workers,
            offload=best.offload,
            checkpointing=best.activation_checkpointing,
            micro_batch=size,
            device=made.device,
        )
        activations = float(activation_bytes(made.profile, best.activation_checkpointing, size)[1])
        allocated = use.needed - use.context - activations
        step_s = slowdown * made.roofline(*combination, size, ACCUMULATION, made.workers, made.nodes).total
        part_s = slowdown * made.roofline(*combination, size, 1, 1, 1).compute
        trials.append(Trial(size, int(allocated + factor * activations + extra), float(step_s), float(part_s)))
    return Probe("a device", made.workers, made.nodes, made.profile.precision, *combination, tuple(trials))


def choice_with(made: Setting, probe: Probe, share: int = 8) -> Choice:
    measured = replace(made, probe=probe)
    space = space_of(made.config, made.profile, share, made.workers, on_accelerator=True)
    return choose(measured, space)


def test_a_probe_that_finds_what_was_predicted_changes_nothing() -> None:
    made = setting()
    before, after = chosen(made), choice_with(made, probe_of(made, [2, 8]))
    assert (after.zero_stage, after.micro_batch, after.accumulation) == (
        before.zero_stage,
        before.micro_batch,
        before.accumulation,
    )
    assert after.memory.total == pytest.approx(before.memory.total, rel=1e-6)


@pytest.mark.parametrize(("factor", "extra"), [(1.5, 0.0), (1.0, 2 * GIB), (1.3, -0.5 * GIB)])
def test_memory_is_what_was_measured_also_where_nothing_was(factor: float, extra: float) -> None:
    made = setting()
    correction = replace(made, probe=probe_of(made, [2, 4], factor, extra)).correction
    assert correction is not None
    assert correction.factor == pytest.approx(factor, rel=1e-3)
    assert correction.extra_bytes == pytest.approx(extra, abs=2**20)
    eight = probe_of(made, [8], factor, extra).peaks[8]
    use = memory_use(
        made.profile,
        made.config,
        zero_stage=chosen(made).zero_stage,
        workers=made.workers,
        offload="none",
        checkpointing=False,
        micro_batch=8,
        device="cuda",
        correction=correction,
    )
    assert use.needed - use.context == pytest.approx(eight, rel=1e-3)


def test_one_trial_moves_the_whole_line() -> None:
    made = setting()
    correction = replace(made, probe=probe_of(made, [4], factor=1.0, extra=GIB)).correction
    assert correction is not None
    assert (correction.factor, correction.extra_bytes) == (1.0, pytest.approx(GIB, abs=2**20))


def test_times_are_the_measured_ones() -> None:
    made = setting()
    probe = probe_of(made, [2, 4, 8], slowdown=2.0)
    best = chosen(made)
    for choice in (choice_with(made, probe), chosen(replace(made, probe=probe))):
        assert choice.step_time_s == pytest.approx(2.0 * best.step_time_s, rel=0.1)
    # Another stage was not probed: it is slower by as much as the probed one was.
    measured = replace(made, probe=probe)
    parts, plain = measured.steps(3, "none", False, 4, 2), made.steps(3, "none", False, 4, 2)
    assert parts.total == pytest.approx(2.0 * plain.total, rel=0.05)


def test_a_micro_batch_that_ran_out_is_not_chosen_and_nothing_above_it() -> None:
    made = setting()
    probe = probe_of(made, [2])
    probe = replace(probe, trials=(*probe.trials, Trial(4, None)))
    best = choice_with(made, probe)
    assert best.fits
    combination = (best.zero_stage, best.offload, best.activation_checkpointing)
    assert best.micro_batch < 4 or combination != probe.combination


def test_where_nothing_ran_another_combination_is_taken() -> None:
    made = setting()
    probe = replace(probe_of(made, [1]), trials=(Trial(1, None),))
    best = choice_with(made, probe)
    assert (best.zero_stage, best.offload, best.activation_checkpointing) != probe.combination


def test_a_probe_survives_json_and_begins_a_runs_timings() -> None:
    probe = probe_of(setting(), [2, 8])
    probe = replace(probe, trials=(*probe.trials, Trial(64, None)))
    assert Probe.from_dict(json.loads(json.dumps(probe.to_dict()))) == probe
    assert probe.refused == 64
    times = probe.step_times()
    assert times.micro_batches(nodes=1, workers=8) == {2, 8}
    assert times.model() is not None
