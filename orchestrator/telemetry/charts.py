"""Curves as HTML and inline SVG: axes, smoothing, thinning and drawing, from numbers to text.

The SVG is stretched to its frame and holds only lines; every label is HTML placed by percentages, so text keeps its
size on a phone as on a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

from orchestrator.telemetry import human

__all__ = [
    "Axis",
    "Chart",
    "Curve",
    "Dot",
    "Marker",
    "Point",
    "draw",
    "linear_axis",
    "log_axis",
    "scatter",
    "smooth",
    "thin",
]

Point = tuple[float, float, int]
"""Progress in reference samples, value, step."""

LIMIT = 800
"""Points kept of a curve: about one per pixel of a wide chart."""

LOG_DECADES = 1.5
"""A log scale is used where values span more decades than this."""


@dataclass(frozen=True)
class Curve:
    """A named series; ``kind`` says how it is drawn: line, raw (faint, behind), steps or dots (joined).

    The read-out names every curve but a chart's line, which it gives first.
    """

    name: str
    points: Sequence[Point]
    kind: Literal["line", "raw", "steps", "dots"] = "line"
    colour: Literal[0, 1] = 0


@dataclass(frozen=True)
class Marker:
    """Something that happened at a progress: an attempt that started, or a skipped step."""

    x: float
    label: str
    kind: Literal["attempt", "skipped"] = "attempt"


@dataclass(frozen=True)
class Chart:
    """Curves that share a value axis; ``zero`` makes it start at 0, ``log`` lets it become logarithmic."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    zero: bool = False
    log: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Dot:
    """One dot of a scatter plot, with what is said when it is pointed at."""

    x: float
    y: float
    label: str
    colour: Literal[0, 1] = 0


@dataclass(frozen=True)
class Axis:
    """Maps values between ``low`` and ``high`` to 0..1; ``ticks`` are nice numbers within."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The place of ``value``, held to the axis: 0 at ``low``, 1 at ``high``."""
        held = min(max(value, self.low), self.high)
        if self.log:
            return math.log(held / self.low) / math.log(self.high / self.low)
        return (held - self.low) / (self.high - self.low)


# -- axes --------------------------------------------------------------------------------------


def linear_axis(low: float, high: float, *, ticks: int = 4, exact: bool = False) -> Axis:
    """An axis with about ``ticks`` steps of 1, 2 or 5 times a power of ten, widened to whole steps unless ``exact``."""
    size = max(abs(low), abs(high))
    if not high - low > max(size * 1e-9, 1e-300):  # one value, or a difference that no tick could show
        room = size * 0.1 if size > 1e-300 else 1.0
        low, high = (low, low + room) if exact else (low - room, low + room)
    step = _nice_step((high - low) / ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [_clean(i * step) for i in range(first, last + 1)]
    if exact:
        slack = step * 1e-6
        return Axis(low, high, tuple(v for v in values if low - slack <= v <= high + slack))
    return Axis(values[0], values[-1], tuple(values))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis for positive values, from a 1, 2 or 5 below ``low`` to one above ``high``."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    values = [float(f"{lead}e{decade}") for decade in decades for lead in (1, 2, 5)]
    bottom = max((v for v in values if v <= low * (1 + 1e-9)), default=low)
    top = min((v for v in values if v >= high * (1 - 1e-9)), default=high)
    if top <= bottom:
        top = bottom * 10
    inside = [v for v in values if bottom <= v <= top]
    if len(inside) > 7:
        whole = [v for v in inside if f"{v:e}".startswith("1.000000e")]
        inside = whole[:: math.ceil(len(whole) / 7)]
    return Axis(bottom, top, tuple(inside), log=True)


def _nice_step(raw: float) -> float:
    base = 10.0 ** math.floor(math.log10(raw))
    return next((lead * base for lead in (1, 2, 5) if raw <= lead * base * (1 + 1e-9)), 10 * base)


def _clean(value: float) -> float:
    return float(f"{value:.12g}")


def _value_axis(chart: Chart) -> Axis:
    values = sorted(y for curve in chart.curves for _, y, _ in curve.points)
    if not values:
        return linear_axis(0, 1)
    low, high = values[0], values[-1]
    if chart.log and low > 0 and high / low > 10**LOG_DECADES:
        # One lucky batch must not stretch a log scale downwards; a spike upwards is news and stays.
        return log_axis(values[len(values) // 100], high)
    if chart.zero or 0 < low < high / 4:
        low, high = min(0.0, low), high or 1.0
    return linear_axis(low, high)


def _tick_labels(axis: Axis) -> list[str]:
    if axis.log:
        return [human.number(v, digits=2) if v < 0.001 or v >= 1e6 else f"{v:,.10g}" for v in axis.ticks]
    top = max((abs(v) for v in axis.ticks), default=0.0)
    for floor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if top >= floor:
            scale = 1e3 if unit == "k" else floor
            return ["0" if v == 0 else f"{_clean(v / scale):g}\u202f{unit}" for v in axis.ticks]
    return [human.number(v, digits=3) if 0 < top < 0.01 else f"{v:,.6g}" for v in axis.ticks]


# -- points ------------------------------------------------------------------------------------


def thin(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most ``limit`` points with the first, the last and, of each stretch between, the lowest and the highest."""
    if len(points) <= limit:
        return list(points)
    inner, buckets = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(buckets):
        stretch = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        values = [y for _, y, _ in stretch]
        extremes = sorted({values.index(min(values)), values.index(max(values))})
        kept.extend(stretch[index] for index in extremes)
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], memory: float) -> list[Point]:
    """A centred mean whose weights fall by 1/e every ``memory`` points to either side; no lag, no bias at the ends.

    The two-sided exponential kernel is the sum of one pass forwards and one backwards, less the point itself,
    counted twice; dividing by the same sum of ones normalises it.
    """
    decay = math.exp(-1.0 / memory)
    forward = _decayed([y for _, y, _ in points], decay)
    backward = _decayed([y for _, y, _ in reversed(points)], decay)[::-1]
    weights = [(1.0 - decay**n) / (1.0 - decay) for n in range(1, len(points) + 1)]
    return [
        (x, (f + b - y) / (w + v - 1.0), step)
        for (x, y, step), f, b, w, v in zip(points, forward, backward, weights, reversed(weights), strict=True)
    ]


def _decayed(values: Sequence[float], decay: float) -> list[float]:
    total, sums = 0.0, []
    for value in values:
        total = total * decay + value
        sums.append(total)
    return sums


# -- drawing -----------------------------------------------------------------------------------


def draw(chart: Chart, domain: tuple[float, float], markers: Sequence[Marker]) -> tuple[str, dict[str, Any]]:
    """One chart as a ``<figure>``, and the points its hover read-out needs; ``domain`` is first and last progress."""
    # Thinning keeps every extreme, so the axis of the thinned curves is the axis of all.
    curves = [replace(c, points=thin(c.points)) for c in chart.curves]
    across, up = linear_axis(*domain, ticks=5, exact=True), _value_axis(replace(chart, curves=curves))
    scale = " (log scale)" if up.log else ""
    html = f"""<figure class="chart{" wide" if chart.wide else ""}" tabindex="0" aria-label="{escape(chart.title)}">
<figcaption><h3>{escape(chart.title)}<small>{escape(chart.unit)}{scale}</small></h3>{_legend(curves)}
<output>{_last_values(curves)}</output></figcaption>
<div class="frame"><div class="up" aria-hidden="true">{_labels(up, "bottom")}</div>
<div class="plot">{_svg(chart.title, curves, across, up, markers)}{_flags(markers, across)}
<i class="cross" hidden></i></div>
<div class="across" aria-hidden="true">{_labels(across, "left")}</div></div></figure>"""
    return html, {"axis": [up.low, up.high, up.log], "curves": [_hover_points(c) for c in curves]}


def scatter(title: str, unit: str, dots: Sequence[Dot]) -> tuple[str, dict[str, Any]]:
    """Dots as a ``<figure>``, the axis across logarithmic where they span decades; there must be one at least."""
    assert dots, "nothing to draw"
    low, high = min(dot.x for dot in dots), max(dot.x for dot in dots)
    across = log_axis(low, high) if low > 0 and high / low > 10 else linear_axis(low, high, ticks=5)
    points = [(dot.x, dot.y, 0) for dot in dots]
    up = _value_axis(Chart(title, [Curve(title, points)], log=True))
    grid = "".join(f"M0 {_y(up, v)}H1000" for v in up.ticks)
    marks = "".join(
        f'<path class="spots c{dot.colour}" d="M{_x(across, dot.x)} {_y(up, dot.y)}h0">'
        f"<title>{escape(dot.label)}</title></path>"
        for dot in dots
    )
    html = f"""<figure class="chart" aria-label="{escape(title)}">
<figcaption><h3>{escape(title)}<small>{escape(unit)}</small></h3><output></output></figcaption>
<div class="frame"><div class="up" aria-hidden="true">{_labels(up, "bottom")}</div>
<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img"><title>{escape(title)}</title>
<path class="grid" d="{grid}"/>{marks}</svg><i class="cross" hidden></i></div>
<div class="across" aria-hidden="true">{_labels(across, "left")}</div></div></figure>"""
    return html, {"axis": [up.low, up.high, up.log], "curves": []}


def describe(curves: Sequence[Curve]) -> str:
    """A sentence per curve, for those who cannot see it: where it starts, ends and turns."""
    return " ".join(_describe(curve) for curve in curves if curve.kind != "raw" or len(curves) == 1)


def _describe(curve: Curve) -> str:
    if not curve.points:
        return f"{curve.name}: no values."
    first, last = curve.points[0], curve.points[-1]
    low, high = min(curve.points, key=lambda p: p[1]), max(curve.points, key=lambda p: p[1])
    return (
        f"{curve.name}: from {human.number(first[1])} at step {first[2]:,} to {human.number(last[1])} "
        f"at step {last[2]:,}; lowest {human.number(low[1])} at step {low[2]:,}, "
        f"highest {human.number(high[1])} at step {high[2]:,}."
    )


def _svg(title: str, curves: Sequence[Curve], across: Axis, up: Axis, markers: Sequence[Marker]) -> str:
    grid = "".join(f"M0 {_y(up, v)}H1000" for v in up.ticks)
    lines = []
    for curve in curves:
        path = _path(curve, across, up)
        lines.append(f'<path class="{curve.kind} c{curve.colour}" d="{path}"/>')
        if curve.kind == "dots" or len(curve.points) == 1:
            spots = "".join(f"M{_x(across, x)} {_y(up, y)}h0" for x, y, _ in curve.points)
            lines.append(f'<path class="spots c{curve.colour}" d="{spots}"/>')
    events = "".join(
        f'<path class="{m.kind}" d="M{_x(across, m.x)} {"0V1000" if m.kind == "attempt" else "960V1000"}"/>'
        for m in markers
    )
    return (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img"><title>{escape(title)}</title>'
        f'<desc>{escape(describe(curves))}</desc><path class="grid" d="{grid}"/>{events}{"".join(lines)}</svg>'
    )


def _path(curve: Curve, across: Axis, up: Axis) -> str:
    places = [(_x(across, x), _y(up, y)) for x, y, _ in curve.points]
    if not places:
        return ""
    head, rest = places[0], places[1:]
    if curve.kind == "steps":
        return f"M{head[0]} {head[1]}" + "".join(f"H{x}V{y}" for x, y in rest)
    return f"M{head[0]} {head[1]}" + "".join(f"L{x} {y}" for x, y in rest)


def _x(axis: Axis, value: float) -> str:
    return f"{1000 * axis.at(value):.1f}".removesuffix(".0")


def _y(axis: Axis, value: float) -> str:
    return f"{1000 * (1 - axis.at(value)):.1f}".removesuffix(".0")


def _labels(axis: Axis, side: str) -> str:
    return "".join(
        f'<span style="{side}:{100 * axis.at(v):.2f}%">{escape(text)}</span>'
        for v, text in zip(axis.ticks, _tick_labels(axis), strict=True)
    )


def _flags(markers: Sequence[Marker], across: Axis) -> str:
    return "".join(
        f'<b class="flag" style="left:{100 * across.at(m.x):.2f}%">{escape(m.label)}</b>'
        for m in markers
        if m.kind == "attempt"
    )


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    items = (f'<li class="c{c.colour} {c.kind}">{escape(c.name)}</li>' for c in curves)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _last_values(curves: Sequence[Curve]) -> str:
    shown = [c for c in curves if c.points and (c.kind != "raw" or len(curves) == 1)]
    if not shown:
        return "no values"
    step = f"step {shown[0].points[-1][2]:,}"
    return " · ".join([step, *(escape(_reading(c, len(shown) > 1)) for c in shown)])


def _reading(curve: Curve, named: bool) -> str:
    value = human.number(curve.points[-1][1])
    return f"{curve.name} {value}" if named and curve.kind != "line" else value


def _hover_points(curve: Curve) -> Mapping[str, Any]:
    return {
        "name": curve.name,
        "kind": curve.kind,
        "colour": curve.colour,
        "x": [_short(x, 9) for x, _, _ in curve.points],
        "y": [_short(y, 6) for _, y, _ in curve.points],
        "step": [step for _, _, step in curve.points],
    }


def _short(value: float, digits: int) -> float:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
