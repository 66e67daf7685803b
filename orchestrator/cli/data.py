"""The verbs about training data: data check, data pack."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Address, Endpoint, Json

if TYPE_CHECKING:
    from orchestrator.config import StorageConfig

__all__ = ["app"]

app = typer.Typer(help="Look at training data, and pack it into Parquet.", no_args_is_help=True)


@app.command("check")
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


@app.command("pack")
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
