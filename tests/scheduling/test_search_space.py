"""Ranges of a search: read, checked against the config, and drawn from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import AdamW, Recipe, RunConfig, Stop, apply_overrides
from orchestrator.errors import ConfigError
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
