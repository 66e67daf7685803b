"""The table: Prometheus' conventions hold, and the page that documents it is current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.telemetry.metrics import KNOWN, TABLE, Metric, markdown

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
UNITS = {"seconds": "seconds", "bytes": "bytes", "ratio": "ratio"}


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_metric_is_named_as_prometheus_wants(metric: Metric) -> None:
    assert re.fullmatch(r"orchestrator_[a-z][a-z_]*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    stem = metric.name.removesuffix("_total")
    for unit, ending in UNITS.items():
        assert stem.endswith(f"_{ending}") == (metric.unit == unit), "the name carries the unit"
    assert metric.help.endswith(".")
    assert all(re.fullmatch(r"[a-z_]+", label) for label in metric.all_labels)


def test_names_are_unique() -> None:
    assert len(KNOWN) == len(TABLE)
    series = [name for metric in TABLE for name in metric.series]
    assert len(set(series)) == len(series)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == markdown(), "run: orchestrator metrics --markdown > docs/metrics.md"
