"""A search's page: whole, self-contained, and with every trial in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from orchestrator.telemetry.charts import Dot, scatter
from orchestrator.telemetry.searched import SearchedTrial, render_search

RATE = "recipe.optimizer.learning_rate"
TRIALS = [
    SearchedTrial("trial-001", {RATE: "0.004", "kind": "adamw"}, "finished", 1.0, 0.2, [(100, 0.9, 1), (900, 0.2, 9)]),
    SearchedTrial("trial-000", {RATE: "1e-05", "kind": "<sgd>"}, "ended early", 0.1, 0.9, [(100, 0.9, 1)]),
    SearchedTrial("trial-002", {RATE: "0.5", "kind": "sgd"}, "failed", 0.0, None, []),
]


class Tags(HTMLParser):
    """Whether every element that is opened is closed, in order."""

    VOID = frozenset({"meta", "path", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None: ...


def test_a_page_holds_every_trial_and_asks_for_nothing() -> None:
    html = render_search("digits", "loss", TRIALS, f"--set {RATE}=0.004")
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert "default-src 'none'" in html
    assert html.count("<tr>") == 4
    assert "<sgd>" not in html
    assert "&lt;sgd&gt;" in html
    assert f"<code>--set {RATE}=0.004</code>" in html
    assert "no value" in html


def test_numbers_are_drawn_over_their_field_and_words_are_not() -> None:
    html = render_search("digits", "loss", TRIALS, "")
    assert f"loss by {RATE}" in html
    assert "loss by kind" not in html
    points = json.loads(re.search(r'id="points">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    assert len(points["charts"]) == html.count("<figure") == 2
    assert [curve["name"] for curve in points["charts"][-1]["curves"]] == ["trial-000", "trial-001, the best"]


def test_a_search_that_measured_nothing_still_has_a_page() -> None:
    assert "no values" in render_search("digits", "loss", TRIALS[2:], "")


@pytest.mark.parametrize(("high", "middle"), [(1e-1, 500), (1e-3, 0)])
def test_rates_over_decades_lie_on_a_logarithmic_axis(high: float, middle: float) -> None:
    html, _ = scatter("t", "", [Dot(1e-5, 1.0, "a"), Dot(1e-3, 2.0, "b"), Dot(high, 3.0, "c")])
    places = [float(x) for x in re.findall(r'spots c0" d="M([\d.]+) ', html)]
    assert places[0] == 0
    assert places[1] == pytest.approx(middle or 1000, abs=1)
