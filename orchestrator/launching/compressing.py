"""What `compress` and `export` do: the training runs that a smaller model needs, then files and the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.compression.making import PATHS, make, make_one, possible_paths, source_of
from orchestrator.compression.report import Budget, Entry, best, quality_of, report_html
from orchestrator.compression.trained import Trained, load_trained
from orchestrator.compression.variants import shown_name
from orchestrator.errors import ConfigError, ExportError, RunFolderError, did_you_mean, explain_oserror
from orchestrator.launching.driver import Listener, run
from orchestrator.launching.preflight import RunRequest
from orchestrator.storage.folder import write_json, write_text
from orchestrator.storage.store import is_s3

__all__ = ["CompressRequest", "Compressed", "compress", "export"]

VARIANTS = "orchestrator.compression.variants"
SHORT = ("torch", "onnx", "onnx-int8")
"""How variants of a run are written, unless said otherwise: all ways would take minutes and say little more."""

NO_LIMITS = Budget()


@dataclass(frozen=True)
class CompressRequest:
    """What the command line asks for."""

    run: str
    paths: tuple[str, ...] = ()
    """Ways to write a model; none: all for the run itself, and the short list for its variants."""
    prune: float | None = None
    pattern: str = "global"
    int8_aware: bool = False
    student: tuple[str, ...] = ()
    epochs: float = 0.0
    calibrate: int = 256
    metric: str | None = None
    budget: Budget = NO_LIMITS


@dataclass(frozen=True)
class Compressed:
    """What came of it."""

    folder: Path
    quality: str
    entries: tuple[Entry, ...]
    chosen: Entry | None


def compress(request: CompressRequest, listener: Listener) -> Compressed:
    """Write and measure the run's model, and the variants asked for, in ``<run>/compressed``.

    Raises:
        RequestError: the run, an option or the model does not allow it; nothing was trained.
        RunError: a variant's training failed.
    """
    _check_paths(request.paths)
    if is_s3(request.run):
        raise ConfigError(
            f"{request.run}: compress keeps what it makes beside the run, and to folders; "
            "orchestrator export writes a run in a store as files, in the same ways"
        )
    trained = load_trained(request.run)
    source = source_of(trained, trained.config.name, calibrate=request.calibrate)
    folder = _made(trained.folder.root / "compressed")
    orders = _orders(request, trained)
    entries: list[Entry] = []
    for name in ("run", *orders):
        if name == "run":
            listener.note(f"writing {trained.config.name} ...")
            found = source
        else:
            listener.note(f"training its variant {name} ...")
            smaller = load_trained(run(orders[name], listener)["folder"])
            found = source_of(smaller, shown_name(smaller.config.name), calibrate=request.calibrate)
        entries += make(found, request.paths or (possible_paths() if name == "run" else SHORT), folder)
    if all(entry.problem for entry in entries):
        raise ExportError(f"no way to write {trained.config.name} worked; {entries[0].path}: {entries[0].problem}")
    quality = quality_of(entries, request.metric)
    chosen = best(entries, request.budget, quality)
    done = Compressed(folder, quality, tuple(entries), chosen)
    _write(done, trained)
    return done


def export(name: str, paths: Sequence[str], out: Path | None, *, calibrate: int = 256) -> list[Entry]:
    """Write a run's model in each of ``paths``, and compare what was written with torch on real inputs.

    Raises:
        RequestError: there is no such run or path, or the model cannot be written like this.
    """
    _check_paths(paths)
    trained = load_trained(name)
    source = source_of(trained, trained.config.name, calibrate=calibrate)
    beside = Path("exported") / trained.config.name if is_s3(name) else trained.folder.root / "exported"
    folder = _made(out or beside)
    return [make_one(source, path, folder) for path in paths]


def _check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if path not in PATHS:
            raise ExportError(f"{path!r} is no way to write a model; {did_you_mean(path, PATHS)}")


def _orders(request: CompressRequest, trained: Trained) -> dict[str, RunRequest]:
    """The runs of the variants, each checked by loading its job before any of them is started."""
    root = trained.folder.root
    common = (f"run={root}", f"epochs={request.epochs:g}")
    wanted: dict[str, tuple[str, ...]] = {}
    if request.prune is not None:
        wanted["pruned"] = (f"sparsity={request.prune:g}", f"pattern={request.pattern}")
    if request.int8_aware:
        wanted["quantization_aware"] = ()
    if request.student:
        wanted["distilled"] = (f"student={','.join(request.student)}",)
    overrides = (f"checkpoint.uri={root.parent}",)
    orders = {n: RunRequest(f"{VARIANTS}:{n}", (*common, *more), overrides, probe=False) for n, more in wanted.items()}
    from orchestrator.job import load

    for order in orders.values():
        job = load(order.job, order.args, order.overrides)
        if job.prepare is not None:
            job.prepare()
    return orders


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot write: {explain_oserror(folder, error)}") from None
    return folder


def _write(done: Compressed, trained: Trained) -> None:
    about = (
        f"{trained.checkpoint.name} of {trained.folder.root}; {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}. Latency is of a call on one sample, samples/s "
        "of a call on a batch; off by: the largest difference of an output from the same weights' in torch."
    )
    write_text(
        done.folder / "report.html", report_html(trained.config.name, done.entries, done.quality, done.chosen, about)
    )
    rows = [entry.to_dict() for entry in done.entries]
    write_json(
        done.folder / "report.json",
        json.loads(
            json.dumps({"quality": done.quality, "best": done.chosen and done.chosen.to_dict(), "entries": rows})
        ),
    )
