"""The verbs about a cluster that runs share: queue, and what people may change in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import Json
from orchestrator.cli.requests import to_stderr
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from orchestrator.launching.fleet import Queue

__all__ = ["app"]

app = typer.Typer(invoke_without_command=True)

RunName = Annotated[str, typer.Argument(metavar="NAME", help="A run in the queue.")]
QueueName = Annotated[str, typer.Argument(metavar="QUEUE", help="A queue.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="On a node of the cluster HOST:PORT or RAY_ADDRESS; elsewhere the head's http://HEAD:8265.",
    ),
]
WorkingDir = Annotated[
    str, typer.Option(metavar="FOLDER", help="From elsewhere: the code to send, a folder or a zip's address.")
]


@app.callback()
def queue(
    context: typer.Context, address: Address = None, working_dir: WorkingDir = ".", as_json: Json = False
) -> None:
    """Show who runs on a shared cluster, with how much, since when, until when and why; and who waits."""
    if context.invoked_subcommand is None:
        _do([], address, working_dir, as_json)


@app.command()
def pause(name: RunName, address: Address = None, working_dir: WorkingDir = ".", as_json: Json = False) -> None:
    """Let a run save and give its devices back; it waits until it is resumed."""
    _do(["pause", name], address, working_dir, as_json, name)


@app.command()
def resume(name: RunName, address: Address = None, working_dir: WorkingDir = ".", as_json: Json = False) -> None:
    """Let a paused run take part again, where its age puts it."""
    _do(["resume", name], address, working_dir, as_json, name)


@app.command()
def move(
    name: RunName,
    queue: Annotated[str | None, typer.Option(metavar="QUEUE", help="Put it into this queue.")] = None,
    priority: Annotated[
        int | None, typer.Option(min=-10, max=10, metavar="N", help="Each point doubles its weight.")
    ] = None,
    address: Address = None,
    working_dir: WorkingDir = ".",
    as_json: Json = False,
) -> None:
    """Put a run into another queue, or give it another priority."""
    if queue is None and priority is None:
        raise RequestError(f"queue move {name}: say where to, with --queue QUEUE or --priority N")
    if queue is not None:
        _check(queue)
    given = {"--queue": queue, "--priority": priority}
    more = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    _do(["move", name, *more], address, working_dir, as_json, name, queue, priority)


@app.command()
def quota(
    queue: QueueName,
    devices: Annotated[str, typer.Argument(metavar="N", help="Devices that it is sure of, or none.")],
    address: Address = None,
    working_dir: WorkingDir = ".",
    as_json: Json = False,
) -> None:
    """Make a queue sure of N devices; others may borrow them while it does not need them."""
    _check(queue)
    if devices != "none" and not devices.isdecimal():
        raise RequestError(f"queue quota {queue} {devices}: give a whole number of devices, or none")
    _do(["quota", queue, devices], address, working_dir, as_json, queue, None if devices == "none" else int(devices))


def _check(queue: str) -> None:
    from orchestrator.config import FleetConfig, parse_config

    parse_config({"queue": queue}, FleetConfig)


def _do(words: list[str], address: str | None, working_dir: str, as_json: bool, *values: Any) -> None:
    """Have the fleet do what ``words`` say, and show how everybody stands then.

    A driver must be on a node of its cluster: who is elsewhere has the cluster run this very command.
    """
    if (address or "").startswith("http") or not (address or os.environ.get("RAY_ADDRESS")):
        from orchestrator.launching.jobs import JobServer

        said = JobServer(address).ask(["queue", *words, "--json"], working_dir, to_stderr)
        _show(json.loads(said.strip().splitlines()[-1]), as_json)
        return
    from orchestrator.launching.fleet import fleet_at

    with fleet_at(address) as fleet:
        if words:
            fleet.ask(words[0], *values)
        found: Queue = fleet.ask("queue")
    _show({**asdict(found), "rows": [asdict(row) for row in found.rows]}, as_json)


def _show(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.telemetry.human import duration

    print(f"policy {found['policy']}: {found['used']} of {found['devices']} devices in use")
    if found["quotas"]:
        print("quotas: " + ", ".join(f"{name} {count}" for name, count in sorted(found["quotas"].items())))
    if found["trouble"]:
        print(f"trouble: {found['trouble']}", file=sys.stderr)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "queue", "priority", "state", "devices", "since", "ends in", "why"):
        table.add_column(heading, overflow="fold")
    for row in found["rows"]:
        table.add_row(
            escape(row["name"]),
            escape(row["queue"]),
            str(row["priority"]),
            row["state"],
            f"{row['devices']} {row['device_type']}" if row["devices"] else "-",
            duration(found["now_s"] - row["since_s"]),
            "-" if row["ends_s"] is None else duration(row["ends_s"] - found["now_s"]),
            escape("; ".join(filter(None, row["why"]))),
        )
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 140)
    console.print(table if found["rows"] else "nobody is in the queue")
