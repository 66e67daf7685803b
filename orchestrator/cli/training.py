"""The verbs about one run: run, plan, explain, replay, tune, doctor."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Address, Args, InQueue, JobArgument, Json, Overrides, Priority, RunArgument
from orchestrator.cli.requests import Watcher, finish, open_display, run_request
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from orchestrator.launching.doctor.finding import Finding
    from orchestrator.planning.plan import Plan

__all__ = ["app"]

app = typer.Typer()


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
    probe: Annotated[
        bool | None,
        typer.Option("--probe/--no-probe", help="Try micro batches first; on accelerators by default."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Leave a torch profiler trace of these steps.")
    ] = None,
    queue: InQueue = None,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Train JOB to its end; the same command again continues a run that was stopped or killed."""
    from orchestrator.launching import driver

    if profile is not None:
        override = [*(override or []), _profiled(profile)]
    request = run_request(
        job,
        arg,
        override,
        address,
        fresh=fresh,
        force=force_config,
        checkpoint=from_checkpoint,
        probe=probe,
        queue=queue,
        priority=priority,
    )
    with open_display(as_json) as display:
        summary = driver.run(request, Watcher(display))
    finish(summary, as_json)


def _profiled(steps: str) -> str:
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps):
        raise RequestError(f"--profile {steps}: write it as FIRST:LAST, steps counted from 1, as in 20:25")
    return f"telemetry.profile={steps.replace(':', ',')}"


@app.command()
def plan(
    job: JobArgument,
    arg: Args = None,
    override: Overrides = None,
    address: Address = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Plan for so many workers instead.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="On so many nodes.")] = None,
    accelerator: Annotated[
        str | None, typer.Option(metavar="NAME", help="Each with this accelerator, as in a100-40gb; or cpu.")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.001, metavar="GBIT", help="Each node with so many Gbit/s to the others.")
    ] = None,
    why: Annotated[bool, typer.Option("--explain", help="Also every formula with its numbers.")] = False,
    deepspeed_config: Annotated[
        bool, typer.Option("--deepspeed-config", help="Print the JSON that DeepSpeed gets, and nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what `run` would do, without starting anything; also for a cluster that does not exist."""
    from orchestrator.launching import planner
    from orchestrator.telemetry.planned import explain_lines, plan_lines

    imagined = planner.Imagined(workers, nodes, accelerator, network)
    planned, made, folder = planner.plan_job(run_request(job, arg, override, address), imagined)
    if deepspeed_config:
        from orchestrator.training.engine import deepspeed_config as rendered

        print(json.dumps(rendered(planned.config, made), indent=2))
    elif as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print("\n".join([*plan_lines(made), f"  {'folder':<8} {folder}"]))
        if made.costing is not None:
            _print_costs(made)
        if why:
            print("\n".join(["", *explain_lines(made)]))


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
    mode: Annotated[
        str | None,
        typer.Option(metavar="min|max", help="Which value of it is the best; by default as its name says."),
    ] = None,
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
        mode=mode,
        optuna=optuna,
        address=address,
    )
    with open_display(as_json) as display:
        tuned = tuning.tune(request, Watcher(display))
    if as_json:
        rows = [asdict(trial) for trial in tuned.trials]
        found = {"folder": str(tuned.folder), "report": str(tuned.report), "metric": metric, "set": tuned.set_line}
        print(json.dumps({**found, "trials": rows}))
        return
    for trial in tuned.trials:
        settings = "  ".join(f"{name}={value}" for name, value in trial.settings.items())
        best = "no value" if trial.best is None else f"{metric} {trial.best:.4g}"
        print(f"{best:<18} {trial.progress:5.0%}  {trial.state:<12} {settings}")
    print(f"drawn in {tuned.report}")
    print(tuned.set_line)
    if tuned.halved:
        print(
            "a rate that a search finds lies at the edge of what is stable; where the batch grows take half of it:\n"
            f"{tuned.halved}"
        )


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
    print(
        "where the loss fell fastest, well below the edge of what is stable: it needs no halving, a search goes higher"
    )
    print(line)


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


def _print_costs(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from orchestrator.telemetry.planned import alternative_rows, memory_rows

    assert plan.costing is not None
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 100)
    memory = Table(box=None, pad_edge=False)
    memory.add_column("memory")
    memory.add_column("bytes", justify="right")
    memory.add_column("for")
    for row in memory_rows(plan.costing):
        memory.add_row(*row)
    stages = Table(box=None, pad_edge=False)
    for heading in ("stage", "micro batch", "with", "memory", "step", "fits"):
        stages.add_column(heading)
    for other in alternative_rows(plan):
        stages.add_row(*other)
    for table in (memory, stages):
        console.print()
        console.print(table)


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
