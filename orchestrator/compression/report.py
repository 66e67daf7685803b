"""The compression report: every variant's size, quality and speed side by side, and the best within a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from orchestrator.compression.measuring import Latency
from orchestrator.errors import ConfigError, did_you_mean
from orchestrator.scheduling.metric_direction import direction_of
from orchestrator.telemetry import human

__all__ = ["Budget", "Entry", "best", "quality_of", "report_html", "report_lines", "report_rows"]

QUALITIES = ("accuracy", "auc", "recall_at_10")
"""Metrics that grow as a model gets better, in the order in which one is taken to compare variants by."""
FP32 = ("torch", "onnx", "executorch")
"""Ways to write a model as it is, whose sizes others are compared with."""


@dataclass(frozen=True)
class Entry:
    """One variant in one format: what it weighs, what it is worth, and how fast it is; or why it could not be made."""

    model: str
    """Which weights: the run's own, or those of a variant of it."""
    path: str
    """Format and precision, such as "onnx int8"."""
    file: str = ""
    size_bytes: int = 0
    packed_bytes: int = 0
    """After DEFLATE, as in an archive or a package: what zeros are worth."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    latency: Latency | None = None
    difference: float = math.nan
    """Largest difference of an output from the same weights' in fp32 torch."""
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: no NaN."""
        found = dataclasses.asdict(self)
        found["difference"] = None if math.isnan(self.difference) else self.difference
        return found


@dataclass(frozen=True)
class Budget:
    """What a variant may weigh, lose and take.

    Raises:
        ConfigError: a limit that nothing can meet.
    """

    max_size_bytes: float | None = None
    min_accuracy: float | None = None
    """Of the metric that variants are compared by; of one that falls as a model gets better the largest value."""
    max_latency_s: float | None = None
    """Median of a call on one sample."""

    def __post_init__(self) -> None:
        for name in ("max_size_bytes", "max_latency_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value:g}: give a number above 0")

    def admits(self, entry: Entry, quality: str) -> bool:
        """Whether ``entry`` keeps every limit."""
        if entry.latency is None:
            return False
        small = self.max_size_bytes is None or entry.size_bytes <= self.max_size_bytes
        good = self.min_accuracy is None or _keeps(entry.metrics.get(quality), self.min_accuracy, quality)
        fast = self.max_latency_s is None or entry.latency.median_s <= self.max_latency_s
        return small and good and fast


def quality_of(entries: Sequence[Entry], wanted: str | None = None) -> str:
    """The metric to compare by: as asked for, else accuracy, auc, recall_at_10, else the loss, of which less is more.

    Raises:
        ConfigError: no variant has the metric asked for.
    """
    known = {name for entry in entries for name in entry.metrics}
    if wanted is not None:
        if wanted not in known:
            raise ConfigError(f"metric={wanted!r} is none of the task's metrics; {did_you_mean(wanted, known)}")
        return wanted
    return next((name for name in QUALITIES if name in known), "loss" if "loss" in known else min(known))


def best(entries: Sequence[Entry], budget: Budget, quality: str) -> Entry | None:
    """The smallest variant within ``budget``; of two of one size the faster. None where nothing is."""
    admitted = [entry for entry in entries if budget.admits(entry, quality)]
    return min(admitted, key=lambda e: (e.size_bytes, e.latency.median_s if e.latency else math.inf), default=None)


def report_rows(entries: Sequence[Entry], quality: str) -> list[list[str]]:
    """The table, heading first. Sizes are compared with the first fp32 file that was written, where there is one."""
    whole = next((entry for entry in entries if entry.path in FP32 and not entry.problem), None)
    rows = [["model", "path", "size", "of fp32", "packed", quality, "median", "p99", "samples/s", "off by"]]
    for entry in entries:
        if entry.latency is None:
            rows.append([entry.model, entry.path, entry.problem, *[""] * 7])
            continue
        share = f"{entry.size_bytes / whole.size_bytes:.2f}" if whole else "-"
        cells = [human.size(entry.size_bytes), share, human.size(entry.packed_bytes)]
        cells += [human.number(entry.metrics.get(quality, math.nan)), _ms(entry.latency.median_s)]
        cells += [_ms(entry.latency.p99_s), f"{entry.latency.samples_per_s:,.0f}", f"{entry.difference:.1e}"]
        rows.append([entry.model, entry.path, *cells])
    return rows


def report_lines(entries: Sequence[Entry], quality: str, chosen: Entry | None, budget: Budget) -> list[str]:
    """The table as text, then the best within the budget, if there is one to keep."""
    rows = report_rows(entries, quality)
    whole = [row for row in rows if row[3]]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    widths[:2] = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = []
    for row in rows:
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells if row[3] else [*cells[:2], row[2]]).rstrip())
    if budget != Budget():
        words = f"best within the budget: {chosen.model} {chosen.path}, {chosen.file}" if chosen else ""
        lines.append(words or "nothing keeps the budget: loosen one of its limits")
    return lines


def report_html(name: str, entries: Sequence[Entry], quality: str, chosen: Entry | None, about: str) -> str:
    """One self-contained page: bars of every variant's size and latency beside its quality, and the table."""
    rows = report_rows(entries, quality)
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    table = f"<thead><tr>{head.replace('td>', 'th>')}</tr></thead>" + "".join(f"<tr>{row}</tr>" for row in body)
    best_line = f"<p>Best within the budget: <b>{escape(f'{chosen.model} {chosen.path}')}</b></p>" if chosen else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(name)}: compression</title><style>{STYLE}</style></head><body>
<h1>{escape(name)}: size, {escape(quality)} and speed</h1><p>{escape(about)}</p>{best_line}
{_picture([e for e in entries if e.latency is not None], quality)}
<div class="wide"><table>{table}</table></div></body></html>
"""


def _picture(entries: Sequence[Entry], quality: str) -> str:
    """Bars of size and of latency beside each other, one line per variant, with its quality: SVG."""
    if not entries:
        return ""
    largest = max(entry.size_bytes for entry in entries)
    slowest = max(entry.latency.median_s for entry in entries if entry.latency)
    parts = []
    for index, entry in enumerate(entries):
        assert entry.latency is not None
        y = 46 + 30 * index
        size, took = 300 * entry.size_bytes / largest, _log_share(entry.latency.median_s, slowest)
        parts.append(
            f'<text x="0" y="{y + 13}">{escape(f"{entry.model} {entry.path}")}</text>'
            f'<rect class="size" x="270" y="{y}" width="{size:.1f}" height="18"/>'
            f'<text x="{276 + size:.1f}" y="{y + 13}">{human.size(entry.size_bytes)}</text>'
            f'<rect class="time" x="660" y="{y}" width="{took:.1f}" height="18"/>'
            f'<text x="{666 + took:.1f}" y="{y + 13}">{_ms(entry.latency.median_s)}</text>'
            f'<text x="1020" y="{y + 13}">{human.number(entry.metrics.get(quality, math.nan))}</text>'
        )
    heads = '<text x="270" y="24" class="head">size</text><text x="660" y="24" class="head">median latency (log)</text>'
    heads += f'<text x="1020" y="24" class="head">{escape(quality)}</text>'
    height = 60 + 30 * len(entries)
    title = f"size, latency and {quality} of {len(entries)} variants"
    return f'<svg viewBox="0 0 1120 {height}" role="img" aria-label="{escape(title)}">{heads}{"".join(parts)}</svg>'


def _log_share(value: float, largest: float) -> float:
    """Length of a bar on a scale of four decades below the largest."""
    return max(4.0, 260 * (1 + math.log10(value / largest) / 4))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _keeps(value: float | None, limit: float, quality: str) -> bool:
    """Whether a metric is as good as ``limit``, the least where its name does not say that it should fall.

    One that is not there, or NaN, is not.
    """
    if value is None:
        return False
    falls = False
    with contextlib.suppress(ConfigError):
        falls = direction_of(quality) == "min"
    return value <= limit if falls else value >= limit


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1120px;
padding:0 1rem;color:#222;background:#fff}
svg{width:100%;height:auto;font-size:13px}.size{fill:#4269d0}.time{fill:#efb118}.head{font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}svg text{fill:#ddd}td,th{border-color:#444}}"""
