"""The verbs about a cluster that runs share: queue, and what people may change in it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import Address, Json
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from orchestrator.launching.fleet import Queue

__all__ = ["app"]

app = typer.Typer(invoke_without_command=True)

RunName = Annotated[str, typer.Argument(metavar="NAME", help="A run in the queue.")]


@app.callback()
def queue(context: typer.Context, address: Address = None, as_json: Json = False) -> None:
    """Show who runs on a shared cluster, with how much, since when, until when and why; and who waits."""
    if context.invoked_subcommand is None:
        _show(_asked(address), as_json)


@app.command()
def pause(name: RunName, address: Address = None, as_json: Json = False) -> None:
    """Let a run save and give its devices back; it waits until it is resumed."""
    _show(_asked(address, "pause", name), as_json)


@app.command()
def resume(name: RunName, address: Address = None, as_json: Json = False) -> None:
    """Let a paused run take part again, where its age puts it."""
    _show(_asked(address, "resume", name), as_json)


@app.command()
def move(
    name: RunName,
    queue: Annotated[str | None, typer.Option(metavar="QUEUE", help="Put it into this queue.")] = None,
    priority: Annotated[
        int | None, typer.Option(min=-10, max=10, metavar="N", help="Each point doubles its weight.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Put a run into another queue, or give it another priority."""
    if queue is None and priority is None:
        raise RequestError(f"queue move {name}: say where to, with --queue QUEUE or --priority N")
    if queue is not None:
        _check(queue)
    _show(_asked(address, "move", name, queue, priority), as_json)


@app.command()
def quota(
    queue: Annotated[str, typer.Argument(metavar="QUEUE", help="A queue.")],
    devices: Annotated[str, typer.Argument(metavar="N", help="Devices that it is sure of, or none.")],
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Make a queue sure of N devices; others may borrow them while it does not need them."""
    _check(queue)
    if devices != "none" and not devices.isdecimal():
        raise RequestError(f"queue quota {queue} {devices}: give a whole number of devices, or none")
    _show(_asked(address, "quota", queue, None if devices == "none" else int(devices)), as_json)


def _check(queue: str) -> None:
    from orchestrator.config import FleetConfig, parse_config

    parse_config({"queue": queue}, FleetConfig)


def _asked(address: str | None, method: str | None = None, *values: Any) -> Queue:
    """Have the fleet do something, and return how everybody stands then."""
    from orchestrator.launching.fleet import fleet_at

    with fleet_at(address) as fleet:
        if method is not None:
            fleet.ask(method, *values)
        found: Queue = fleet.ask("queue")
        return found


def _show(found: Queue, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(found), "rows": [asdict(row) for row in found.rows]}))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.telemetry.human import duration

    print(f"policy {found.policy}: {found.used} of {found.devices} devices in use")
    if found.quotas:
        print("quotas: " + ", ".join(f"{name} {count}" for name, count in sorted(found.quotas.items())))
    if found.trouble:
        print(f"trouble: {found.trouble}", file=sys.stderr)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "queue", "priority", "state", "devices", "since", "ends in", "why"):
        table.add_column(heading, overflow="fold")
    for row in found.rows:
        table.add_row(
            escape(row.name),
            escape(row.queue),
            str(row.priority),
            row.state,
            f"{row.devices} {row.device_type}" if row.devices else "-",
            duration(found.now_s - row.since_s),
            "-" if row.ends_s is None else duration(row.ends_s - found.now_s),
            escape("; ".join(filter(None, row.why))),
        )
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 140)
    console.print(table if found.rows else "nobody is in the queue")
