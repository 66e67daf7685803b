"""A search as a page: which settings were tried, what came of each, and how every trial came there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from orchestrator.telemetry import human
from orchestrator.telemetry.charts import Chart, Curve, Dot, Point, draw, scatter
from orchestrator.telemetry.page import page

__all__ = ["SearchedTrial", "render_search"]


@dataclass(frozen=True)
class SearchedTrial:
    """One trial: what was set, how far it came, and the metric on its way."""

    name: str
    settings: Mapping[str, str]
    state: str
    share: float
    best: float | None
    points: Sequence[Point]
    """Progress, value and step of each evaluation."""


def render_search(name: str, metric: str, trials: Sequence[SearchedTrial], set_line: str) -> str:
    """The page: a picture for each field with numbers, the trials' curves, and the table; from best to worst."""
    measured = [trial for trial in trials if trial.best is not None and math.isfinite(trial.best)]
    figures = [_scatter(field, metric, measured) for field in _fields(trials)]
    drawn = [figure for figure in figures if figure is not None]
    domain = (0.0, max((p[0] for trial in trials for p in trial.points), default=1.0) or 1.0)
    drawn.append(draw(_curves(metric, measured), domain, ()))
    charts = "".join(html for html, _ in drawn)
    body = f"""<main><header><h1>Search: {escape(name)}</h1>
<p class="sub">{len(trials)} trials by {escape(metric)}; the best: <code>{escape(set_line)}</code></p></header>
<section aria-label="Curves"><h2>What was tried</h2><div class="charts">{charts}</div></section>
<section><h2>Trials</h2><div class="scroll">{_table(metric, trials)}</div></section></main>"""
    return page(f"{name} · search", body, {"domain": list(domain), "charts": [points for _, points in drawn]})


def _fields(trials: Sequence[SearchedTrial]) -> list[str]:
    return list(dict.fromkeys(field for trial in trials for field in trial.settings))


def _scatter(field: str, metric: str, trials: Sequence[SearchedTrial]) -> tuple[str, dict[str, Any]] | None:
    """The metric over one field's values; None where they are words."""
    dots = []
    for index, trial in enumerate(trials):
        value = _number(trial.settings.get(field, ""))
        if value is not None and trial.best is not None:
            label = f"{trial.name}: {field} {trial.settings[field]}, {metric} {human.number(trial.best)}"
            dots.append(Dot(value, trial.best, f"{label}, {trial.share:.0%} of the run", 0 if index else 1))
    # The best is drawn last, so that it lies on top.
    return scatter(f"{metric} by {field}", "", dots[::-1]) if dots else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curves(metric: str, trials: Sequence[SearchedTrial]) -> Chart:
    """Every trial's way, faint but for the best's."""
    others = [Curve(trial.name, trial.points, "raw", 0) for trial in trials[:0:-1]]
    best = [Curve(f"{trial.name}, the best", trial.points, "dots", 1) for trial in trials[:1]]
    return Chart(f"{metric} on the way", [*others, *best], "over reference samples", log=True, wide=True)


def _table(metric: str, trials: Sequence[SearchedTrial]) -> str:
    fields = _fields(trials)
    heads = "".join(f"<th>{escape(head)}</th>" for head in ("trial", metric, "run to", "state", *fields))
    rows = []
    for trial in trials:
        best = "no value" if trial.best is None else human.number(trial.best)
        cells = [trial.name, best, f"{trial.share:.0%}", trial.state, *(trial.settings.get(f, "") for f in fields)]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
