"""Grafana's dashboards as values: the fleet, a run, its scheduler, its workers. Rendered to JSON in ``cluster/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.telemetry.rules import RUNNING

__all__ = ["DASHBOARDS", "Dashboard", "Panel", "Row", "expressions", "render"]

COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RAY_DASHBOARD = "rayDefaultDashboard"
"""Uid of the one that Ray generates for its nodes."""
RUN, RANK = 'run=~"$run"', 'run=~"$run",rank=~"$rank"'


@dataclass(frozen=True)
class Panel:
    """One picture: queries with their legends, a unit of Grafana's, and what it shows in a sentence."""

    title: str
    description: str
    queries: Mapping[str, str]
    """Expression by legend."""
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "green"),)
    """Colours from a value on, rising; the first has none."""
    low: float | None = None
    high: float | None = None
    log: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """A question, and the panels that answer it."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: tuple[str, ...] = ("run",)


def _stat(title: str, text: str, query: str, unit: str = "short", **more: Any) -> Panel:
    return Panel(title, text, {"": query}, unit, "stat", more.pop("width", 4), 4, **more)


GOOD_ABOVE = ((None, "red"), (0.5, "orange"), (0.8, "green"))
BAD_ABOVE = ((None, "green"), (0.8, "orange"), (0.92, "red"))

FLEET = Dashboard(
    "orchestrator-fleet",
    "Orchestrator / Fleet",
    "All runs of the cluster: what they do, how fast, and whether they are safe.",
    (
        Row(
            "What is going on",
            (
                _stat("Runs running", "Runs that take steps.", 'sum(orchestrator_run_state{state="running"})'),
                _stat(
                    "Runs in trouble",
                    "Runs that restart or have failed.",
                    'sum(orchestrator_run_state{state=~"restarting|failed"})',
                    thresholds=((None, "green"), (1, "red")),
                ),
                _stat("Workers", "Of all runs that take steps.", f"sum(orchestrator_workers {RUNNING})"),
                _stat("Samples/s", "Of all runs together.", f"sum(orchestrator_samples_per_second {RUNNING})"),
                _stat(
                    "Goodput ratio",
                    "Mean share of the wall time that became steps that count.",
                    "avg(orchestrator_goodput_ratio)",
                    "percentunit",
                    thresholds=GOOD_ABOVE,
                ),
                _stat(
                    "Alerts",
                    "Alerts that fire.",
                    'count(ALERTS{alertname=~"Orchestrator.*",alertstate="firing"}) or vector(0)',
                    thresholds=((None, "green"), (1, "red")),
                ),
            ),
        ),
        Row(
            "How do the runs compare",
            (
                Panel(
                    "Progress",
                    "Share of each run's length.",
                    {"{{run}}": "orchestrator_run_progress_ratio"},
                    "percentunit",
                    "bargauge",
                    low=0,
                    high=1,
                ),
                Panel(
                    "Samples/s by run",
                    "Over about 10 s.",
                    {"{{run}}": f"orchestrator_samples_per_second {RUNNING}"},
                    "short",
                    low=0,
                ),
                Panel(
                    "Time left",
                    "At the present speed.",
                    {"{{run}}": f"orchestrator_eta_seconds {RUNNING}"},
                    "s",
                    low=0,
                ),
                Panel(
                    "Goodput ratio by run",
                    "Steps that count over wall time.",
                    {"{{run}}": "orchestrator_goodput_ratio"},
                    "percentunit",
                    low=0,
                    high=1,
                ),
                Panel("Loss", "Training loss of each run.", {"{{run}}": "orchestrator_loss"}, "short", log=True),
                Panel(
                    "Straggler ratio",
                    "Slowest rank over the median rank; alerts above 1.3.",
                    {"{{run}}": "orchestrator_straggler_ratio"},
                    "short",
                    thresholds=((None, "green"), (1.3, "red")),
                    low=1,
                ),
            ),
        ),
        Row(
            "Who shares the cluster",
            (
                Panel(
                    "Devices by run",
                    "Of runs in queues, and how many there are for them.",
                    {
                        "{{queue}} {{run}}": "orchestrator_fleet_devices",
                        "capacity": "orchestrator_fleet_capacity_devices",
                    },
                    low=0,
                ),
                Panel(
                    "Devices by queue",
                    "Together, whoever has them.",
                    {"{{queue}}": "sum by (queue) (orchestrator_fleet_devices)"},
                    low=0,
                    stacked=True,
                ),
                Panel(
                    "Waiting",
                    "For how long each run has waited for devices.",
                    {"{{queue}} {{run}}": "orchestrator_fleet_waiting_seconds > 0"},
                    "s",
                    low=0,
                ),
                Panel(
                    "What the devices earn",
                    "Goodput of all runs, each in devices of its smallest size, against what is used and there.",
                    {
                        "earned": "orchestrator_fleet_earned_devices",
                        "used": "orchestrator_fleet_used_devices",
                        "capacity": "orchestrator_fleet_capacity_devices",
                    },
                    low=0,
                ),
                Panel(
                    "Decisions and moves",
                    "Per hour: decisions, and runs that were given other devices.",
                    {
                        "decisions": "3600 * rate(orchestrator_fleet_decisions_total[$__rate_interval])",
                        "moves": "3600 * rate(orchestrator_fleet_moves_total[$__rate_interval])",
                    },
                    low=0,
                ),
                Panel(
                    "Cost of moves",
                    "Seconds that runs stood still to be moved, by the second.",
                    {"lost": "rate(orchestrator_fleet_move_seconds_total[$__rate_interval])"},
                    "percentunit",
                    low=0,
                ),
            ),
        ),
        Row(
            "Is it safe",
            (
                Panel(
                    "Restarts",
                    "By run and what had ended the attempt before.",
                    {"{{run}} {{cause}}": "orchestrator_restarts_total > 0"},
                    low=0,
                ),
                Panel(
                    "Age of the last checkpoint",
                    "What a crash would lose at most.",
                    {"{{run}}": "time() - orchestrator_checkpoint_timestamp_seconds"},
                    "s",
                    low=0,
                ),
                Panel(
                    "Storage errors and retries",
                    "Requests per second.",
                    {
                        "{{run}} errors": "sum by (run) (rate(orchestrator_storage_errors_total[$__rate_interval]))",
                        "{{run}} retries": "sum by (run) (rate(orchestrator_storage_retries_total[$__rate_interval]))",
                    },
                    "reqps",
                    low=0,
                ),
                Panel(
                    "Lost time by cause",
                    "Of all runs since their first attempts.",
                    {"{{cause}}": "sum by (cause) (orchestrator_lost_seconds_total)"},
                    "s",
                    low=0,
                    stacked=True,
                ),
                Panel(
                    "Hub",
                    "Processes that report, and snapshots per second.",
                    {
                        "sources": "orchestrator_hub_sources",
                        "snapshots/s": "rate(orchestrator_hub_snapshots_total[$__rate_interval])",
                        "refused/s": "rate(orchestrator_hub_refused_total[$__rate_interval])",
                    },
                    low=0,
                ),
                Panel(
                    "Hub uptime",
                    "Falls to zero when the hub restarts; runs do not notice.",
                    {"uptime": "time() - orchestrator_hub_start_timestamp_seconds"},
                    "s",
                    low=0,
                ),
            ),
        ),
    ),
    variables=(),
)

TRAINING = Dashboard(
    "orchestrator-run",
    "Orchestrator / Run",
    "One run: is it learning, how fast, where does the time go, is it safe?",
    (
        Row(
            "How does it stand",
            (
                _stat(
                    "Progress",
                    "Share of the run's length.",
                    f"orchestrator_run_progress_ratio{{{RUN}}}",
                    "percentunit",
                    low=0,
                    high=1,
                ),
                _stat("Time left", "At the present speed.", f"orchestrator_eta_seconds{{{RUN}}}", "s"),
                _stat("Loss now", "Training loss of the last step.", f"orchestrator_loss{{{RUN}}}"),
                _stat("Samples/s", "Over about 10 s.", f"orchestrator_samples_per_second{{{RUN}}}"),
                _stat(
                    "Goodput ratio",
                    "Share of the wall time since the first attempt that became steps that count.",
                    f"orchestrator_goodput_ratio{{{RUN}}}",
                    "percentunit",
                    thresholds=GOOD_ABOVE,
                ),
                _stat("Step", "Optimizer steps behind the run.", f"orchestrator_run_step{{{RUN}}}"),
                _stat(
                    "Since the last step",
                    "Alerts above five minutes.",
                    f"time() - orchestrator_last_step_timestamp_seconds{{{RUN}}}",
                    "s",
                    thresholds=((None, "green"), (60, "orange"), (300, "red")),
                    width=8,
                ),
                _stat(
                    "Age",
                    "Since the run's first attempt.",
                    f"time() - orchestrator_run_start_timestamp_seconds{{{RUN}}}",
                    "s",
                    width=8,
                ),
                _stat(
                    "Attempts",
                    "Starts of the worker group.",
                    f"orchestrator_attempts_total{{{RUN}}}",
                    thresholds=((None, "green"), (2, "orange"), (4, "red")),
                    width=8,
                ),
            ),
        ),
        Row(
            "Is it learning",
            (
                Panel("Loss", "Mean over the global batch.", {"training": f"orchestrator_loss{{{RUN}}}"}, log=True),
                Panel("Evaluation", "Held-out metrics.", {"{{metric}}": f"orchestrator_evaluation{{{RUN}}}"}),
                Panel("Gradient norm", "Before clipping.", {"norm": f"orchestrator_gradient_norm{{{RUN}}}"}, log=True),
                Panel("Learning rate", "Of the last step.", {"rate": f"orchestrator_learning_rate{{{RUN}}}"}, low=0),
                Panel(
                    "Loss scale and skipped steps",
                    "Steps are skipped where loss or gradient is not finite.",
                    {
                        "loss scale": f"orchestrator_loss_scale{{{RUN}}}",
                        "skipped": f"orchestrator_skipped_steps_total{{{RUN}}}",
                    },
                ),
                Panel(
                    "Epoch",
                    "Passes over the training set, and evaluations done.",
                    {
                        "epoch": f"orchestrator_run_epoch{{{RUN}}}",
                        "evaluations": f"orchestrator_evaluations_total{{{RUN}}}",
                    },
                    low=0,
                ),
            ),
        ),
        Row(
            "How fast",
            (
                Panel(
                    "Throughput",
                    "Samples per second, in all and per worker.",
                    {
                        "all": f"orchestrator_samples_per_second{{{RUN}}}",
                        "per worker": f"orchestrator_device_samples_per_second{{{RUN}}}",
                    },
                    low=0,
                ),
                Panel(
                    "Model FLOP/s utilization",
                    "Of a worker's device; its peak is the planner's, or telemetry.peak_flops_per_s; none of a CPU.",
                    {"utilization": f"orchestrator_mfu_ratio{{{RUN}}}"},
                    "percentunit",
                    low=0,
                ),
                Panel(
                    "Model FLOP/s",
                    "Per worker, from the FLOPs of a sample as the planner traced them, or telemetry.flops_per_sample.",
                    {"per worker": f"orchestrator_model_flops_per_second{{{RUN}}}"},
                    "si:FLOP/s",
                    low=0,
                ),
                Panel(
                    "Step time",
                    "Without evaluations and checkpoints.",
                    {
                        f"p{quantile}": (
                            f"histogram_quantile(0.{quantile}, sum by (le) "
                            f"(rate(orchestrator_step_seconds_bucket{{{RUN}}}[$__rate_interval])))"
                        )
                        for quantile in (50, 95)
                    },
                    "s",
                    low=0,
                ),
                Panel(
                    "Steps/s",
                    "Optimizer steps, those repeated after a restart included.",
                    {"steps/s": f"rate(orchestrator_steps_total{{{RUN}}}[$__rate_interval])"},
                    low=0,
                ),
                Panel(
                    "Tokens/s",
                    "Where telemetry.tokens_per_sample is given.",
                    {"tokens/s": f"rate(orchestrator_tokens_total{{{RUN}}}[$__rate_interval])"},
                    low=0,
                ),
                Panel(
                    "Samples",
                    "Seen since the hub knows the run, where the run stands, and what was taken again after restarts.",
                    {
                        "seen": f"orchestrator_samples_total{{{RUN}}}",
                        "cursor": f"orchestrator_run_samples{{{RUN}}}",
                        "repeated": f"orchestrator_repeated_samples_total{{{RUN}}}",
                    },
                    low=0,
                    width=24,
                ),
            ),
        ),
        Row(
            "Where does the time go",
            (
                Panel(
                    "Wall time by part",
                    "Of all workers together; the parts are the whole.",
                    {
                        "{{part}}": (
                            f"sum by (part) (rate(orchestrator_rank_seconds_total{{{RUN}}}[$__rate_interval])) / "
                            f"scalar(sum(rate(orchestrator_rank_seconds_total{{{RUN}}}[$__rate_interval])))"
                        )
                    },
                    "percentunit",
                    low=0,
                    high=1,
                    stacked=True,
                    width=12,
                ),
                Panel(
                    "Lost time by cause",
                    "Wall time since the first attempt that did not become steps that count.",
                    {"{{cause}}": f"orchestrator_lost_seconds_total{{{RUN}}}"},
                    "s",
                    low=0,
                    stacked=True,
                    width=12,
                ),
            ),
        ),
        Row(
            "Is it safe",
            (
                Panel(
                    "Checkpoints",
                    "Age of the last one, and how long it took.",
                    {
                        "age": f"time() - orchestrator_checkpoint_timestamp_seconds{{{RUN}}}",
                        "took": f"orchestrator_checkpoint_seconds{{{RUN}}}",
                        "training waited": f"orchestrator_checkpoint_blocked_seconds_total{{{RUN}}}",
                    },
                    "s",
                    low=0,
                ),
                Panel(
                    "Size of the last checkpoint",
                    "All files together.",
                    {"size": f"orchestrator_checkpoint_bytes{{{RUN}}}"},
                    "bytes",
                    low=0,
                ),
                Panel(
                    "Checkpoints done and failed, restarts",
                    "Since the run began.",
                    {
                        "done": f"orchestrator_checkpoints_total{{{RUN}}}",
                        "failed": f"orchestrator_checkpoint_failures_total{{{RUN}}}",
                        "restarts: {{cause}}": f"orchestrator_restarts_total{{{RUN}}} > 0",
                    },
                    low=0,
                ),
            ),
        ),
    ),
)

SCHEDULER = Dashboard(
    "orchestrator-scheduler",
    "Orchestrator / Scheduler",
    "What the policy decided for one run, on what, and whether it was right.",
    (
        Row(
            "What did it decide",
            (
                Panel(
                    "Global batch",
                    "Samples per optimizer step, and the noise scale that it follows.",
                    {
                        "batch": f"orchestrator_global_batch_samples{{{RUN}}}",
                        "noise scale": f"orchestrator_noise_scale_samples{{{RUN}}}",
                    },
                    log=True,
                    width=12,
                ),
                Panel(
                    "Layout",
                    "Workers x micro batch x accumulation.",
                    {
                        "workers": f"orchestrator_workers{{{RUN}}}",
                        "micro batch": f"orchestrator_micro_batch_samples{{{RUN}}}",
                        "accumulation": f"orchestrator_accumulation_micro_batches{{{RUN}}}",
                    },
                    low=0,
                    width=12,
                ),
                Panel(
                    "Decisions",
                    "By kind, since the run began.",
                    {"{{kind}}": f"orchestrator_decisions_total{{{RUN}}}"},
                    low=0,
                    width=12,
                ),
                Panel(
                    "Learning rate",
                    "It follows the batch.",
                    {"rate": f"orchestrator_learning_rate{{{RUN}}}"},
                    low=0,
                    width=12,
                ),
            ),
        ),
        Row(
            "Was it right",
            (
                Panel(
                    "Goodput",
                    "Reference samples per second of step time: measured, and what the last decision promised.",
                    {
                        "measured": f"orchestrator_goodput_samples_per_second{{{RUN}}}",
                        "promised": f"orchestrator_predicted_goodput_samples_per_second{{{RUN}}}",
                    },
                    low=0,
                    width=12,
                ),
                Panel(
                    "Statistical efficiency",
                    "What a sample is worth at this batch, in reference samples.",
                    {"efficiency": f"orchestrator_statistical_efficiency_ratio{{{RUN}}}"},
                    "percentunit",
                    low=0,
                    width=12,
                ),
                Panel(
                    "Noise scale",
                    "Estimate with its bounds.",
                    {
                        "high": f"orchestrator_noise_scale_high_samples{{{RUN}}}",
                        "estimate": f"orchestrator_noise_scale_samples{{{RUN}}}",
                        "low": f"orchestrator_noise_scale_low_samples{{{RUN}}}",
                    },
                    log=True,
                    width=12,
                ),
                Panel(
                    "Progress",
                    "Reference samples, and samples.",
                    {
                        "reference samples": f"orchestrator_run_progress_samples{{{RUN}}}",
                        "samples": f"orchestrator_run_samples{{{RUN}}}",
                    },
                    low=0,
                    width=12,
                ),
            ),
        ),
    ),
)

WORKER = Dashboard(
    "orchestrator-worker",
    "Orchestrator / Workers",
    "The ranks of one run: which is slow, in what, and on which machine.",
    (
        Row(
            "Which rank is slow",
            (
                Panel(
                    "Own time per step",
                    "Data wait, forward and backward: the rank that lags is above the others.",
                    {"rank {{rank}}": f"orchestrator_rank_step_seconds{{{RANK}}}"},
                    "s",
                    low=0,
                    width=12,
                ),
                Panel(
                    "Straggler ratio",
                    "Slowest rank over the median rank; alerts above 1.3.",
                    {"ratio": f"orchestrator_straggler_ratio{{{RUN}}}"},
                    thresholds=((None, "green"), (1.3, "red")),
                    low=1,
                    width=12,
                ),
            ),
        ),
        Row(
            "In what",
            tuple(
                Panel(
                    part.replace("_", " ").capitalize(),
                    "Share of each rank's wall time.",
                    {
                        "rank {{rank}}": (
                            f'sum by (rank) (rate(orchestrator_rank_seconds_total{{{RANK},part="{part}"}}'
                            "[$__rate_interval]))"
                        )
                    },
                    "percentunit",
                    low=0,
                )
                for part in ("data_wait", "forward", "backward", "communication", "optimizer", "other")
            ),
        ),
        Row(
            "On which hardware",
            (
                Panel(
                    "Memory used and held",
                    "By tensors and by the allocator; resident memory on a CPU.",
                    {
                        "rank {{rank}} used": f"orchestrator_device_memory_used_bytes{{{RANK}}}",
                        "rank {{rank}} held": f"orchestrator_device_memory_reserved_bytes{{{RANK}}}",
                        "rank {{rank}} peak": f"orchestrator_device_memory_peak_bytes{{{RANK}}}",
                    },
                    "bytes",
                    low=0,
                ),
                Panel(
                    "Memory used of the limit",
                    "Alerts above 92 %.",
                    {
                        "rank {{rank}}": (
                            f"orchestrator_device_memory_used_bytes{{{RANK}}} / "
                            f"orchestrator_device_memory_limit_bytes{{{RANK}}}"
                        )
                    },
                    "percentunit",
                    "bargauge",
                    thresholds=BAD_ABOVE,
                    low=0,
                    high=1,
                ),
                Panel(
                    "Where the ranks run",
                    "Host and device of each rank.",
                    {"{{rank}}: {{host}} {{device}}": f"orchestrator_rank_info{{{RANK}}}"},
                    low=0,
                ),
                Panel(
                    "Snapshots that the hub did not take",
                    "Training does not wait for it.",
                    {"rank {{rank}}": f"orchestrator_pushes_failed_total{{{RANK}}}"},
                    low=0,
                ),
            ),
        ),
        Row(
            "What they found out before the first step",
            (
                Panel(
                    "Matrix products",
                    "Rate of each rank's device before the attempt's first step; a rank far below the others is slow.",
                    {"rank {{rank}}": f"orchestrator_rank_matmul_flops_per_second{{{RANK}}}"},
                    "flops",
                    low=0,
                ),
                Panel(
                    "Links",
                    "Exchange with the better of two neighbours, and the all-reduce of all.",
                    {
                        "rank {{rank}} link": f"orchestrator_rank_link_bytes_per_second{{{RANK}}}",
                        "rank {{rank}} all-reduce": f"orchestrator_rank_all_reduce_bytes_per_second{{{RANK}}}",
                    },
                    "Bps",
                    low=0,
                ),
                Panel(
                    "Clocks",
                    "How far each rank's clock is ahead of the median rank's.",
                    {"rank {{rank}}": f"orchestrator_rank_clock_offset_seconds{{{RANK}}}"},
                    "s",
                ),
                Panel(
                    "Free disk",
                    "Where checkpoints go on the rank's host.",
                    {"rank {{rank}}": f"orchestrator_rank_disk_free_bytes{{{RANK}}}"},
                    "bytes",
                    low=0,
                ),
            ),
        ),
    ),
    variables=("run", "rank"),
)

DASHBOARDS: Sequence[Dashboard] = (FLEET, TRAINING, SCHEDULER, WORKER)


def expressions(dashboard: Dashboard) -> list[str]:
    """Every query of a dashboard."""
    return [query for row in dashboard.rows for panel in row.panels for query in panel.queries.values()]


def render(dashboard: Dashboard) -> str:
    """The dashboard as Grafana reads it from a file."""
    return json.dumps(_dashboard(dashboard), indent=2) + "\n"


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["orchestrator"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [_link(other) for other in DASHBOARDS if other is not dashboard] + [_ray_link()],
        "templating": {"list": [_datasource(), *map(_variable, dashboard.variables)]},
        "panels": _panels(dashboard.rows),
    }


def _panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows from top to bottom, panels from left to right; a panel that does not fit begins a new line."""
    placed: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        placed.append(
            _at({"type": "row", "title": row.title, "collapsed": False, "panels": []}, placed, 0, top, COLUMNS, 1)
        )
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            placed.append(_at(_panel(panel), placed, left, top, panel.width, panel.height))
            left, height = left + panel.width, max(height, panel.height)
        top += height
    return placed


def _at(panel: dict[str, Any], before: Sequence[Any], left: int, top: int, width: int, height: int) -> dict[str, Any]:
    return {"id": len(before) + 1, **panel, "gridPos": {"x": left, "y": top, "w": width, "h": height}}


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
            }
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps = [{"value": value, "color": colour} for value, colour in panel.thresholds]
    field: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    field |= {key: value for key, value in (("min", panel.low), ("max", panel.high)) if value is not None}
    if panel.kind != "timeseries":
        return {**field, "color": {"mode": "thresholds"}}
    return {
        **field,
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 60 if panel.stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
            "thresholdsStyle": {"mode": "line" if len(panel.thresholds) > 1 else "off"},
        },
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "timeseries":
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "bargauge":
        return {"reduceOptions": reduced, "orientation": "horizontal", "displayMode": "basic", "showUnfilled": True}
    return {"reduceOptions": reduced, "colorMode": "value", "graphMode": "area", "textMode": "auto"}


def _link(other: Dashboard) -> dict[str, Any]:
    url = f"/d/{other.uid}"
    return {"title": other.title, "type": "link", "url": url, "includeVars": True, "keepTime": True}


def _ray_link() -> dict[str, Any]:
    return {"title": "Ray", "type": "link", "url": f"/d/{RAY_DASHBOARD}", "keepTime": True, "targetBlank": True}


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _variable(name: str) -> dict[str, Any]:
    metric = {"run": "orchestrator_run_step", "rank": 'orchestrator_rank_step_seconds{run=~"$run"}'}[name]
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric}, {name})", "refId": name},
        "refresh": 2,
        "sort": 3,
        "multi": name == "rank",
        "includeAll": name == "rank",
        "current": {"text": "All", "value": "$__all"} if name == "rank" else {},
    }
