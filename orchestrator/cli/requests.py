"""What the verbs about runs have in common: from words to a request, and from a run to what is shown of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.launching.preflight import RunRequest
    from orchestrator.planning.plan import Plan
    from orchestrator.telemetry.progress import Display

__all__ = ["Watcher", "finish", "open_display", "run_request", "to_stderr"]


class Watcher:
    """Shows a run on a display."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.step: Callable[[Mapping[str, Any]], None] = display.step
        self.evaluation: Callable[[Mapping[str, Any]], None] = display.evaluation
        self.decision: Callable[[Mapping[str, Any]], None] = display.decision
        self.note: Callable[[str], None] = display.note

    def planned(self, plan: Plan, folder: str) -> None:
        from orchestrator.telemetry.planned import plan_lines

        self._display.restart()
        self.note("\n".join([*plan_lines(plan), f"  {'folder':<8} {folder}", ""]))

    def begins(self, config: RunConfig) -> None:
        self._display.pace(config.telemetry.progress_interval_s)


def run_request(
    job: str,
    args: list[str] | None,
    overrides: list[str] | None,
    address: str | None,
    *,
    fresh: bool = False,
    force: bool = False,
    checkpoint: str | None = None,
    probe: bool | None = None,
    queue: str | None = None,
    priority: int | None = None,
) -> RunRequest:
    from orchestrator.launching.preflight import RunRequest

    sharing = {"fleet.queue": queue, "fleet.priority": priority}
    shared = [f"{field}={value}" for field, value in sharing.items() if value is not None]
    return RunRequest(
        job=job,
        args=tuple(args or ()),
        overrides=(*(overrides or ()), *shared),
        address=address,
        fresh=fresh,
        force_config=force,
        from_checkpoint=checkpoint,
        probe=probe,
    )


def open_display(as_json: bool) -> Display:
    from orchestrator.telemetry.progress import Display

    stream = sys.stderr if as_json else sys.stdout
    return Display(stream, interactive=stream.isatty(), interval_s=2.0, clock=time.monotonic)


def finish(summary: Mapping[str, Any], as_json: bool) -> None:
    from orchestrator.telemetry.progress import summary as summary_lines

    text = summary_lines(summary)
    if summary["state"] == "stopped":
        text += "\nrun the same command again to go on from the checkpoint"
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(summary))
    if summary["state"] == "stopped":
        raise typer.Exit(1)


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
