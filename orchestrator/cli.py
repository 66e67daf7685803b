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
def tune(
    job: JobArgument,
    search: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=RANGE", help="As in optimizer.learning_rate=loguniform(1e-4,1e-1)."),
    ] = None,
    range_test: Annotated[
        bool, typer.Option(help="Only let the learning rate rise in one short run, and suggest one.")
    ] = False,
    trials: Annotated[int, typer.Option(metavar="N", help="Settings to try.")] = 12,
    metric: Annotated[str, typer.Option(metavar="NAME", help="What to compare by.")] = "loss",
    optuna: Annotated[bool, typer.Option(help="Choose settings by what earlier trials found.")] = False,
    arg: Args = None,
    override: Overrides = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Search JOB's config for settings that work best, many runs at a time, and print them as a ready --set line."""
    if range_test:
        _range_test(job, tuple(arg or ()), tuple(override or ()), as_json)
        return
    from orchestrator.launching import tuning

    request = tuning.TuneRequest(
        job=job,
        search=tuple(search or ()),
        args=tuple(arg or ()),
        overrides=tuple(override or ()),
        trials=trials,
        metric=metric,
        optuna=optuna,
        address=address,
    )
    with _display(as_json) as display:
        tuned = tuning.tune(request, _Watcher(display))
    if as_json:
        rows = [asdict(trial) for trial in tuned.trials]
        print(json.dumps({"folder": str(tuned.folder), "metric": metric, "set": tuned.set_line, "trials": rows}))
        return
    for trial in tuned.trials:
        settings = "  ".join(f"{name}={value}" for name, value in trial.settings.items())
        best = "no value" if trial.best is None else f"{metric} {trial.best:.4g}"
        print(f"{best:<18} {trial.progress:5.0%}  {trial.state:<12} {settings}")
    print(tuned.set_line)


def _range_test(job: str, args: tuple[str, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    from orchestrator.job import load
    from orchestrator.launching.preflight import prepare
    from orchestrator.training.rate_range import range_test

    loaded = load(job, args, overrides)
    prepare(loaded)
    found = range_test(loaded.task, loaded.config, low=1e-6, high=10.0, steps=160)
    line = f"--set recipe.optimizer.learning_rate={found.suggested:.2g}"
    if as_json:
        print(json.dumps({**asdict(found), "set": line}))
        return
    for rate, loss in list(zip(found.rates, found.losses, strict=True))[::8]:
        length = round(50 * loss / max(found.losses))
        print(f"{rate:9.2g}  {loss:8.4g}  {'#' * length}")
    print(line)


@app.command()
def compress(
    run: RunArgument,
    to: Annotated[
        list[str] | None, typer.Option(metavar="WAY", help="A way to write it, as in onnx-int8; all.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Also train a variant without this share of its weights.")
    ] = None,
    pattern: Annotated[str, typer.Option(metavar="NAME", help="What goes: global, 2:4 or channels.")] = "global",
    int8_aware: Annotated[bool, typer.Option(help="Also train a variant that knows of int8.")] = False,
    student: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Also distil into the job's model with this argument."),
    ] = None,
    epochs: Annotated[float, typer.Option(metavar="N", help="Length of those trainings; 0: the recipe's.")] = 0.0,
    calibrate: Annotated[int, typer.Option(metavar="N", help="Training samples that int8 finds its ranges on.")] = 256,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare by this metric; as a rule accuracy.")
    ] = None,
    max_size: Annotated[float | None, typer.Option(metavar="BYTES", help="Largest file.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(metavar="VALUE", help="Smallest value of the metric.")] = None,
    max_latency: Annotated[float | None, typer.Option(metavar="S", help="Longest median call on one sample.")] = None,
    as_json: Json = False,
) -> None:
    """Make RUN's model smaller in every way asked for, measure each, and show the best within a budget."""
    from orchestrator.compression.report import Budget, report_lines
    from orchestrator.launching import compressing

    budget = Budget(max_size_bytes=max_size, min_accuracy=min_accuracy, max_latency_s=max_latency)
    request = compressing.CompressRequest(
        run=run,
        paths=tuple(to or ()),
        prune=prune,
        pattern=pattern,
        int8_aware=int8_aware,
        student=tuple(student or ()),
        epochs=epochs,
        calibrate=calibrate,
        metric=metric,
        budget=budget,
    )
    with _display(as_json) as display:
        done = compressing.compress(request, _Watcher(display))
    if as_json:
        chosen = done.chosen and done.chosen.to_dict()
        rows = [entry.to_dict() for entry in done.entries]
        print(json.dumps({"folder": str(done.folder), "quality": done.quality, "best": chosen, "entries": rows}))
    else:
        lines = report_lines(done.entries, done.quality, done.chosen, budget)
        print("\n".join([*lines, f"drawn in {done.folder / 'report.html'}"]))
    if budget != Budget() and done.chosen is None:
        raise typer.Exit(1)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[list[str] | None, typer.Option(metavar="WAY", help="As in torch, onnx, executorch-int8.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where to; by default RUN/exported.")] = None,
    calibrate: Annotated[int, typer.Option(metavar="N", help="Training samples that int8 finds its ranges on.")] = 256,
    as_json: Json = False,
) -> None:
    """Write RUN's model as files that run without this project, and compare each with torch on real inputs."""
    from orchestrator.launching import compressing

    ways = to or ["torch", "onnx"]
    entries = compressing.export(run, ways, Path(out) if out else None, calibrate=calibrate)
    if as_json:
        print(json.dumps([entry.to_dict() for entry in entries]))
        return
    for entry in entries:
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in entry.metrics.items())
        print(f"{entry.file}  {entry.size_bytes:,} bytes  off by {entry.difference:.1e}  {metrics}")


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

        self._display.restart()
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
