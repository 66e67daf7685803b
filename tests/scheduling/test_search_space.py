"""Ranges of a search: read, checked against the config, and drawn from."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import AdamW, Recipe, RunConfig, Stop, apply_overrides
from orchestrator.errors import ConfigError
from orchestrator.scheduling.search_space import Range, parse_search

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


@given(st.integers(0, 2**32), st.sampled_from(["loguniform", "uniform", "randint"]))
def test_what_is_drawn_lies_within_and_the_config_takes_it(seed: int, kind: str) -> None:
    field = "recipe.batch" if kind == "randint" else "recipe.optimizer.learning_rate"
    values = ("2", "64") if kind == "randint" else ("1e-4", "1e-1")
    (found,) = parse_search([f"{field}={kind}({','.join(values)})"], CONFIG)
    drawn = found.draw(random.Random(seed))
    assert found.bounds[0] <= float(drawn) * (1 + 1e-5)
    assert float(drawn) <= found.bounds[1] * (1 + 1e-5)
    apply_overrides(CONFIG, [f"{field}={drawn}"])


def test_a_loguniform_draw_is_even_over_decades() -> None:
    source = random.Random(0)
    found = Range("recipe.optimizer.learning_rate", "loguniform", ("1e-4", "1e-1"))
    decades = [math.floor(math.log10(float(found.draw(source)))) for _ in range(3000)]
    assert all(abs(decades.count(decade) / 3000 - 1 / 3) < 0.05 for decade in (-4, -3, -2))


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
