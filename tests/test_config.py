"""Config: what it refuses and in which words, and what an override does."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from orchestrator.config import (
    LAMB,
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Exponential,
    LayoutConfig,
    Linear,
    Part,
    Recipe,
    RunConfig,
    ScaleConfig,
    Step,
    Stop,
    WarmupStableDecay,
    apply_overrides,
    differing_fields,
    explain_validation,
    parse_config,
    parse_value,
)
from orchestrator.errors import ConfigError

BASE = RunConfig(
    name="base",
    recipe=Recipe(batch=64, optimizer=AdamW(learning_rate=1e-3), schedule=Cosine(warmup=0.1), stop=Stop(epochs=3)),
)


def changes(*overrides: str, config: RunConfig = BASE) -> list[str]:
    return differing_fields(config.model_dump(), apply_overrides(config, overrides).model_dump())


def refusal(*overrides: str, config: RunConfig = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(config, overrides)
    return str(caught.value)


def parts(kind: type[Part] = Part) -> list[type[Part]]:
    return [p for child in kind.__subclasses__() for p in [child, *parts(child)] if p.__module__ == Part.__module__]


# -- the models --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", parts())
def test_every_field_has_one_line_of_text(part):
    for name, field in part.model_fields.items():
        assert field.description, f"{part.__name__}.{name}"
        assert "\n" not in field.description


@pytest.mark.parametrize("part", parts())
def test_every_part_is_frozen_and_refuses_unknown_fields(part):
    assert part.model_config["frozen"]
    assert part.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        part.model_validate({"no_such_field": 1})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        BASE.seed = 3


def test_a_config_survives_json():
    assert RunConfig.model_validate_json(BASE.model_dump_json()) == BASE


@pytest.mark.parametrize("name", ["a", "digits", "a.b_c-d", "0", "a" * 47])
def test_names_that_are_safe_everywhere(name):
    assert apply_overrides(BASE, [f"name={name}"]).name == name


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a..b", "a/b", "a b", "a" * 48, "a\n", "ä"])
def test_names_that_are_not(name):
    with pytest.raises(ConfigError, match="use 1 to 47 lower-case letters, digits"):
        parse_config({**BASE.model_dump(), "name": name})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=-1"], "seed=-1: should be at least 0"),
        (["recipe.batch=0"], "recipe.batch=0: should be above 0"),
        (["recipe.batch=64.5"], "recipe.batch=64.5: should be a whole number"),
        (["recipe.batch=many"], "recipe.batch='many': should be a whole number"),
        (["recipe.batch=none"], "recipe.batch=None: should be a whole number"),
        (["recipe.clip_norm=inf"], "recipe.clip_norm=inf: should be a finite number"),
        (["recipe.clip_norm=0"], "recipe.clip_norm=0: should be above 0"),
        (["recipe.optimizer.learning_rate=nan"], "recipe.optimizer.learning_rate=nan: should be a finite number"),
        (["recipe.optimizer.learning_rate=fast"], "recipe.optimizer.learning_rate='fast': should be a number"),
        (["recipe.optimizer.beta1=1"], "recipe.optimizer.beta1=1: should be below 1"),
        (["recipe.optimizer.name=foo"], "recipe.optimizer.name='foo': should be 'sgd', 'adam', 'adamw' or 'lamb'"),
        (["recipe.schedule.warmup=2"], "recipe.schedule.warmup=2: should be at most 1"),
        (
            ["recipe.schedule.name=bar"],
            "recipe.schedule.name='bar': should be 'constant', 'linear', 'cosine', 'step', 'exponential' or 'wsd'",
        ),
        (
            ["recipe.schedule.name=wsd", "recipe.schedule.warmup=0.5", "recipe.schedule.decay=0.6"],
            "recipe.schedule: warmup + decay exceed the whole run: make their sum at most 1",
        ),
        (
            ["recipe.schedule.name=step", "recipe.schedule.at=0.5,0.5"],
            "recipe.schedule.at=(0.5, 0.5): the drops must rise, as in 0.5,0.75",
        ),
        (
            ["recipe.schedule.name=step", "recipe.schedule.at=0.5,1.5"],
            "recipe.schedule.at.1=1.5: should be at most 1",
        ),
        (
            ["recipe.optimizer.name=sgd", "recipe.optimizer.nesterov=true", "recipe.optimizer.momentum=0"],
            "recipe.optimizer: nesterov=true needs momentum above 0: set momentum=0.9 or nesterov=false",
        ),
        (["recipe.penalties.exempt=all"], "recipe.penalties.exempt='all': should be 'none' or 'norm_and_bias'"),
        (["recipe.penalties.l1=-1"], "recipe.penalties.l1=-1: should be at least 0"),
        (["layout.zero_stage=5"], "layout.zero_stage=5: should be 0, 1, 2, 3 or 'auto'"),
        (["layout.zero_stage="], "layout.zero_stage='': should be 0, 1, 2, 3 or 'auto'"),
        (["layout.micro_batch=x"], "layout.micro_batch='x': should be a whole number or 'auto'"),
        (["layout.micro_batch=-1"], "layout.micro_batch=-1: should be above 0 or 'auto'"),
        (["layout.offload=cpu"], "layout.offload='cpu': should be 'none', 'optimizer', 'all' or 'auto'"),
        (["layout.precision=fp8"], "layout.precision='fp8': should be 'fp32', 'bf16', 'fp16' or 'auto'"),
        (
            ["layout.activation_checkpointing=maybe"],
            "layout.activation_checkpointing='maybe': should be true, false or 'auto'",
        ),
        (["layout.sync_batch_norm=2"], "layout.sync_batch_norm=2: should be true or false"),
        (["scale.workers=x"], "scale.workers='x': should be a whole number or a list such as 2,8"),
        (["scale.workers=4,2"], "scale.workers=(4, 2): the range falls: write 2,4"),
        (["scale.workers=2,"], "scale.workers=(2,): should be a whole number or a list of two such as 2,8"),
        (["scale.workers=2,3,4"], "scale.workers=(2, 3, 4): should be a whole number or a list of two such as 2,8"),
        (
            ["scale.workers=0,4"],
            "scale.workers=(0, 4): should be a whole number or a list such as 2,8 with each above 0",
        ),
        (["policy.name=clever"], "policy.name='clever': should be 'fixed', 'ramp' or 'goodput'"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(overrides, message):
    assert refusal(*overrides) == message


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ({}, "nothing ends the run: give one of steps, epochs, samples, wall_time_s, metric"),
        ({"steps": 3, "epochs": 1}, "steps and epochs are given: keep one of steps, epochs, samples"),
        ({"metric": "accuracy"}, "metric='accuracy' needs exactly one of at_least and at_most"),
        (
            {"metric": "accuracy", "at_least": 0.9, "at_most": 0.1},
            "metric='accuracy' needs exactly one of at_least and at_most",
        ),
        (
            {"steps": 3, "at_least": 0.9},
            "at_least and at_most need metric: name the evaluation metric they belong to",
        ),
    ],
)
def test_stop_checks_itself(stop, message):
    data = BASE.model_dump()
    data["recipe"]["stop"] = stop
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert str(caught.value) == f"recipe.stop: {message}"


@pytest.mark.parametrize("schedule", [Constant(warmup=0.1), Linear(), Cosine(), Step(), WarmupStableDecay()])
def test_a_schedule_needs_a_length(schedule):
    with pytest.raises(ValidationError, match="is laid over the run's length, and stop gives none: set one of"):
        Recipe(batch=1, optimizer=SGD(learning_rate=1), schedule=schedule, stop=Stop(wall_time_s=1))


def test_a_constant_rate_needs_none():
    recipe = Recipe(batch=1, optimizer=SGD(learning_rate=1), stop=Stop(wall_time_s=1))
    assert not recipe.stop.has_length
    assert Stop(samples=3).has_length


# -- overrides ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["seed=7"], ["seed: 0 -> 7"]),
        ([" seed = 7 "], ["seed: 0 -> 7"]),
        (["seed=7", "seed=8"], ["seed: 0 -> 8"]),
        (["recipe.batch=1e3"], ["recipe.batch: 64 -> 1000"]),
        (["recipe.clip_norm=1"], ["recipe.clip_norm: None -> 1.0"]),
        (["scale.workers=2,8"], ["scale.workers: 1 -> (2, 8)"]),
        (["layout.zero_stage=3"], ["layout.zero_stage: 'auto' -> 3"]),
        (["layout.activation_checkpointing=True"], ["layout.activation_checkpointing: 'auto' -> True"]),
        (["name=123"], ["name: 'base' -> '123'"]),
        (["checkpoint.uri=a,b=c"], ["checkpoint.uri: 'runs' -> 'a,b=c'"]),
        (["checkpoint.interval_steps=none"], []),
        (["recipe.stop.steps=3"], ["recipe.stop.epochs: 3.0 -> None", "recipe.stop.steps: None -> 3"]),
        (["recipe.stop.steps=none"], []),
        (["recipe.stop.wall_time_s=9"], ["recipe.stop.wall_time_s: None -> 9.0"]),
        (
            ["recipe.schedule.name=step", "recipe.schedule.at=0.4"],
            [
                "recipe.schedule.at: None -> (0.4,)",
                "recipe.schedule.factor: None -> 0.1",
                "recipe.schedule.final: 0.0 -> None",
                "recipe.schedule.name: 'cosine' -> 'step'",
            ],
        ),
        (
            ["recipe.schedule.at=0.4,0.6", "recipe.schedule.name=step", "recipe.schedule.factor=0.5"],
            [
                "recipe.schedule.at: None -> (0.4, 0.6)",
                "recipe.schedule.factor: None -> 0.5",
                "recipe.schedule.final: 0.0 -> None",
                "recipe.schedule.name: 'cosine' -> 'step'",
            ],
        ),
    ],
)
def test_an_override_changes_what_it_names(overrides, expected):
    assert changes(*overrides) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scale.workers", "--set 'scale.workers': write it as dotted.field=value, as in scale.workers=2"),
        ("=3", "--set '=3': write it as dotted.field=value, as in scale.workers=2"),
        (
            "sed=3",
            (
                "unknown field 'sed'; did you mean 'seed'? valid: checkpoint, data, evaluation, failures, fleet, "
                "health, layout, name, planning, policy, recipe, scale, seed, storage, telemetry"
            ),
        ),
        (
            "recip.batch=3",
            (
                "unknown section 'recip'; did you mean 'recipe'? valid: checkpoint, data, evaluation, failures, "
                "fleet, health, layout, planning, policy, recipe, scale, storage, telemetry"
            ),
        ),
        (
            "scale.worker=3",
            (
                "unknown field 'scale.worker'; did you mean 'workers'? valid: accelerators_per_worker, "
                "cpus_per_worker, resize_interval_s, workers"
            ),
        ),
        ("recipe.batch.x=3", "'recipe.batch' is a field, not a section: write recipe.batch=value"),
        (
            "layout=auto",
            (
                "'layout' is a section: set one of its fields: global_batch, micro_batch, accumulation, "
                "zero_stage, offload, activation_checkpointing, precision, sync_batch_norm, compile, tf32, "
                "fused_optimizer, channels_last, attention"
            ),
        ),
        (
            "recipe.optimizer.lr=1",
            ("unknown field 'recipe.optimizer.lr'; valid: beta1, beta2, eps, learning_rate, momentum, name, nesterov"),
        ),
        (
            "recipe.optimizer.momentum=0.9",
            ("unknown field 'recipe.optimizer.momentum'; valid: beta1, beta2, eps, learning_rate, name"),
        ),
        (
            "recipe.stop.epochs=none",
            ("recipe.stop: nothing ends the run: give one of steps, epochs, samples, wall_time_s, metric"),
        ),
    ],
)
def test_a_wrong_override_is_refused_with_the_valid_names(override, message):
    assert refusal(override) == message


def test_all_findings_come_at_once():
    assert refusal("seed=-1", "layout.zero_stage=9").split("\n") == [
        "seed=-1: should be at least 0",
        "layout.zero_stage=9: should be 0, 1, 2, 3 or 'auto'",
    ]


def test_two_lengths_of_the_users_own_are_a_contradiction():
    message = "recipe.stop: steps and epochs are given: keep one of steps, epochs, samples"
    assert refusal("recipe.stop.steps=3", "recipe.stop.epochs=2") == message


def test_a_target_replaces_its_rival():
    config = apply_overrides(BASE, ["recipe.stop.metric=accuracy", "recipe.stop.at_least=0.9"])
    assert changes("recipe.stop.metric=loss", "recipe.stop.at_most=0.1", config=config) == [
        "recipe.stop.at_least: 0.9 -> None",
        "recipe.stop.at_most: None -> 0.1",
        "recipe.stop.metric: 'accuracy' -> 'loss'",
    ]


def test_another_optimizer_keeps_what_it_knows_and_drops_the_rest():
    config = apply_overrides(BASE, ["recipe.optimizer.beta1=0.8"])
    switched = apply_overrides(config, ["recipe.optimizer.name=lamb"]).recipe.optimizer
    assert switched == LAMB(learning_rate=1e-3, beta1=0.8)  # with LAMB's own eps, for the old one was a default
    assert apply_overrides(config, ["recipe.optimizer.name=adam"]).recipe.optimizer == Adam(
        learning_rate=1e-3, beta1=0.8
    )
    assert apply_overrides(config, ["recipe.optimizer.name=sgd"]).recipe.optimizer == SGD(learning_rate=1e-3)


def test_what_the_user_sets_is_never_dropped_in_silence():
    message = "unknown field 'recipe.optimizer.beta1'; valid: learning_rate, momentum, name, nesterov"
    assert refusal("recipe.optimizer.name=sgd", "recipe.optimizer.beta1=0.8") == message


def test_another_schedule_starts_from_its_own_defaults():
    assert apply_overrides(BASE, ["recipe.schedule.name=exponential"]).recipe.schedule == Exponential(warmup=0.1)


def test_a_generator_of_overrides_is_read_once():
    assert apply_overrides(BASE, (o for o in ["recipe.optimizer.name=sgd"])).recipe.optimizer.name == "sgd"


def test_an_override_leaves_the_original_alone():
    before = BASE.model_dump_json()
    apply_overrides(BASE, ["recipe.stop.steps=3", "recipe.optimizer.name=sgd"])
    assert BASE.model_dump_json() == before


@given(st.integers(1, 10**6), st.floats(1e-9, 1e3), st.booleans(), st.sampled_from([0, 1, 2, 3, "auto"]))
def test_what_is_written_is_what_is_read(batch, rate, flag, stage):
    overrides = [
        f"recipe.batch={batch}",
        f"recipe.optimizer.learning_rate={rate!r}",
        f"layout.activation_checkpointing={flag}",
        f"layout.zero_stage={stage}",
    ]
    config = apply_overrides(BASE, overrides)
    assert (config.recipe.batch, config.recipe.optimizer.learning_rate) == (batch, rate)
    assert (config.layout.activation_checkpointing, config.layout.zero_stage) == (flag, stage)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_is_either_taken_or_refused(path, value):
    with contextlib.suppress(ConfigError):
        apply_overrides(BASE, [f"{path}={value}"])


@given(st.sampled_from(["layout", "scale", "recipe.stop", "recipe.optimizer", "recipe.schedule"]), st.text(max_size=9))
def test_any_value_is_either_taken_or_refused(section, value):
    node = BASE
    for key in section.split("."):
        node = getattr(node, key)
    for name in type(node).model_fields:
        with contextlib.suppress(ConfigError):
            apply_overrides(BASE, [f"{section}.{name}={value}"])


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_values_are_read_as_they_are_written(value):
    assert parse_value(str(value)) == value


def test_values_that_look_like_nothing_else_are_text():
    assert parse_value("auto") == "auto"
    assert math.isnan(parse_value("nan"))


# -- parsing and comparing ---------------------------------------------------------------------


def test_a_missing_field_and_an_unknown_one():
    data = {"name": "x", "recipe": {"batch": 1, "optimiser": {}, "stop": {"steps": 1}}}
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert str(caught.value).split("\n") == [
        "recipe.optimizer: is required; add it",
        (
            "unknown field 'recipe.optimiser'; did you mean 'optimizer'? valid: batch, clip_norm, optimizer, "
            "penalties, schedule, stop"
        ),
    ]


def test_an_unknown_field_of_a_choice_and_a_choice_without_name():
    optimizer = {"name": "sgd", "learning_rate": 1, "lr": 2}
    data = {"batch": 1, "optimizer": optimizer, "schedule": {"final": 0}, "stop": {"steps": 1}}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, Recipe)
    assert str(caught.value).split("\n") == [
        "unknown field 'optimizer.lr'; valid: learning_rate, momentum, name, nesterov",
        "schedule.name: is required; add it",
    ]


def test_a_section_that_is_none():
    with pytest.raises(ConfigError) as caught:
        parse_config({**BASE.model_dump(), "layout": 3})
    assert str(caught.value) == "layout=3: should be a section with fields"


def test_differing_fields_lists_leaves_in_order():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4, "d": 3}, "e": None, "a": 0}
    assert differing_fields(old, new) == ["a: 1 -> 0", "b.c: 2 -> 4"]
    assert differing_fields(old, old) == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdamW(learning_rate=-1), "AdamW: learning_rate=-1: should be above 0"),
        (lambda: ScaleConfig(workers=0), "ScaleConfig: workers=0: should be above 0 or a list such as 2,8"),
        (
            lambda: LayoutConfig(zero=1),
            (
                "LayoutConfig: unknown field 'zero'; valid: "
                "accumulation, activation_checkpointing, attention, channels_last, compile, fused_optimizer, "
                "global_batch, micro_batch, offload, precision, sync_batch_norm, tf32, zero_stage"
            ),
        ),
        (
            lambda: RunConfig(name="X", recipe=BASE.recipe),
            (
                "name='X': use 1 to 47 lower-case letters, digits, '.', "
                "'_' or '-', starting and ending with a letter or digit"
            ),
        ),
    ],
)
def test_a_parts_own_error_is_explained_in_the_same_words(build, message):
    with pytest.raises(ValidationError) as caught:
        build()
    assert explain_validation(caught.value) == message


def test_a_strangers_model_is_explained_too():
    class Other(BaseModel):
        x: int

    with pytest.raises(ValidationError) as caught:
        Other(x="y")
    assert explain_validation(caught.value) == "Other: x='y': should be a whole number"


def test_none_is_a_word_where_it_is_a_choice() -> None:
    config = apply_overrides(BASE, ["layout.offload=none", "recipe.clip_norm=none"])
    assert config.layout.offload == "none"
    assert config.recipe.clip_norm is None


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "host:80", "http://user:secret@host", "http://host/path", "http://host?x=1", "http://host:port"],
)
def test_an_endpoint_is_an_address_and_nothing_else(url):
    assert "without user, password and path" in refusal(f"storage.endpoint_url={url}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8333", "https://s3.example.org", "http://[::1]:80/"])
def test_endpoints_that_are_addresses(url):
    assert apply_overrides(BASE, [f"storage.endpoint_url={url}"]).storage.endpoint_url == url


def test_lanes_fit_into_a_window():
    message = "data: lanes=4 exceeds window=2: a lane is at least one row group"
    assert refusal("data.lanes=4", "data.window=2") == message
