"""The verbs after training: compress, export, export-weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Json, RunArgument
from orchestrator.cli.requests import Watcher, open_display

__all__ = ["app"]

app = typer.Typer()


@app.command()
def compress(
    run: RunArgument,
    to: Annotated[
        list[str] | None, typer.Option(metavar="WAY", help="A way to write it, as in onnx-int8; all.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Also train a variant without this share of its weights.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(metavar="NAME", help="What goes: global, 2:4 (with --prune 0.5) or channels.")
    ] = "global",
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
    min_accuracy: Annotated[
        float | None, typer.Option(metavar="VALUE", help="Smallest value of the metric; of one like loss the largest.")
    ] = None,
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
    with open_display(as_json) as display:
        done = compressing.compress(request, Watcher(display))
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


@app.command("export-weights")
def export_weights(
    run: RunArgument,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="By default RUN/exported/NAME.safetensors.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write RUN's trained weights as plain safetensors, whole and in fp32, whatever ZeRO stage trained them."""
    from orchestrator.compression import weights

    written = weights.export_weights(run, Path(file) if file else None, overwrite=overwrite)
    if as_json:
        print(json.dumps(written.to_dict()))
        return
    print(f"{written.file}  {written.size_bytes:,} bytes  {written.num_tensors} tensors of {written.checkpoint}")
    for name, known in written.aliases.items():
        print(f"{name} is tied: it is there as {known}")
