"""The report: the table, the picture and the best within a budget."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.compression.measuring import Latency
from orchestrator.compression.report import Budget, Entry, best, quality_of, report_html, report_lines, report_rows
from orchestrator.errors import ConfigError


def entry(path: str, size: int, accuracy: float, median_s: float) -> Entry:
    latency = Latency(median_s=median_s, p99_s=2 * median_s, samples_per_s=1 / median_s, threads=2)
    return Entry("digits", path, f"/runs/{path}", size, size // 2, {"accuracy": accuracy, "loss": 0.1}, latency, 0.0)


FP32, INT8, TINY = entry("torch", 1000, 0.99, 1e-3), entry("onnx-int8", 290, 0.985, 2e-4), entry("pte", 250, 0.9, 5e-4)
FAILED = Entry("digits", "executorch", problem="X cannot be lowered: no operator aten::foo")
ENTRIES = [FP32, INT8, TINY, FAILED]


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (Budget(), TINY),
        (Budget(min_accuracy=0.98), INT8),
        (Budget(min_accuracy=0.99), FP32),
        (Budget(max_latency_s=3e-4), INT8),
        (Budget(max_size_bytes=260, min_accuracy=0.95), None),
    ],
)
def test_the_smallest_within_the_budget_is_chosen(budget: Budget, chosen: Entry | None) -> None:
    assert best(ENTRIES, budget, "accuracy") == chosen


def test_a_metric_that_falls_is_limited_from_above() -> None:
    entries = [
        dataclasses.replace(e, metrics={"loss": loss}) for e, loss in zip(ENTRIES[:3], (0.1, 0.2, 3), strict=True)
    ]
    assert best(entries, Budget(min_accuracy=0.5), "loss") == entries[1]
    assert best(entries, Budget(min_accuracy=0.05), "loss") is None
    assert best(entries, Budget(min_accuracy=9), "perplexity") is None


numbers = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(st.integers(1, 999), numbers, numbers), min_size=1), numbers, numbers, numbers)
def test_what_is_chosen_keeps_every_limit_and_nothing_smaller_does(rows, size, accuracy, latency) -> None:
    entries = [entry("x", *row) for row in rows]
    budget = Budget(max_size_bytes=size, min_accuracy=accuracy, max_latency_s=latency)
    chosen = best(entries, budget, "accuracy")
    keeping = [
        e
        for e in entries
        if e.size_bytes <= size and e.metrics["accuracy"] >= accuracy and e.latency.median_s <= latency
    ]
    assert (chosen is None) == (not keeping)
    if chosen is not None:
        assert chosen in keeping
        assert chosen.size_bytes == min(e.size_bytes for e in keeping)


def test_the_metric_to_compare_by() -> None:
    assert quality_of(ENTRIES) == "accuracy"
    assert quality_of(ENTRIES, "loss") == "loss"
    with pytest.raises(ConfigError, match=r"metric='acuracy' is none of the task's metrics; did you mean 'accuracy'"):
        quality_of(ENTRIES, "acuracy")


def test_a_limit_that_nothing_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_size_bytes=0: give a number above 0"):
        Budget(max_size_bytes=0)


def test_the_table_as_text() -> None:
    lines = report_lines(ENTRIES, "accuracy", INT8, Budget(min_accuracy=0.98))
    assert lines == [
        "model   path           size  of fp32  packed  accuracy  median     p99  samples/s   off by",
        "digits  torch       1,000 B     1.00   500 B      0.99    1 ms    2 ms      1,000  0.0e+00",
        "digits  onnx-int8     290 B     0.29   145 B     0.985  0.2 ms  0.4 ms      5,000  0.0e+00",
        "digits  pte           250 B     0.25   125 B       0.9  0.5 ms    1 ms      2,000  0.0e+00",
        "digits  executorch  X cannot be lowered: no operator aten::foo",
        "best within the budget: digits onnx-int8, /runs/onnx-int8",
    ]
    assert report_lines(ENTRIES, "accuracy", None, Budget(max_size_bytes=1))[-1].startswith("nothing keeps the budget")


def test_sizes_are_compared_with_an_fp32_file_or_not_at_all() -> None:
    rows = report_rows([INT8, FP32], "accuracy")
    assert [row[3] for row in rows] == ["of fp32", "0.29", "1.00"]
    assert [row[3] for row in report_rows([INT8, FAILED], "accuracy")] == ["of fp32", "-", ""]


def test_the_page_is_closed_and_names_every_variant_safely() -> None:
    html = report_html("<digits>", ENTRIES, "accuracy", INT8, "about")
    assert "<digits>" not in html
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("<rect") == 2 * 3
    assert all(e.path in html for e in ENTRIES)
    assert "no operator aten::foo" in html


def test_json_has_no_nan() -> None:
    assert FAILED.to_dict()["difference"] is None
    assert math.isnan(FAILED.difference)
