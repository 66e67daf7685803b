"""The choice among all combinations: what it prefers, what a pin keeps, what is said where nothing fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gloo_jobs as jobs
from orchestrator.config import Stop
from orchestrator.errors import ConfigError
from orchestrator.planning.choice import (
    best_of_each_stage,
    choose,
    smallest_changes,
    space_of,
)
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costing import Costing
from orchestrator.planning.plan import make_plan
from orchestrator.telemetry.planned import alternative_rows, plan_lines
from settings import ADAM, GIB, PROFILE, chosen, setting


def test_what_fits_whole_is_taken_whole() -> None:
    """In stage 2, which hides its communication; stage 1 does not, and with one micro batch sends no less."""
    best = chosen(setting(), 4)
    assert (best.zero_stage, best.offload, best.activation_checkpointing) == (2, "none", False)
    assert (best.micro_batch, best.accumulation) == (4, 1)
    assert best.fits


def test_a_larger_micro_batch_before_accumulation_and_accumulation_before_recomputation() -> None:
    """32 samples of 4.5 GiB do not fit at once; recomputing would cost a third more than going twice or more."""
    best = chosen(setting(), 32)
    assert best.accumulation > 1
    assert not best.activation_checkpointing
    fuller = 2 * best.micro_batch
    pinned = setting({"micro_batch": fuller, "zero_stage": best.zero_stage, "activation_checkpointing": False})
    assert not chosen(pinned, 32).fits


def test_with_accumulation_stage_1_goes_before_stage_2() -> None:
    best = chosen(setting({"micro_batch": 2}), 16)
    assert (best.zero_stage, best.accumulation) == (1, 8)


def test_offload_comes_last() -> None:
    """Two workers that cannot even share 8 billion parameters of state move it out, and no more than they must."""
    best = chosen(setting(workers=2, parameters=8_000_000_000), 1)
    assert best.fits
    assert best.offload == "optimizer"
    assert best.activation_checkpointing or best.zero_stage > 1
    assert chosen(setting(workers=16, parameters=8_000_000_000), 1).offload == "none"
    assert not chosen(setting(workers=2, parameters=8_000_000_000, host_bytes=GIB), 1).fits


@pytest.mark.parametrize(
    "pin",
    [{"zero_stage": 3}, {"offload": "optimizer"}, {"activation_checkpointing": True}, {"micro_batch": 2}],
    ids=str,
)
def test_a_pin_is_kept(pin: dict[str, Any]) -> None:
    best = chosen(setting(pin))
    assert {name: getattr(best, name) for name in pin} == pin


@given(st.integers(1, 64), st.integers(1, 48), st.sampled_from(["a100-40gb", "h100-80gb", "l4", "cpu"]))
def test_no_other_combination_of_the_chosen_kind_is_faster_and_fits(share: int, gigabytes: int, name: str) -> None:
    made = setting(accelerator=name, capacity_bytes=gigabytes * GIB)
    space = space_of(made.config, made.profile, share, made.workers, on_accelerator=made.device == "cuda")
    best = choose(made, space)
    assert best.micro_batch * best.accumulation == share
    assert best.fits == (best.memory.needed <= made.capacity_bytes + 16)
    assert best.has_room == (best.memory.total <= made.capacity_bytes + 16)
    others = [c for c in best_of_each_stage(made, space) if c.fits and c.zero_stage > 0]
    if others:
        assert best.fits
    others = [c for c in others if c.has_room]
    if made.device == "cuda" and best.has_room:
        stages = {1} if best.accumulation > 1 and best.zero_stage == 1 else {1, 2, 3}
        rivals = [c.step_time_s for c in others if c.offload == best.offload and c.zero_stage in stages]
        assert all(best.step_time_s <= 1.0201 * seconds for seconds in rivals)


def test_on_cpus_only_memory_changes_the_share() -> None:
    """The micro batch is a worker's share unless that does not fit; the stage is 1, or 0 alone."""
    wide, narrow = setting(accelerator="cpu", capacity_bytes=999 * GIB), setting(accelerator="cpu")
    assert str(chosen(wide)) == "stage 1, micro batch 8 x 1"
    tight = replace(narrow, capacity_bytes=32 * GIB)
    assert chosen(tight).fits
    assert chosen(tight).accumulation > 1 or chosen(tight).activation_checkpointing
    assert chosen(replace(wide, workers=1)).zero_stage == 0


# -- what does not fit -------------------------------------------------------------------------


def test_the_smallest_changes_are_changes_with_which_it_fits() -> None:
    layout = {"zero_stage": 0, "activation_checkpointing": False, "micro_batch": 8}
    made = setting(layout, parameters=2_000_000_000)
    space = space_of(made.config, made.profile, 8, 8, on_accelerator=True)
    assert not choose(made, space).fits
    changes = smallest_changes(made, space, 8)
    assert changes
    for change in changes:
        field, equals, value = change.removeprefix("layout.").partition("=")
        if equals and field in layout:
            parsed = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
            assert chosen(setting({**layout, field: parsed}, parameters=2_000_000_000)).fits, change


def test_more_workers_are_named_where_they_help() -> None:
    made = setting({"offload": "none"}, workers=2, parameters=20_000_000_000)
    space = space_of(made.config, made.profile, 1, 2, on_accelerator=True)
    assert smallest_changes(made, space, 1)[-1] == "16 workers"


def test_what_is_tight_is_warned_of_and_not_refused() -> None:
    """Fragmentation is an allowance: a run that fits without it is planned, and told how to have room."""
    layout = {"zero_stage": 3, "offload": "none", "activation_checkpointing": False, "micro_batch": 8}
    whole = chosen(setting(layout, capacity_bytes=64 * GIB))
    assert whole.has_room
    for capacity, fits in ((whole.memory.total - 1, True), (whole.memory.needed - 1, False)):
        made = setting(layout, capacity_bytes=capacity)
        best = chosen(made)
        assert (best.fits, best.has_room) == (fits, False)
    tight = setting(layout, capacity_bytes=whole.memory.total - 1)
    space = space_of(tight.config, tight.profile, 8, 8, on_accelerator=True)
    changes = smallest_changes(tight, space, 8, roomy=True)
    assert "layout.micro_batch=4" in changes
    assert chosen(setting({**layout, "micro_batch": 4}, capacity_bytes=tight.capacity_bytes)).has_room


def test_text_json_and_warning_agree_on_what_is_tight() -> None:
    layout = {"zero_stage": 3, "offload": "none", "activation_checkpointing": False, "micro_batch": 8}
    layout["precision"] = "bf16"
    config = jobs.toy_config(8, recipe=ADAM, layout=layout)
    use = chosen(setting(layout, capacity_bytes=64 * GIB)).memory.total
    shape = ClusterShape(1, 64, 8, "A100", device_memory_bytes=use - 1)
    plan = make_plan(config, shape, train_samples=1000, evaluation_samples=0, profile=PROFILE)
    said = plan.to_dict()
    assert (said["fits"], said["tight"]) == (True, True)
    assert said["memory_bytes"]["needed"] <= said["device_memory_bytes"] < said["memory_bytes"]["total"]
    warning = next(reason for reason in said["reasons"] if reason.startswith("memory is tight"))
    assert all(change in warning for change in said["changes"])
    assert "layout.micro_batch=4" in warning
    text = "\n".join(plan_lines(plan))
    assert warning in text
    assert "fits     tight" in text
    assert [row[-1] for row in alternative_rows(plan) if row[0] == "3"] == ["chosen, tight"]


def test_room_goes_before_speed_and_offload_after_a_tight_fit() -> None:
    open_batch = {"zero_stage": 3, "offload": "none", "activation_checkpointing": False}
    whole = setting({**open_batch, "micro_batch": 8}, capacity_bytes=64 * GIB)
    capacity = chosen(whole).memory.total - 1
    best = chosen(setting(open_batch, capacity_bytes=capacity))
    assert best.has_room
    assert best.micro_batch < 8
    pinned = {**open_batch, "micro_batch": 8, "offload": "auto"}
    tight = chosen(setting(pinned, capacity_bytes=capacity))
    assert (tight.offload, tight.fits, tight.has_room) == ("none", True, False)


def test_a_run_that_does_not_fit_is_refused_with_the_remedy() -> None:
    config = jobs.toy_config(8, recipe=ADAM, layout={"zero_stage": 0, "precision": "bf16"})
    shape = ClusterShape(1, 64, 8, "A100")
    profile = replace(PROFILE, parameters=7_000_000_000)
    with pytest.raises(ConfigError, match=r"does not fit: stage 0.* needs 1\d\d\.\d GiB on each of 8 a100-40gb, which"):
        make_plan(config, shape, train_samples=1000, evaluation_samples=0, profile=profile)
    plan = make_plan(config, shape, train_samples=1000, evaluation_samples=0, profile=profile, refuse=False)
    assert plan.costing is not None
    assert not plan.costing.fits
    assert plan.zero_stage == 0
    assert plan.costing.changes[0] == "layout.zero_stage=3"


def test_checkpointing_without_blocks_is_refused() -> None:
    config = jobs.toy_config(8, recipe=ADAM, layout={"activation_checkpointing": True})
    profile = replace(PROFILE, checkpointed=None, not_checkpointed="it has no repeated blocks")
    with pytest.raises(ConfigError, match="it has no repeated blocks"):
        make_plan(config, ClusterShape(1, 64, 8, "A100"), train_samples=99, evaluation_samples=0, profile=profile)


def test_the_same_numbers_make_the_same_plan() -> None:
    """Workers make it again from the driver's profile."""
    config = jobs.toy_config(8, recipe=ADAM, layout={"zero_stage": "auto", "precision": "auto"})
    shape = ClusterShape(1, 64, 8, "A100", memory_bytes=64 * GIB)
    first, second = (
        make_plan(config, shape, train_samples=99, evaluation_samples=0, profile=PROFILE) for _ in range(2)
    )
    assert first == second
    assert first.memory is not None
    assert first.to_dict()["memory_bytes"] == first.memory.to_dict()


def test_where_accumulation_is_pinned_a_smaller_batch_is_a_remedy() -> None:
    made = setting({"accumulation": 1, "zero_stage": 1, "activation_checkpointing": False, "offload": "none"})
    space = space_of(made.config, made.profile, 64, made.workers, on_accelerator=True)
    assert not choose(made, space).fits
    said = next(change for change in smallest_changes(made, space, 64) if change.startswith("layout.global_batch="))
    batch = int(said.partition("=")[2])
    for size, fits in ((batch, True), (2 * batch, False)):
        assert choose(made, replace(space, layouts=((size // made.workers, 1),))).fits is fits


def test_one_worker_whose_stage_is_pinned_is_told_what_would_fit() -> None:
    made = setting({"zero_stage": 0, "offload": "none"}, workers=1, parameters=8_000_000_000)
    space = space_of(made.config, made.profile, 8, 1, on_accelerator=True)
    assert not choose(made, space).fits
    assert smallest_changes(made, space, 8), "offload and another stage together, or more workers"


def test_a_pinned_accumulation_is_named_with_the_micro_batch_that_it_contradicts() -> None:
    """Either alone would contradict the other's pin: their product is a worker's share."""
    pins = {"accumulation": 1, "zero_stage": 3, "activation_checkpointing": False, "offload": "none"}
    for both in ({}, {"micro_batch": 16}):
        made = setting({**pins, **both})
        space = space_of(made.config, made.profile, 16, made.workers, on_accelerator=True)
        assert not choose(made, space).fits
        said = smallest_changes(made, space, 16)[0].split(" and ")
        changed = {field.removeprefix("layout."): int(value) for field, value in (each.split("=") for each in said)}
        assert changed.keys() == {"accumulation", *both}
        assert chosen(setting({**pins, **changed}), 16).fits


def test_a_run_time_is_a_bound_where_the_batch_is_not_the_references() -> None:
    def costing(batch: int, **stop: float) -> Costing:
        recipe = {**ADAM, "stop": Stop(**stop)}
        layout = {"zero_stage": 1, "precision": "bf16", "global_batch": batch}
        plan = make_plan(
            jobs.toy_config(8, recipe=recipe, layout=layout),
            ClusterShape(1, 64, 8, "A100"),
            train_samples=10_000,
            evaluation_samples=0,
            profile=PROFILE,
        )
        assert plan.costing is not None
        return plan.costing

    bounds = {batch: costing(batch, samples=1000).run_time_bound for batch in (32, 64, 128)}
    assert bounds == {32: "at most", 64: "exact", 128: "at least"}
    short = costing(128, samples=1000, wall_time_s=0.5)
    assert (short.run_time_s, short.run_time_bound) == (0.5, "at most")
    assert costing(64, wall_time_s=60).run_time_s == 60


def test_what_could_not_be_traced_is_among_the_reasons() -> None:
    config = jobs.toy_config(1, recipe=ADAM, layout={})
    profile = replace(PROFILE, precision="fp32", untraced="RuntimeError: it asks for a number")
    shape = ClusterShape(1, 8, memory_bytes=999 * GIB)
    plan = make_plan(config, shape, train_samples=1000, evaluation_samples=0, profile=profile)
    assert any("RuntimeError: it asks for a number" in reason for reason in plan.reasons)
