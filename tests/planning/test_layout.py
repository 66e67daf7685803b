"""Layouts: the three factors are the batch, whatever is chosen, or the refusal says what would work."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.planning.layout import Layout, lay_out, refactor, sharing_workers

batches = st.integers(1, 2000)
workers = st.integers(1, 12)
choices = st.just("auto") | st.integers(1, 40)


@given(batches, workers, choices, choices)
def test_a_layout_is_the_batch_and_keeps_what_was_set(batch: int, workers: int, micro_batch, accumulation) -> None:
    """Where there is one; and it is refused only where there is none."""
    fixed = [n for n in (micro_batch, accumulation) if n != "auto"]
    try:
        layout = lay_out(batch, workers, micro_batch=micro_batch, accumulation=accumulation)
    except ConfigError:
        unit = workers
        for factor in fixed:
            unit *= factor
        assert batch % unit != 0 or (len(fixed) == 2 and batch != unit)
        return
    assert layout.global_batch == batch
    assert layout.workers == workers
    assert micro_batch in ("auto", layout.micro_batch)
    assert accumulation in ("auto", layout.accumulation)


@given(batches, workers, workers, choices)
def test_the_workers_that_share_a_batch_are_those_it_can_be_laid_out_over(
    batch: int, one: int, other: int, micro_batch
) -> None:
    low, high = sorted((one, other))
    possible = []
    for count in range(low, high + 1):
        with contextlib.suppress(ConfigError):
            possible.append(lay_out(batch, count, micro_batch=micro_batch).workers)
    if possible:
        assert list(sharing_workers(batch, low, high, micro_batch=micro_batch)) == possible
    else:
        with pytest.raises(ConfigError, match=f"over any number of workers in scale.workers={low},{high}: use "):
            sharing_workers(batch, low, high, micro_batch=micro_batch)


@given(st.integers(1, 50), workers)
def test_a_free_choice_takes_the_share_at_once(share: int, workers: int) -> None:
    assert lay_out(share * workers, workers) == Layout(workers, share, 1)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_the_parts_of_a_batch(workers: int, micro_batch: int, accumulation: int) -> None:
    layout = Layout(workers, micro_batch, accumulation)
    assert layout.worker_batch * workers == layout.global_batch == workers * micro_batch * accumulation
    assert lay_out(layout.global_batch, workers, micro_batch=micro_batch) == layout
    assert lay_out(layout.global_batch, workers, accumulation=accumulation) == layout


def test_it_is_written_as_it_multiplies() -> None:
    assert str(Layout(2, 8, 4)) == "64 = 2 workers x 8 micro batch x 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (65, 2, "auto", "auto"),
            "layout.global_batch=65 does not divide over scale.workers=2: use 64 or 66, or another number of workers",
        ),
        (
            (3, 4, "auto", "auto"),
            "layout.global_batch=3 does not divide over scale.workers=4: use 4, or another number of workers",
        ),
        (
            (64, 2, 5, "auto"),
            (
                "layout.micro_batch=5 x 2 workers does not divide layout.global_batch=64: each worker's share is 32 "
                "samples, so use micro_batch 2 or 4 or 8, or a global batch of 60 or 70"
            ),
        ),
        (
            (64, 2, 100, "auto"),
            (
                "layout.micro_batch=100 x 2 workers does not divide layout.global_batch=64: each worker's share is 32 "
                "samples, so use micro_batch 8 or 16 or 32, or a global batch of 200"
            ),
        ),
        (
            (64, 2, "auto", 3),
            (
                "layout.accumulation=3 x 2 workers does not divide layout.global_batch=64: each worker's share is 32 "
                "samples, so use accumulation 1 or 2 or 4, or a global batch of 60 or 66"
            ),
        ),
        (
            (64, 2, 8, 8),
            (
                "layout.micro_batch=8 x layout.accumulation=8 x 2 workers = 128, but the global batch is 64: "
                "make them agree, or set one of the three to auto"
            ),
        ),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    batch, workers, micro_batch, accumulation = arguments
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        lay_out(batch, workers, micro_batch=micro_batch, accumulation=accumulation)


@given(batches, workers, st.integers(1, 40))
def test_every_remedy_works(batch: int, workers: int, micro_batch: int) -> None:
    """The batches and micro batches that a refusal names are themselves accepted."""
    try:
        lay_out(batch, workers, micro_batch=micro_batch)
    except ConfigError as error:
        message = str(error)
        if found := re.search(r"use micro_batch (.*?), or a global batch of (.*)", message):
            for other in found[1].split(" or "):
                lay_out(batch, workers, micro_batch=int(other))
            for other in found[2].split(" or "):
                lay_out(int(other), workers, micro_batch=micro_batch)
        else:
            for other in re.search(r"use (.*?), or another", message)[1].split(" or "):
                lay_out(int(other), workers)


# -- other workers -----------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(1, 64))
def test_other_workers_keep_the_batch_and_what_is_known_to_fit(
    before: int, micro_batch: int, accumulation: int, workers: int
) -> None:
    old = Layout(before, micro_batch, accumulation)
    new = refactor(old, workers)
    assert new.workers == workers
    assert new.micro_batch <= micro_batch
    if old.global_batch % workers == 0:
        assert new.global_batch == old.global_batch
    else:
        assert abs(new.global_batch - old.global_batch) < workers


@given(st.integers(1, 16), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_other_workers_keep_what_is_pinned(before: int, micro_batch: int, accumulation: int, workers: int) -> None:
    old = Layout(before, micro_batch, accumulation)
    assert refactor(old, workers, micro_batch=micro_batch).micro_batch == micro_batch
    assert refactor(old, workers, accumulation=accumulation).accumulation == accumulation
    both = refactor(old, workers, micro_batch=micro_batch, accumulation=accumulation)
    assert both == Layout(workers, micro_batch, accumulation)


def test_half_the_workers_take_twice_as_many_micro_batches() -> None:
    assert refactor(Layout(4, 32, 1), 2) == Layout(2, 32, 2)
    assert refactor(Layout(2, 32, 2), 4) == Layout(4, 32, 1)
    assert refactor(Layout(2, 16, 1), 3) == Layout(3, 11, 1)
