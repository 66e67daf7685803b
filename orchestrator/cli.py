"""The command line: the only reader of argv, and the only module that prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import __version__
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.config import StorageConfig
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

data_app = typer.Typer(help="Look at training data, and pack it into Parquet.", no_args_is_help=True)
app.add_typer(data_app, name="data")

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
Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="A store compatible with S3; otherwise AWS_ENDPOINT_URL, or AWS."),
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
    as_json: Json = False,
) -> None:
    """Train JOB to its end; the same command again continues a run that was stopped or killed."""
    from orchestrator.launching import driver

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


@data_app.command("check")
def data_check(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A Parquet file, or a folder or s3://... of them.")],
    quick: Annotated[bool, typer.Option("--quick", help="Read the footers alone, not every row group.")] = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Say what the Parquet at URI holds, how a run would read it, and which row groups cannot be read."""
    from orchestrator.telemetry.inspected import inspection_lines
    from orchestrator.training.inspection import inspect

    with _counter("checked", "row groups") as progress:
        found = inspect(uri, _storage(endpoint_url), verify=not quick, progress=progress)
    print(json.dumps(asdict(found)) if as_json else "\n".join(inspection_lines(asdict(found))))
    if found.problems:
        raise typer.Exit(2)


@data_app.command("pack")
def data_pack(
    source: Annotated[str, typer.Argument(help="A file or folder: arrays, images in folders by class, text, CSV.")],
    destination: Annotated[str, typer.Argument(help="A folder or s3://BUCKET/PREFIX for the Parquet files.")],
    kind: Annotated[
        str | None, typer.Option("--as", metavar="KIND", help="arrays, images, text or csv; otherwise by the names.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Text: rows of so many bytes; otherwise a row for each line.")
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="Mix all samples once.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle.")] = 0,
    row_group_mib: Annotated[float, typer.Option(min=0.001, help="Size of a row group, uncompressed.")] = 8.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove first what was packed there before.")] = False,
    address: Address = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Pack SOURCE into Parquet at DESTINATION, on a Ray cluster; nobody reads it before it is whole."""
    from orchestrator.launching.packing import pack
    from orchestrator.launching.sources import PackRequest, kind_named
    from orchestrator.telemetry.inspected import inspection_lines
    from orchestrator.training.inspection import inspect

    request = PackRequest(
        source,
        destination,
        kind=kind_named(kind),
        length=length,
        shuffle=shuffle,
        seed=seed,
        row_group_bytes=int(row_group_mib * 2**20),
        overwrite=overwrite,
    )
    storage = _storage(endpoint_url)
    with _counter("written", "files") as progress:
        classes = pack(request, storage, address=address, progress=progress)
    found = {**asdict(inspect(destination, storage, verify=False)), "classes": classes}
    print(json.dumps(found) if as_json else "\n".join(inspection_lines(found)))


def _storage(endpoint_url: str | None) -> StorageConfig:
    """How S3 is reached by a command that somebody waits for: it gives up sooner than a run."""
    from orchestrator.config import StorageConfig, parse_config

    return parse_config({"endpoint_url": endpoint_url, "retry_budget_s": 20.0}, StorageConfig)


@contextmanager
def _counter(done: str, of: str) -> Iterator[Callable[..., None]]:
    """Shows on stderr how far a command has come: over and over in a terminal, else a line now and then."""
    from orchestrator.telemetry.inspected import counted

    shown_at, shown = time.monotonic(), ""
    in_place = sys.stderr.isatty()

    def show(count: int, total: int | None, size_bytes: int | None = None) -> None:
        nonlocal shown_at, shown
        text = counted(done, of, count, total, size_bytes)
        if text != shown and (in_place or time.monotonic() - shown_at >= 2.0):
            shown_at, shown = time.monotonic(), text
            print(f"\r\x1b[2K{text}" if in_place else text, end="" if in_place else "\n", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if in_place and shown:
            print(file=sys.stderr)


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
