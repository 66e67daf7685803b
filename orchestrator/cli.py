"""The command line: the only reader of argv, and the only module that prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import __version__
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.launching.doctor.finding import Finding
    from orchestrator.launching.preflight import RunRequest
    from orchestrator.planning.plan import Plan
    from orchestrator.telemetry.progress import Display

__all__ = ["app", "main"]

app = typer.Typer(
    name="orchestrator",
    help="Train PyTorch models on a Ray cluster: you bring a model, data and a recipe that works.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="What to run, as module:function.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name below runs.")]
Args = Annotated[
    list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="A parameter of the job's function.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A config field, as in scale.workers=4.")
]
Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="An existing Ray cluster; otherwise RAY_ADDRESS, or one of its own."),
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout; all else goes to stderr.")]


def main() -> None:
    """Run the command line and exit: 0 done, 1 the run failed or was stopped, 2 the request is wrong."""
    try:
        app()
    except OrchestratorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    job: JobArgument,
    arg: Args = None,
    override: Overrides = None,
    address: Address = None,
    fresh: Annotated[bool, typer.Option(help="Start anew; an earlier run of this name is moved aside.")] = False,
    force_config: Annotated[bool, typer.Option(help="Go on although the configuration has changed.")] = False,
    from_checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on from this checkpoint; newer ones are set aside.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Leave a torch profiler trace of these steps.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train JOB to its end; the same command again continues a run that was stopped or killed."""
    from orchestrator.launching import driver

    if profile is not None:
        override = [*(override or []), f"telemetry.profile={profile.replace(':', ',')}"]
    request = _request(job, arg, override, address, fresh=fresh, force=force_config, checkpoint=from_checkpoint)
    with _display(as_json) as display:
        summary = driver.run(request, _Watcher(display))
    _finish(summary, as_json)


@app.command()
def plan(
    job: JobArgument,
    arg: Args = None,
    override: Overrides = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Show what `run` would do, without starting anything."""
    from orchestrator.launching import driver
    from orchestrator.telemetry.planned import plan_lines

    made, folder = driver.plan_job(_request(job, arg, override, address))
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print("\n".join([*plan_lines(made), f"  {'folder':<8} {folder}"]))


@app.command()
def explain(run: RunArgument, as_json: Json = False) -> None:
    """Tell why RUN changed its batch: what was seen, weighed, promised and measured; draws it into its report."""
    from orchestrator.storage.folder import find_run, write_text
    from orchestrator.telemetry.report import load_run, render
    from orchestrator.telemetry.story import story_lines

    folder = find_run(run)
    data = load_run(folder.root)
    if as_json:
        print(json.dumps({"name": data.config.get("name"), "decisions": list(data.decisions)}))
        return
    write_text(folder.report, render(data))
    print("\n".join([*story_lines(data), f"drawn in {folder.report}"]))


@app.command()
def replay(
    run: RunArgument,
    policy: Annotated[str, typer.Option(metavar="NAME", help="fixed, ramp or goodput.")] = "goodput",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Ask another policy about RUN, without training: its decisions, and how long the run would have taken."""
    from orchestrator.launching.replaying import replay_run
    from orchestrator.storage.folder import find_run
    from orchestrator.telemetry.story import replay_lines

    replayed, recorded_s = replay_run(find_run(run), policy, tuple(override or ()))
    if as_json:
        print(json.dumps({**asdict(replayed), "recorded_s": recorded_s}))
    else:
        print("\n".join(replay_lines(replayed, recorded_s)))


@app.command()
def doctor(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job to hold against what is here, as module:function.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where the folders of runs lie; by default as JOB says, or runs."),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Look for what would break a run here: versions, accelerators, cluster, storage, leftovers."""
    from orchestrator.job import load
    from orchestrator.launching.doctor.examination import examine
    from orchestrator.launching.doctor.finding import breaks_a_run

    findings = examine(folder=folder, address=address, config=load(job).config if job else None)
    if as_json:
        print(json.dumps([{**vars(finding)} for finding in findings], indent=2))
    else:
        _print_findings(findings)
    if breaks_a_run(findings):
        raise typer.Exit(1)


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


monitor_app = typer.Typer(help="Prometheus for the runs of this machine.", no_args_is_help=True)
app.add_typer(monitor_app, name="monitor")
MonitorFolder = Annotated[
    Path | None, typer.Option("--folder", metavar="FOLDER", help="Where its data are; by default a folder of yours.")
]


@monitor_app.command()
def up(
    folder: MonitorFolder = None,
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65_535)] = 9090,
    as_json: Json = False,
) -> None:
    """Start Prometheus with our rules, on loopback; it finds the hubs of this machine by itself."""
    from orchestrator.launching import monitor

    found = monitor.up((folder or monitor.monitor_folder()).absolute(), port=port)
    if as_json:
        print(json.dumps(vars(found)))
        return
    print(f"prometheus  {found.url}")
    print(f"alerts      {found.url}/alerts")
    print(f"grafana     add a Prometheus data source {found.url}, and import {found.folder}/grafana/*.json")
    print("stop it     orchestrator monitor down" + (f" --folder {folder}" if folder else ""))


@monitor_app.command()
def down(folder: MonitorFolder = None, as_json: Json = False) -> None:
    """Stop the Prometheus that `up` started; its data stay."""
    from orchestrator.launching import monitor

    stopped = monitor.down((folder or monitor.monitor_folder()).absolute())
    print(json.dumps(vars(stopped)) if as_json else f"stopped; data stay in {stopped.folder}")


class _Watcher:
    """Shows a run on a display."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.step: Callable[[Mapping[str, Any]], None] = display.step
        self.evaluation: Callable[[Mapping[str, Any]], None] = display.evaluation
        self.decision: Callable[[Mapping[str, Any]], None] = display.decision
        self.note: Callable[[str], None] = display.note

    def planned(self, plan: Plan, folder: Path) -> None:
        from orchestrator.telemetry.planned import plan_lines

        self.note("\n".join([*plan_lines(plan), f"  {'folder':<8} {folder}", ""]))


def _request(
    job: str,
    args: list[str] | None,
    overrides: list[str] | None,
    address: str | None,
    *,
    fresh: bool = False,
    force: bool = False,
    checkpoint: str | None = None,
) -> RunRequest:
    from orchestrator.launching.preflight import RunRequest

    return RunRequest(
        job=job,
        args=tuple(args or ()),
        overrides=tuple(overrides or ()),
        address=address,
        fresh=fresh,
        force_config=force,
        from_checkpoint=checkpoint,
    )


def _display(as_json: bool) -> Display:
    from orchestrator.telemetry.progress import Display

    stream = sys.stderr if as_json else sys.stdout
    return Display(stream, interactive=stream.isatty(), interval_s=2.0, clock=time.monotonic)


def _finish(summary: Mapping[str, Any], as_json: bool) -> None:
    from orchestrator.telemetry.progress import summary as summary_lines

    text = summary_lines(summary)
    if summary["state"] == "stopped":
        text += "\nrun the same command again to go on from the checkpoint"
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(summary))
    if summary["state"] == "stopped":
        raise typer.Exit(1)


def _print_findings(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.launching.doctor.finding import rows

    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "what was found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check, status, detail, remedy in rows(findings):
        table.add_row(check, marks[status], escape(detail), escape(remedy))
    Console(soft_wrap=False).print(table)
