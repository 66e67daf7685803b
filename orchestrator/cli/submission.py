"""The verbs about a cluster that takes jobs: submit, jobs, status, logs, stop, wait."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import (
    Args,
    InQueue,
    JobArgument,
    JobServerAddress,
    Json,
    Overrides,
    Priority,
    SubmittedArgument,
)
from orchestrator.cli.requests import run_request, to_stderr

if TYPE_CHECKING:
    from orchestrator.launching.jobs import Attempt, Extras, JobServer
    from orchestrator.launching.preflight import RunRequest
    from orchestrator.planning.plan import Plan

__all__ = ["app"]

app = typer.Typer()


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
    driver_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs for the driver; above 0 it leaves the head.")
    ] = None,
    follow: Annotated[
        bool | None, typer.Option("--follow/--no-follow", help="Show what the run prints, and end as it ends.")
    ] = None,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="As a RayJob, where the chart says.")] = False,
    release: Annotated[
        str | None, typer.Option(help="With --kubernetes: the prefix of the chart's objects; else orchestrator.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="With --kubernetes; by default the context's.")] = None,
    context: Annotated[str | None, typer.Option(help="With --kubernetes: a context of the kubeconfig.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --kubernetes: let the server check, no more.")
    ] = False,
    queue: InQueue = None,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Send JOB to a cluster; giving the command twice is harmless, and goes on with a stopped or killed run."""
    from orchestrator.launching.jobs import Extras

    if kubernetes:
        _refuse(
            {"--address": address, "--follow": follow or None},
            "--kubernetes asks the API server and follows nothing: leave out",
        )
    else:
        only = {"--release": release, "--namespace": namespace, "--context": context, "--dry-run": dry_run or None}
        _refuse(only, "without --kubernetes there is no use for")
    extras = Extras(env=tuple(env or ()), pip=tuple(pip or ()), working_dir=working_dir, cpus=driver_cpus)
    request = run_request(job, arg, override, None, fresh=fresh, force=force_config, queue=queue, priority=priority)
    if kubernetes:
        where = (release or "orchestrator", namespace, context)
        _submit_rayjob(request, extras, where, dry_run=dry_run, as_json=as_json)
    else:
        _submit_job(request, extras, address, follow=follow is not False, as_json=as_json)


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


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Refuse the options that were given and would be passed over."""
    from orchestrator.errors import RequestError

    if given := [name for name, value in options.items() if value is not None]:
        raise RequestError(f"{why} {' and '.join(given)}")


def _server(address: str | None) -> JobServer:
    from orchestrator.launching.jobs import JobServer

    return JobServer(address)


def _submit_job(request: RunRequest, extras: Extras, address: str | None, *, follow: bool, as_json: bool) -> None:
    from orchestrator.launching.jobs import submit as submit_job

    server = _server(address)
    attempt, made = submit_job(request, extras, server, to_stderr)
    _say_plan(made)
    if attempt.ended:
        to_stderr(f"{attempt.submission_id}: finished already; --fresh starts anew")
    if follow:
        _follow(server, attempt, as_json)
    else:
        _say_status(attempt, as_json)


def _say_plan(plan: Plan | None) -> None:
    from orchestrator.telemetry.planned import plan_lines

    if plan is not None:
        to_stderr("\n".join(plan_lines(plan)))


def _submit_rayjob(
    request: RunRequest, extras: Extras, where: tuple[str, str | None, str | None], *, dry_run: bool, as_json: bool
) -> None:
    from orchestrator.launching.jobs import RUN
    from orchestrator.launching.rayjobs import Place, create

    made, new, plan = create(request, extras, Place(*where), to_stderr, dry_run=dry_run)
    _say_plan(plan)
    name, space = made["metadata"]["name"], made["metadata"]["namespace"]
    state = (made.get("status") or {}).get("jobDeploymentStatus", "")
    if as_json:
        print(json.dumps({"name": name, "namespace": space, "created": new and not dry_run, "state": state}))
        return
    if dry_run:
        print(f"RayJob {name} in namespace {space} would be accepted")
        return
    print(f"RayJob {name} in namespace {space} " + ("created" if new else f"exists already: {state or 'waiting'}"))
    print(f"  kubectl -n {space} get rayjob {name} --watch")
    if made["spec"]["submissionMode"] == "K8sJobMode":
        print(f"  kubectl -n {space} logs --follow job/{name}")
    elif (run := made["spec"].get("metadata", {}).get(RUN)) is not None:
        print(f"  orchestrator logs --follow {run}, and orchestrator queue, with the --address of the team's cluster")


def _follow(server: JobServer, attempt: Attempt, as_json: bool) -> None:
    """Show a run until it ends, and end with its code."""
    stream = sys.stderr if as_json else sys.stdout

    def say(text: str) -> None:
        print(text, end="", file=stream, flush=True)

    try:
        attempt = server.follow(attempt, say, to_stderr)
    except KeyboardInterrupt:
        to_stderr(
            f"\nthe run goes on; look again with `orchestrator logs --follow {attempt.submission_id}`, or end it with "
            f"`orchestrator stop {attempt.submission_id}`"
        )
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(attempt.to_dict()))
    elif attempt.exit_code:
        to_stderr(_status_line(attempt))
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
        command = attempt.command.removeprefix("exec ").removeprefix("python -m orchestrator ")
        table.add_row(
            attempt.submission_id, escape(attempt.run), attempt.status.lower(), duration(took), escape(command)
        )
    Console(soft_wrap=False).print(table if attempts else "nothing was submitted")
