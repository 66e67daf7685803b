"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="What to run, as module:function.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, its name below runs, or s3://BUCKET/PREFIX/NAME.")
]
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
SubmittedArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name, for its last attempt, or the id of a submission.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="A store compatible with S3; otherwise AWS_ENDPOINT_URL, or AWS."),
]
InQueue = Annotated[
    str | None, typer.Option("--queue", metavar="NAME", help="Share the cluster's devices, in this queue; fleet.queue.")
]
Priority = Annotated[
    int | None,
    typer.Option("--priority", min=-10, max=10, metavar="N", help="In a queue: each point doubles its weight."),
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout; all else goes to stderr.")]
