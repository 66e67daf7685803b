"""Ranges of a search: read, checked against the config, and drawn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import AdamW, LayoutConfig, Recipe, RunConfig, ScaleConfig, Stop, apply_overrides
from orchestrator.errors import ConfigError
from orchestrator.planning.layout import lay_out
from orchestrator.scheduling.search_space import Range, draw, parse_search

CONFIG = RunConfig(name="x", recipe=Recipe(batch=8, optimizer=AdamW(learning_rate=1e-3), stop=Stop(epochs=1)))


def test_ranges_are_read_and_short_names_are_the_recipes() -> None:
    found = parse_search(
        [
            "optimizer.learning_rate=loguniform(1e-4, 1e-1)",
            "recipe.batch=randint(8,64)",
            "recipe.optimizer.name=choice(sgd,adamw)",
        ],
        CONFIG,
    )
    assert found == (
        Range("recipe.optimizer.learning_rate", "loguniform", ("1e-4", "1e-1")),
        Range("recipe.batch", "randint", ("8", "64")),
        Range("recipe.optimizer.name", "choice", ("sgd", "adamw")),
    )


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["loguniform", "uniform", "randint"]))
def test_what_is_drawn_lies_within_and_the_config_takes_it(share: float, kind: str) -> None:
    field = "recipe.batch" if kind == "randint" else "recipe.optimizer.learning_rate"
    values = ("2", "64") if kind == "randint" else ("1e-4", "1e-1")
    (found,) = parse_search([f"{field}={kind}({','.join(values)})"], CONFIG)
    drawn = found.at(share)
    assert found.bounds[0] <= float(drawn) * (1 + 1e-5)
    assert float(drawn) <= found.bounds[1] * (1 + 1e-5)
    apply_overrides(CONFIG, [f"{field}={drawn}"])


def test_the_way_along_a_range_is_even_on_its_scale() -> None:
    assert Range("x", "loguniform", ("1e-4", "1e-1")).at(1 / 3) == "0.001"
    assert Range("x", "uniform", ("1", "3")).at(0.25) == "1.5"
    assert [Range("x", "choice", ("a", "b")).at(share) for share in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]
    integers = [Range("x", "randint", ("3", "5")).at(share) for share in (0.0, 0.4, 0.7, 0.999)]
    assert integers == ["3", "4", "5", "5"], "both ends are among them"


@given(
    st.integers(1, 8),
    st.sampled_from(["auto", 1, 2, 3]),
    st.sampled_from(["auto", 1, 2, 5]),
    st.integers(2, 40),
    st.integers(0, 300),
    st.integers(0, 99),
)
def test_every_batch_that_is_drawn_can_be_laid_out(
    workers: int, micro_batch: Any, accumulation: Any, low: int, more: int, seed: int
) -> None:
    """With one of the two fixed; both leave one batch alone. What is not drawn could not be."""
    accumulation = "auto" if micro_batch != "auto" else accumulation
    layout = {"micro_batch": micro_batch, "accumulation": accumulation}
    config = CONFIG.model_copy(update={"scale": ScaleConfig(workers=workers), "layout": LayoutConfig(**layout)})

    def fits(batch: int) -> bool:
        try:
            return bool(lay_out(batch, workers, **layout))
        except ConfigError:
            return False

    fitting = [batch for batch in range(low, low + more + 2) if fits(batch)]
    asked = [f"recipe.batch=randint({low},{low + more + 1})"]
    if not fitting:
        with pytest.raises(ConfigError, match="no multiple of"):
            parse_search(asked, config)
        return
    ranges = parse_search(asked, config)
    assert {int(each["recipe.batch"]) for each in draw(ranges, len(fitting), seed)} == set(fitting)


def test_a_batch_is_drawn_for_every_layout_that_is_searched_too() -> None:
    def step(*texts: str, config: RunConfig = CONFIG) -> int:
        return parse_search(["recipe.batch=randint(16,256)", *texts], config)[0].step

    assert step() == 1
    assert step("scale.workers=randint(1,4)") == 12
    assert step("scale.workers=choice(2,4)", "layout.micro_batch=choice(auto,3)") == 12
    ranged = CONFIG.model_copy(update={"scale": ScaleConfig(workers=(2, 8))})
    assert step(config=ranged) == 2
    other = CONFIG.model_copy(update={"scale": ScaleConfig(workers=2), "layout": LayoutConfig(global_batch=64)})
    assert step(config=other) == 1, "the reference batch is not what is laid out"


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_draws_leave_no_gap_in_any_range(seed: int, count: int) -> None:
    ranges = [Range("rate", "loguniform", ("1e-4", "1e-1")), Range("decay", "uniform", ("0", "1"))]
    drawn = draw(ranges, count, seed)
    assert drawn == draw(ranges, count, seed)
    assert drawn != draw(ranges, count, seed + 1)
    places = {
        "rate": [math.log(float(each["rate"]) / 1e-4) / math.log(1e3) for each in drawn],
        "decay": [float(each["decay"]) for each in drawn],
    }
    for shares in places.values():
        for part, share in enumerate(sorted(shares)):
            assert part / count - 1e-5 <= share <= (part + 1) / count + 1e-5


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "nothing to search: give --search FIELD=RANGE"),
        (["optimizer.learning_rate=0.1"], r"write it as FIELD=RANGE, with a range such as loguniform\(1e-4,1e-1\)"),
        (["optimizer.learning_rate=normal(0,1)"], "write it as FIELD=RANGE"),
        (["optimizer.learning_rate=loguniform(1e-1,1e-4)"], "loguniform takes two rising numbers above 0"),
        (["optimizer.learning_rate=loguniform(0,1)"], "loguniform takes two rising numbers above 0"),
        (["recipe.batch=randint(8)"], "randint takes two numbers"),
        (["optimizer.lerning_rate=uniform(0.1,1)"], "did you mean 'learning_rate'"),
        (["optimizer.learning_rate=uniform(-1,1)"], "learning_rate=-1: should be above 0"),
        (["recipe.optimizer.name=choice(sgd,muon)"], "recipe.optimizer.name='muon': should be"),
        (["recipe.batch=randint(1,2)", "recipe.batch=randint(3,4)"], "a field is given two ranges"),
    ],
)
def test_impossible_ranges(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_search(texts, CONFIG)
