"""The command line: the only reader of argv, and the only package that prints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from orchestrator import __version__
from orchestrator.cli import compression, data, fleet, monitoring, submission, training
from orchestrator.errors import OrchestratorError

__all__ = ["app", "main"]

app = typer.Typer(
    name="orchestrator",
    help="Train PyTorch models on a Ray cluster: you bring a model, data and a recipe that works.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _verbs in (training, compression, submission, monitoring):
    app.add_typer(_verbs.app)
app.add_typer(data.app, name="data")
app.add_typer(fleet.app, name="queue")
app.add_typer(monitoring.monitor_verbs, name="monitor")


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
