"""The verbs about metrics: metrics, dashboards, monitor up and down."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Json

__all__ = ["app", "monitor_verbs"]

app = typer.Typer()
monitor_verbs = typer.Typer(help="Prometheus for the runs of this machine.", no_args_is_help=True)


@app.command()
def metrics(
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/metrics.md.")] = False,
    as_json: Json = False,
) -> None:
    """Show every metric that a run exports: name, type, labels, unit, who measures it, and what it means."""
    from orchestrator.telemetry.metrics import TABLE
    from orchestrator.telemetry.metrics import markdown as page

    if as_json:
        print(json.dumps([{**asdict(metric), "labels": metric.all_labels} for metric in TABLE]))
    elif markdown:
        print(page(), end="")
    else:
        print("\n".join(f"{m.name}{{{', '.join(m.all_labels)}}}  {m.kind}, {m.unit}\n    {m.help}" for m in TABLE))


@app.command()
def dashboards(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where they are written.")] = Path("cluster"),
    as_json: Json = False,
) -> None:
    """Write Grafana's dashboards, and Prometheus' configuration, recording rules and alerts."""
    from orchestrator.launching.monitor import write_cluster_files

    written = [str(path) for path in write_cluster_files(output)]
    print(json.dumps(written) if as_json else "\n".join(written))


MonitorFolder = Annotated[
    Path | None, typer.Option("--folder", metavar="FOLDER", help="Where its data are; by default a folder of yours.")
]


@monitor_verbs.command()
def up(
    folder: MonitorFolder = None,
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65_535)] = 9090,
    hub: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Also the hub of a cluster elsewhere; may be given many times."),
    ] = None,
    interval: Annotated[int, typer.Option(metavar="SECONDS", min=1, help="Between two scrapes.")] = 5,
    as_json: Json = False,
) -> None:
    """Start Prometheus with our rules, on loopback; it finds the hubs of this machine by itself."""
    from orchestrator.launching import monitor

    place = (folder or monitor.monitor_folder()).absolute()
    found = monitor.up(place, port=port, hubs=tuple(hub or ()), interval_s=interval)
    if as_json:
        print(json.dumps(vars(found)))
        return
    print(f"prometheus  {found.url}")
    print(f"alerts      {found.url}/alerts")
    print(f"grafana     add a Prometheus data source {found.url}, and import {found.folder}/grafana/*.json")
    print("stop it     orchestrator monitor down" + (f" --folder {folder}" if folder else ""))


@monitor_verbs.command()
def down(folder: MonitorFolder = None, as_json: Json = False) -> None:
    """Stop the Prometheus that `up` started; its data stay."""
    from orchestrator.launching import monitor

    stopped = monitor.down((folder or monitor.monitor_folder()).absolute())
    print(json.dumps(vars(stopped)) if as_json else f"stopped; data stay in {stopped.folder}")
