"""The dashboards: what they show is exported, what is exported is shown, and panels have all that a reader needs."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from orchestrator.telemetry.dashboards import COLUMNS, DASHBOARDS, Dashboard, expressions, render
from orchestrator.telemetry.metrics import TABLE

SERIES = {name: metric for metric in TABLE for name in metric.series}
NOT_DRAWN = {"orchestrator_run_info", "orchestrator_step_part_seconds", "orchestrator_evaluation_seconds"}
"""For queries of one's own: joins, a part's distribution, and what the parts show already."""


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\borchestrator_\w+", query))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_a_query_asks_for_what_is_exported_with_the_labels_it_has(dashboard: Dashboard) -> None:
    for query in expressions(dashboard):
        for name, labels in re.findall(r"\b(orchestrator_\w+)(?:\{([^}]*)\})?", query):
            assert name in SERIES, query
            known = {*SERIES[name].all_labels, "le"}
            assert set(re.findall(r"(\w+)=", labels)) <= known, query


def test_what_is_exported_is_shown() -> None:
    drawn = {SERIES[name].name for d in DASHBOARDS for query in expressions(d) for name in metrics_in(query)}
    assert {metric.name for metric in TABLE} - drawn == NOT_DRAWN


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_a_dashboard_is_complete(dashboard: Dashboard) -> None:
    made: dict[str, Any] = json.loads(render(dashboard))
    assert made["uid"] == dashboard.uid
    assert {link["url"].rpartition("/")[2] for link in made["links"]} >= {d.uid for d in DASHBOARDS} - {dashboard.uid}
    names = [variable["name"] for variable in made["templating"]["list"]]
    assert names == ["datasource", *dashboard.variables]
    panels = made["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    used = set(re.findall(r"\$(\w+)", " ".join(expressions(dashboard)))) - {"__rate_interval"}
    assert used == set(dashboard.variables)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_do_not_overlap(dashboard: Dashboard) -> None:
    places = [panel["gridPos"] for panel in json.loads(render(dashboard))["panels"]]
    cells = [
        (x, y)
        for place in places
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < COLUMNS
