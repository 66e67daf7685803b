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
    from orchestrator.launching.jobs import Attempt, Extras, JobServer
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
JobServerAddress = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The head's dashboard, http://HEAD:8265; otherwise RAY_API_SERVER_ADDRESS, or this machine.",
    ),
]
SubmittedArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or the id of a submission.")]
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
    from orchestrator.launching import driver
    from orchestrator.telemetry.planned import explain_lines, plan_lines

    imagined = driver.Imagined(workers, nodes, accelerator, network)
    planned, made, folder = driver.plan_job(_request(job, arg, override, address), imagined)
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


@app.command()
def submit(
    job: JobArgument,
    arg: Args = None,
    override: Overrides = None,
    address: JobServerAddress = None,
    fresh: Annotated[bool, typer.Option(help="Start anew; an earlier run of this name is moved aside.")] = False,
    force_config: Annotated[bool, typer.Option(help="Go on although the configuration has changed.")] = False,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable for the run.")] = None,
    pip: Annotated[
        list[str] | None, typer.Option(metavar="REQUIREMENT", help="To install before, or a requirements file.")
    ] = None,
    working_dir: Annotated[str, typer.Option(metavar="FOLDER", help="The code: a folder, or a zip's address.")] = ".",
    driver_cpus: Annotated[float, typer.Option(min=0, help="CPUs for the driver; above 0 it leaves the head.")] = 0.0,
    follow: Annotated[bool, typer.Option(help="Show what the run prints, and end as it ends.")] = True,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="As a RayJob with a cluster of its own.")] = False,
    release: Annotated[
        str, typer.Option(help="With --kubernetes: the prefix of the chart's objects.")
    ] = "orchestrator",
    namespace: Annotated[str | None, typer.Option(help="With --kubernetes; by default the context's.")] = None,
    context: Annotated[str | None, typer.Option(help="With --kubernetes: a context of the kubeconfig.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --kubernetes: let the server check, no more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send JOB to a cluster; giving the command twice is harmless, and goes on with a stopped or killed run."""
    from orchestrator.launching.jobs import Extras

    extras = Extras(env=tuple(env or ()), pip=tuple(pip or ()), working_dir=working_dir, cpus=driver_cpus)
    request = _request(job, arg, override, None, fresh=fresh, force=force_config)
    if kubernetes:
        _submit_rayjob(request, extras, release, namespace, context, dry_run=dry_run, as_json=as_json)
    else:
        _submit_job(request, extras, address, follow=follow, as_json=as_json)


@app.command()
def jobs(address: JobServerAddress = None, as_json: Json = False) -> None:
    """List what was submitted to a cluster."""
    attempts = _server(address).attempts()
    if as_json:
        print(json.dumps([attempt.to_dict() for attempt in attempts]))
    else:
        _print_attempts(attempts)


@app.command()
def status(run: SubmittedArgument, address: JobServerAddress = None, as_json: Json = False) -> None:
    """Say how a submitted RUN stands."""
    _say_status(_server(address).attempt(run), as_json)


@app.command()
def logs(
    run: SubmittedArgument,
    address: JobServerAddress = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends, and end as it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a submitted RUN prints."""
    server = _server(address)
    attempt = server.attempt(run)
    if follow:
        _follow(server, attempt, as_json)
    elif as_json:
        print(json.dumps({**attempt.to_dict(), "logs": server.logs(attempt)}))
    else:
        print(server.logs(attempt), end="")


@app.command()
def stop(
    run: SubmittedArgument,
    address: JobServerAddress = None,
    wait_for_it: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has saved and ended.")] = True,
    as_json: Json = False,
) -> None:
    """Let a submitted RUN finish its step, save and end."""
    server = _server(address)
    attempt = server.attempt(run)
    if not attempt.ended:
        server.stop(attempt)
        attempt = server.wait(attempt) if wait_for_it else server.attempt(attempt.submission_id)
    _say_status(attempt, as_json)


@app.command()
def wait(
    run: SubmittedArgument,
    address: JobServerAddress = None,
    timeout_s: Annotated[float, typer.Option(min=0, help="Give up after so many seconds; 0: never.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Wait for the end of a submitted RUN, and end as it ends; 1 also when the time is up."""
    server = _server(address)
    attempt = server.wait(server.attempt(run), timeout_s or float("inf"))
    _say_status(attempt, as_json)
    raise typer.Exit(1 if attempt.exit_code is None else attempt.exit_code)


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
    from orchestrator.launching.parquet_packing import pack
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


def _server(address: str | None) -> JobServer:
    from orchestrator.launching.jobs import JobServer

    return JobServer(address)


def _submit_job(request: RunRequest, extras: Extras, address: str | None, *, follow: bool, as_json: bool) -> None:
    from orchestrator.launching.jobs import submit as submit_job

    server = _server(address)
    attempt, made = submit_job(request, extras, server, _to_stderr)
    if made is not None:
        from orchestrator.telemetry.planned import plan_lines

        _to_stderr("\n".join(plan_lines(made)))
    if attempt.ended:
        _to_stderr(f"{attempt.submission_id}: finished already; --fresh starts anew")
    if follow:
        _follow(server, attempt, as_json)
    else:
        _say_status(attempt, as_json)


def _submit_rayjob(
    request: RunRequest,
    extras: Extras,
    release: str,
    namespace: str | None,
    context: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from orchestrator.launching.rayjobs import Place, create

    made, new = create(request, extras, Place(release, namespace, context), dry_run=dry_run)
    name, space = made["metadata"]["name"], made["metadata"]["namespace"]
    state = (made.get("status") or {}).get("jobDeploymentStatus", "")
    if as_json:
        print(json.dumps({"name": name, "namespace": space, "created": new and not dry_run, "state": state}))
        return
    if dry_run:
        print(f"RayJob {name} in namespace {space} would be accepted")
        return
    print(f"RayJob {name} in namespace {space} " + ("created" if new else f"exists already: {state or 'waiting'}"))
    print(f"  kubectl -n {space} get rayjob {name} --watch\n  kubectl -n {space} logs --follow job/{name}")


def _follow(server: JobServer, attempt: Attempt, as_json: bool) -> None:
    """Show a run until it ends, and end with its code."""
    stream = sys.stderr if as_json else sys.stdout

    def say(text: str) -> None:
        print(text, end="", file=stream, flush=True)

    try:
        attempt = server.follow(attempt, say, _to_stderr)
    except KeyboardInterrupt:
        _to_stderr(
            f"\nthe run goes on; look again with `orchestrator logs --follow {attempt.submission_id}`, or end it with "
            f"`orchestrator stop {attempt.submission_id}`"
        )
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(attempt.to_dict()))
    elif attempt.exit_code:
        _to_stderr(_status_line(attempt))
    raise typer.Exit(attempt.exit_code or 0)


def _say_status(attempt: Attempt, as_json: bool) -> None:
    print(json.dumps(attempt.to_dict()) if as_json else _status_line(attempt))


def _status_line(attempt: Attempt) -> str:
    from orchestrator.telemetry.human import duration

    ended_s = attempt.ended_s or time.time()
    took = f" for {duration(ended_s - attempt.started_s)}" if attempt.started_s else ""
    remedy = {
        "STOPPED": "submit it again to go on from its checkpoint",
        "FAILED": f"`orchestrator logs {attempt.submission_id}` says why",
        "PENDING": attempt.message,
    }.get(attempt.status, "")
    return f"{attempt.submission_id}: {attempt.status.lower()}{took}" + (f"; {remedy}" if remedy else "")


def _print_attempts(attempts: Sequence[Attempt]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.telemetry.human import duration

    table = Table(box=None, pad_edge=False)
    for heading in ("submission", "run", "state", "took", "command"):
        table.add_column(heading, overflow="fold")
    for attempt in attempts:
        took = (attempt.ended_s or time.time()) - attempt.started_s if attempt.started_s else None
        command = attempt.command.removeprefix("python -m orchestrator ")
        table.add_row(
            attempt.submission_id, escape(attempt.run), attempt.status.lower(), duration(took), escape(command)
        )
    Console(soft_wrap=False).print(table if attempts else "nothing was submitted")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
