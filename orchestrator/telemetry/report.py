"""A run's report: everything its folder tells, as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import RunFolderError, explain_oserror
from orchestrator.telemetry import human, records
from orchestrator.telemetry.accounting import account, time_by_part
from orchestrator.telemetry.charts import Chart, Curve, Marker, Point, draw, smooth
from orchestrator.telemetry.page import page
from orchestrator.telemetry.story import decisions_told

__all__ = ["RunData", "load_run", "render"]

EVALUATIONS_SHOWN = 200
FAILURES_SHOWN = 100
MESSAGE_SHOWN = 200
"""Characters of what a worker said last."""
METRIC_TILES = 4
TIMES = "\N{MULTIPLICATION SIGN}"
LAYOUT = (("workers", "workers"), ("micro_batch", "micro batch"), ("accumulation", "accumulated"))


@dataclass(frozen=True)
class RunData:
    """What a run's folder holds; parts that are not there yet are empty."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """``config.json``: the dumped RunConfig."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """``plan.json``: what was decided before the run."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """``metrics.jsonl``: one record per optimizer step."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """``evaluations.jsonl``: one record per evaluation."""
    attempts: Sequence[Mapping[str, Any]] = ()
    """``attempts.jsonl``: when and why workers started and ended."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """``summary.json``: how the run ended; empty while it goes."""
    decisions: Sequence[Mapping[str, Any]] = ()
    """``decisions.jsonl``: what the policy decided, why, and what came of it."""
    failures: Sequence[Mapping[str, Any]] = ()
    """``failures.jsonl``: what ended attempts before their time, and what was done about it."""


def load_run(folder: Path) -> RunData:
    """Read a run's folder. Raises ``RunFolderError`` naming the file that is corrupt or cannot be read."""
    return RunData(
        config=_load_json(folder / "config.json"),
        plan=_load_json(folder / "plan.json"),
        metrics=records.read(folder / "metrics.jsonl"),
        evaluations=records.read(folder / "evaluations.jsonl"),
        decisions=records.read(folder / "decisions.jsonl"),
        attempts=records.read(folder / "attempts.jsonl"),
        failures=records.read(folder / "failures.jsonl"),
        summary=_load_json(folder / "summary.json"),
    )


def render(run: RunData) -> str:
    """The report as HTML: no outside requests, every text of the user escaped; times are UTC."""
    charts, points = _charts(run)
    name = _name(run)
    sections = [
        _header(run, name),
        f'<section aria-label="Curves"><h2>Curves</h2>{charts}</section>',
        _plan_section(run.plan),
        _decisions_section(run),
        _time_section(run),
        _attempts_section(run),
        _failures_section(run.failures),
        _details_section(run),
    ]
    return page(f"{name} · run report", f"<main>{''.join(sections)}</main>", points)


def _load_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunFolderError(f"cannot read {explain_oserror(path, error)}") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} holds no JSON object; restore it from a copy")
    return value


def _name(run: RunData) -> str:
    return str(run.summary.get("name") or run.config.get("name") or "unnamed run")


# -- header ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One number at the top, as plain text."""

    label: str
    value: str
    note: str = ""


def _header(run: RunData, name: str) -> str:
    share = _share_done(run)
    bar = ""
    if share is not None:
        bar = (
            f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.2f}%"></i></div>'
        )
    state, tone = _state(run)
    tiles = list(_tiles(run))
    # As many columns as leave the fewest places empty in the last row.
    columns = min((5, 4, 6), key=lambda n: -len(tiles) % n)
    grid = f'<dl class="tiles" style="--columns:{columns}">{"".join(map(_tile, tiles))}</dl>' if tiles else ""
    badge = f'<span class="state {tone}">{escape(state)}</span>'
    return f'<header><h1>{escape(name)}{badge}</h1><p class="sub">{escape(_subtitle(run))}</p>{bar}{grid}</header>'


def _subtitle(run: RunData) -> str:
    parts = []
    times = [r["time"] for r in (*run.attempts[:1], *run.metrics[:1]) if r.get("time")]
    if times:
        parts.append(f"started {_clock(min(times))}")
    if folder := run.summary.get("folder"):
        parts.append(str(folder))
    if (restarts := len({a.get("attempt") for a in run.attempts}) - 1) > 0:
        parts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    if reason := run.summary.get("reason"):
        parts.append(str(reason))
    return " · ".join(parts) or "not started yet"


def _tiles(run: RunData) -> Iterable[Tile]:
    last = run.metrics[-1] if run.metrics else {}
    evaluation = run.evaluations[-1] if run.evaluations else {}
    metrics = run.summary.get("metrics") or evaluation.get("metrics") or {}
    for key, value in list(metrics.items())[:METRIC_TILES]:
        yield Tile(f"{_words(key).capitalize()}, held-out", human.number(_finite(value)), _range(run, key))
    if last:
        yield Tile("Training loss", human.number(_final_loss(run)), "over the last steps")
        yield Tile("Speed", human.rate(_speed(run), "samples").removesuffix(" samples/s"), "samples per second")
        yield Tile("Steps", human.count(last["step"]), f"{human.count(last['samples'])} samples")
    if (wall := _wall_s(run)) is not None:
        yield Tile("Wall time", human.duration(wall), _share_note(run))
    if last.get("workers"):
        yield Tile("Workers", human.count(last["workers"]), str(run.plan.get("device") or ""))
        parts = (f"{human.count(last.get(key) or 0)} {unit}" for key, unit in LAYOUT)
        yield Tile("Global batch", human.count(last["global_batch"]), f" {TIMES} ".join(parts))


def _tile(tile: Tile) -> str:
    note = f"<small>{escape(tile.note)}</small>" if tile.note else ""
    return f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}{note}</dd></div>"


def _state(run: RunData) -> tuple[str, Literal["good", "bad", "busy"]]:
    if state := run.summary.get("state"):
        words = str(state)
        return words, "bad" if words == "failed" else "good" if words in ("finished", "done") else "busy"
    if run.attempts and run.attempts[-1].get("event") == "ended":
        return "stopped", "busy"
    return ("running", "busy") if run.attempts or run.metrics else ("not started", "busy")


def _range(run: RunData, key: str) -> str:
    values = [(v, e["step"]) for e in run.evaluations if (v := _finite(e.get("metrics", {}).get(key))) is not None]
    if len(values) < 2:
        return ""
    low, high = min(values)[0], max(values)[0]
    return f"range {human.number(low)} to {human.number(high)}"


def _final_loss(run: RunData) -> float | None:
    if (loss := _finite(run.summary.get("loss"))) is not None:
        return loss
    points = _points(run.metrics[-1000:], "loss")
    return smooth(points, _memory(len(run.metrics)))[-1][1] if points else None


def _speed(run: RunData) -> float | None:
    if (speed := _finite(run.summary.get("samples_per_s"))) is not None:
        return speed
    values = sorted(y for _, y, _ in _points(run.metrics[-1000:], "samples_per_s"))
    return values[len(values) // 2] if values else None


def _wall_s(run: RunData) -> float | None:
    if (wall := _finite(run.summary.get("wall_s"))) is not None:
        return wall
    times = [r["time"] for r in (*run.attempts, *run.metrics[:1], *run.metrics[-1:]) if r.get("time")]
    return max(times) - min(times) if len(times) > 1 else None


def _share_done(run: RunData) -> float | None:
    last = run.metrics[-1] if run.metrics else {}
    return min(1.0, last["progress"] / last["length"]) if last.get("length") else None


def _share_note(run: RunData) -> str:
    share = _share_done(run)
    return (
        "" if share is None else "the run's whole length" if share == 1 else f"{100 * share:.1f} % of the run's length"
    )


# -- curves ------------------------------------------------------------------------------------


def _charts(run: RunData) -> tuple[str, dict[str, Any]]:
    xs = [r["progress"] for r in (*run.metrics[-1:], *run.evaluations[-1:])]
    if not xs:
        return '<p class="empty">No steps yet: the curves appear with the first one.</p>', {
            "domain": [0, 1],
            "charts": [],
        }
    domain = (0.0, max(xs) or 1.0)
    events = _markers(run)
    figures, points = [], []
    for chart in _chart_list(run):
        shown = events if chart.title == "Loss" else [m for m in events if m.kind == "attempt"]
        html, hover = draw(chart, domain, shown)
        figures.append(html)
        points.append(hover)
    note = (
        '<p class="note">Across: progress in reference samples. Dashed: a new attempt. '
        "Red ticks below the loss: skipped steps. Hover, or focus a chart and use the arrow keys, to read values.</p>"
    )
    return f'<div class="charts">{"".join(figures)}</div>{note}', {"domain": list(domain), "charts": points}


def _chart_list(run: RunData) -> list[Chart]:
    names = dict.fromkeys(key for e in run.evaluations for key in e.get("metrics", {}))
    held_out = {name: _evaluation_points(run, name) for name in names}
    loss = _smoothed("training", _points(run.metrics, "loss"))
    if "loss" in held_out:
        loss.append(Curve("held-out", held_out.pop("loss"), "dots", colour=1))
    speed = _smoothed("smoothed", _points(run.metrics, "samples_per_s"))
    norm = _points(run.metrics, "grad_norm")
    charts = [
        Chart("Loss", loss, log=True, wide=True),
        *(
            Chart(_words(name).capitalize(), [Curve(name, values, "dots")], "held-out")
            for name, values in held_out.items()
        ),
        Chart("Speed", speed, "samples/s", zero=True),
        Chart("Global batch", [Curve("batch", _points(run.metrics, "global_batch"), "steps")], "samples", zero=True),
        Chart("Learning rate", [Curve("learning rate", _points(run.metrics, "learning_rate"))], zero=True),
    ]
    if norm:
        charts.append(Chart("Gradient norm", _smoothed("smoothed", norm), log=True))
    return [*charts, *_scheduling_charts(run)]


def _scheduling_charts(run: RunData) -> list[Chart]:
    """The noise scale with its bounds, and the goodput with what decisions promised of it."""
    noise = _points(run.metrics, "noise_scale_low")
    charts = []
    if noise:
        bounds = [Curve("low", noise, "raw"), Curve("high", _points(run.metrics, "noise_scale_high"), "raw", colour=1)]
        estimate = Curve("estimate", _points(run.metrics, "noise_scale"))
        charts.append(Chart("Noise scale", [*(b for b in bounds if b.points), estimate], "samples", log=True))
    promised = [
        (r["progress"], r["then"]["goodput"], r["step"])
        for r in run.decisions
        if r.get("event") == "decided" and r.get("then")
    ]
    if promised:
        measured = _smoothed("measured", _goodput(run.metrics))
        charts.append(
            Chart(
                "Goodput", [*measured, Curve("promised", promised, "dots", colour=1)], "reference samples/s", zero=True
            )
        )
    return charts


def _goodput(metrics: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Reference samples per second of each step."""
    return [
        (now["progress"], (now["progress"] - before["progress"]) / now["step_time_s"], now["step"])
        for before, now in pairwise(metrics)
        if now["step_time_s"] > 0 and now["progress"] > before["progress"]
    ]


def _smoothed(name: str, points: list[Point]) -> list[Curve]:
    if len(points) < 20:
        return [Curve(name, points)]
    return [Curve("raw", points, "raw"), Curve(name, smooth(points, _memory(len(points))))]


def _memory(num_points: int) -> float:
    """Points over which a curve is smoothed: about a hundredth of it to either side."""
    return max(3.0, num_points / 100)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    # A run has 100,000 steps and more: what most records hold, a finite float, is taken without a call.
    return [
        (r["progress"], y, r["step"])
        for r in rows
        if (y := r.get(key)) is not None and ((type(y) is float and -math.inf < y < math.inf) or _finite(y) is not None)
    ]


def _evaluation_points(run: RunData, name: str) -> list[Point]:
    values = ((e, _finite(e.get("metrics", {}).get(name))) for e in run.evaluations)
    return [(e["progress"], y, e["step"]) for e, y in values if y is not None]


def _markers(run: RunData) -> list[Marker]:
    progress = {r["step"]: r["progress"] for r in run.metrics} if run.attempts else {}
    starts = [a for a in run.attempts if a.get("event") == "started" and a.get("step") in progress]
    markers = [Marker(progress[a["step"]], f"attempt {a.get('attempt')}") for a in starts if a["step"] > 0]
    skipped = [Marker(r["progress"], "skipped step", "skipped") for r in run.metrics if r.get("skipped")]
    # A run that skips thousands of steps needs no thousand ticks to show it.
    return [*markers, *skipped[:: 1 + len(skipped) // 500]]


# -- sections below the curves -----------------------------------------------------------------


def _plan_section(plan: Mapping[str, Any]) -> str:
    if not plan:
        return ""
    rows = []
    for key, value in plan.items():
        whole = _is_nested(value) or len(str(value)) > 60
        shown = _tree(value) if _is_nested(value) else escape(_value(key, value))
        rows.append(f"<div{' class=whole' if whole else ''}><dt>{escape(_words(key))}</dt><dd>{shown}</dd></div>")
    return f'<section><h2>Plan</h2><dl class="facts">{"".join(rows)}</dl></section>'


def _decisions_section(run: RunData) -> str:
    told = decisions_told(run.decisions)
    if not told:
        return ""
    head = ["Step", "Decision", "Batch", "Promised", "Measured", "Why"]
    rows = [[step, kind, batch, promised, measured, why] for step, kind, batch, why, promised, measured in told]
    return f"<section><h2>Decisions</h2>{_table(head, rows)}</section>"


def _time_section(run: RunData) -> str:
    """Where the time between steps went, and what of the wall time was no use."""
    parts = time_by_part(run.metrics)
    found = account(run.attempts, run.metrics)
    wall_s = found.useful_s + sum(found.lost_s.values())
    tables = []
    if total := sum(parts.values()):
        rows = [[_words(part), human.duration(s), _percent(s / total)] for part, s in parts.items()]
        tables.append(_table(["Between steps, on rank 0", "Time", "Share"], rows))
    if wall_s > 0:
        lost = sorted(found.lost_s.items(), key=lambda item: -item[1])
        times = [
            ("steps that count", found.useful_s),
            *((f"lost: {_words(cause)}", seconds) for cause, seconds in lost),
        ]
        rows = [[name, human.duration(seconds), _percent(seconds / wall_s)] for name, seconds in times]
        tables.append(_table(["Wall time since the first attempt", "Time", "Share"], rows))
    return f"<section><h2>Where the time went</h2>{''.join(tables)}</section>" if tables else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _attempts_section(run: RunData) -> str:
    if not run.attempts:
        return ""
    head = ["Attempt", "Started", "Took", "Steps", "Workers", "Ended"]
    rows = [_attempt_row(run, attempt) for attempt in dict.fromkeys(a.get("attempt") for a in run.attempts)]
    return f"<section><h2>Attempts</h2>{_table(head, rows)}</section>"


def _attempt_row(run: RunData, attempt: Any) -> list[object]:
    own = [a for a in run.attempts if a.get("attempt") == attempt]
    start: Mapping[str, Any] = next((a for a in own if a.get("event") == "started"), {})
    end: Mapping[str, Any] = next((a for a in reversed(own) if a.get("event") == "ended"), {})
    begun, over = start.get("time"), end.get("time")
    took = human.duration(over - begun) if begun and over else ""
    steps = f"{_value('step', start.get('step', '?'))} to {_value('step', end.get('step', '…'))}"
    workers = start.get("workers", end.get("workers", ""))
    reason = end.get("reason") or ("" if end else _without_end(run, attempt))
    if repeated := start.get("repeated_samples"):
        steps += f", {human.count(repeated)} samples taken again"
    return [attempt, _clock(begun) if begun else "", took, steps, workers, reason]


def _without_end(run: RunData, attempt: Any) -> str:
    # A killed worker writes nothing: the attempt after it tells what ended this one.
    later = [a for a in run.attempts if a.get("event") == "started" and (a.get("attempt") or 0) > (attempt or 0)]
    if not later:
        return "running, or lost"
    cause = str(later[0].get("cause") or "worker_lost")
    return "lost: its workers ended without a word" if cause == "worker_lost" else f"lost: {_words(cause)}"


def _failures_section(failures: Sequence[Mapping[str, Any]]) -> str:
    if not failures:
        return ""
    latest = failures[-FAILURES_SHOWN:]
    head = ["When", "Cause", "Node", "Message", "Newest checkpoint", "What was done"]
    rows = [_failure_row(failure) for failure in latest]
    shown = "" if len(latest) == len(failures) else f" (last {len(latest)} of {len(failures):,})"
    return f"<section><h2>Failures{shown}</h2>{_table(head, rows)}</section>"


def _failure_row(failure: Mapping[str, Any]) -> list[object]:
    by = "" if failure.get("rank") is None else f"rank {failure['rank']}: "
    message = by + " ".join(str(failure.get("message") or "").split())
    message = message if len(message) <= MESSAGE_SHOWN else f"{message[: MESSAGE_SHOWN - 1]}…"
    saved = f"step {human.count(step)}" if (step := failure.get("step")) else "none yet"
    done = f"{failure.get('action')}: {failure.get('reason')}"
    when = _clock(failure["time"]) if failure.get("time") else ""
    return [when, _words(failure.get("cause") or "unknown"), failure.get("node") or "", message, saved, done]


def _details_section(run: RunData) -> str:
    parts = []
    if run.evaluations:
        parts.append(_evaluations_table(run))
    if run.config:
        parts.append(f"<details><summary>Config</summary>{_tree(run.config)}</details>")
    return f"<section><h2>Details</h2>{''.join(parts)}</section>" if parts else ""


def _evaluations_table(run: RunData) -> str:
    names = list(dict.fromkeys(key for e in run.evaluations for key in e.get("metrics", {})))
    latest, total = run.evaluations[-EVALUATIONS_SHOWN:], len(run.evaluations)
    rows = []
    for e in latest:
        values = (human.number(_finite(e.get("metrics", {}).get(name))) for name in names)
        rows.append([human.count(e["step"]), human.number(_finite(e.get("epoch"))), *values])
    shown = f"{total:,}" if total == len(latest) else f"last {len(latest)} of {total:,}"
    table = _table(["Step", "Epoch", *names], rows)
    return f"<details><summary>Evaluations ({shown})</summary>{table}</details>"


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _tree(value: Any) -> str:
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    items = []
    for key, item in pairs:
        label = "" if key is None else f"<b>{escape(str(key))}</b> "
        items.append(f"<li>{label}{_tree(item) if _is_nested(item) else escape(_value(str(key), item))}</li>")
    return f'<ul class="tree">{"".join(items)}</ul>'


def _is_nested(value: Any) -> bool:
    if not isinstance(value, Mapping | list):
        return False
    items = list(value.values() if isinstance(value, Mapping) else value)
    deep = any(isinstance(item, dict | list) for item in items)
    return deep or (len(items) > 1 and len(str(value)) > 60)


def _value(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(k)} {_value(k, item)}" for k, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_value(key, item) for item in value) or "none"
    if isinstance(value, int | float):
        if key.endswith("_bytes"):
            return human.size(value)
        if key.endswith("_s") and not key.endswith("_per_s"):
            return human.duration(value)
        return human.count(value) if isinstance(value, int) else human.number(value, digits=6)
    return str(value)


def _words(key: str) -> str:
    words = str(key).replace("_", " ").strip()
    return words.removesuffix(" s").removesuffix(" bytes") if words not in ("s", "bytes") else words


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _finite(value: Any) -> float | None:
    if isinstance(value, float | int) and value is not True and value is not False and math.isfinite(value):
        return value
    return None
