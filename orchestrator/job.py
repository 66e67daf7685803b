"""What to train: the Job value, the protocols of its task and data, and ``load``, which finds one by name."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import linecache
import pkgutil
import re
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, get_args, get_origin, runtime_checkable

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from orchestrator.config import RunConfig, apply_overrides, explain_validation, parse_value
from orchestrator.errors import JobError, RequestError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

__all__ = ["Dataset", "Datasets", "Job", "Parquet", "Summarizing", "Task", "arguments", "load"]

VERBS = ("datasets", "model", "loss", "metrics")
TARGET = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")


# -- what a job consists of --------------------------------------------------------------------


@runtime_checkable
class Dataset(Protocol):
    """Samples addressed by global position, ``0 .. len - 1``.

    Two verbs, because the order belongs to the run and not to the data: the length lets the run lay out
    epochs, and ``take`` reads any slice of any order, so a resize or a restart needs no state in here.
    A dataset must be picklable: each worker gets its own copy.
    """

    def __len__(self) -> int:
        """Return the number of samples; it never changes during a run."""
        ...

    def take(self, positions: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return the rows at ``positions`` (shape [n]), in that order: columns whose first axis is n samples."""
        ...


@dataclasses.dataclass(frozen=True)
class Parquet:
    """Describes Parquet data, which each worker opens for itself.

    Numbers, truth values and fixed-size lists of them become tensors: ``uint8[64]`` is ``[samples, 64]``. Bytes, text
    and lists of any length need ``decode``.
    """

    uri: str
    """A file, or a folder or ``s3://bucket/prefix`` of files read in the order of their names."""
    columns: tuple[str, ...] | Mapping[str, str] = ()
    """Columns to read; empty reads all. A mapping says also what each must hold, and is checked before a run starts:
    ``{"image": "uint8[3,32,32]", "label": "int64", "png": "bytes", "words": "text", "tokens": "int32[]"}``."""
    decode: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]] | None = None
    """Called in the workers with the columns of a micro batch's rows, returns columns of numbers with as many rows.

    Bytes and text arrive as object arrays of ``bytes``, lists of any length as object arrays of arrays. It runs in
    threads beside the training step, ahead of time, so it must depend on nothing but its argument."""


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The data of a run.

    Raises:
        JobError: one of the two is neither a ``Parquet`` nor a ``Dataset``.
    """

    train: Parquet | Dataset
    """Trained on, each sample once per epoch."""
    evaluation: Parquet | Dataset | None = None
    """Held out for ``Task.metrics``; none leaves evaluation out."""

    def __post_init__(self) -> None:
        for name in ("train", "evaluation"):
            value = getattr(self, name)
            if isinstance(value, Parquet | Dataset) or (name == "evaluation" and value is None):
                continue
            raise JobError(
                f"Datasets.{name} is a {type(value).__name__}: give a Parquet, or an object with __len__ and take"
            )


class Task(Protocol):
    """What the job's author writes, and nothing that the orchestrator could know by itself.

    Four verbs, because each is called by another part at another time: ``datasets`` and ``model`` once in every
    worker, ``loss`` for each micro batch, ``metrics`` for each batch of the evaluation set. A task must be picklable.
    """

    def datasets(self) -> Datasets:
        """Return the training data and, if there is any, the evaluation data."""
        ...

    def model(self) -> nn.Module:
        """Return a new model on the CPU in fp32; the orchestrator seeds torch before, and moves it after."""
        ...

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scalar loss: the *mean* over the samples of the micro batch (``batch[column]``: [samples, ...]).

        ``model`` is in training mode and its gradient is taken.
        """
        ...

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return each metric per sample (shape [samples]); its mean over the evaluation set is taken exactly.

        ``model`` is in evaluation mode and no gradient is taken.
        """
        ...


@runtime_checkable
class Summarizing(Protocol):
    """What a task adds whose metrics are no means over samples, such as the area under a curve.

    Its ``metrics`` may return rows, [samples, ...], of which means over the whole set are taken as well: counts and
    histograms that say all about the set that the metric needs. One verb, because means over samples are what ranks
    can add up exactly, however the set is split over them.
    """

    def summarize(self, means: Mapping[str, Tensor]) -> Mapping[str, float | Tensor]:
        """Return the metrics, one number each, from the ``means`` (fp64) of what ``metrics`` returned."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: how (``config``) and what (``task``).

    Raises:
        JobError: ``config`` is no ``RunConfig``, or ``task`` lacks a verb, which is named.
    """

    config: RunConfig
    """Everything that determines the run but the task."""
    task: Task
    """Data, model, loss and metrics."""
    prepare: Callable[[], None] | None = None
    """Run by the driver before anything else, then once on each host, such as writing the data; must be idempotent."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, RunConfig):
            raise JobError(f"Job.config is a {type(self.config).__name__}: give an orchestrator.config.RunConfig")
        if isinstance(self.task, type):
            name = self.task.__name__
            raise JobError(f"Job.task is the class {name}: give an instance, as in {name}()")
        missing = [verb for verb in VERBS if not callable(getattr(self.task, verb, None))]
        if missing:
            name = type(self.task).__name__
            raise JobError(f"task {name} lacks {_join(missing, 'and')}: a task has the methods {_join(VERBS, 'and')}")
        if self.prepare is not None and not callable(self.prepare):
            raise JobError(f"Job.prepare is a {type(self.prepare).__name__}: give a function without parameters")


# -- finding one by name -----------------------------------------------------------------------


def load(target: str, args: Sequence[str] = (), overrides: Sequence[str] = ()) -> Job:
    """Return the job that ``module:function`` makes, called with ``args`` and with ``overrides`` in its config.

    ``args`` are ``name=value`` texts for the function's own parameters, read by their annotations; ``overrides``
    are ``dotted.field=value`` texts for the config. The working directory is importable, as with ``python -m``.

    Raises:
        JobError: the function cannot be found, imported or called, or does not return a sound ``Job``.
        ConfigError: the config fails its checks once the overrides are in it.
        RequestError: whatever the function itself raises of this kind, unchanged.
    """
    match = TARGET.fullmatch(target)
    if not match:
        raise JobError(f"job {target!r}: write it as module:function, as in jobs.vision:digits")
    where = f"job {target!r}"
    module = _import(where, match["module"])
    function = _function(where, module, match["function"])
    job = _call(where, function, args)
    return dataclasses.replace(job, config=apply_overrides(job.config, overrides))


def arguments(target: str, args: Sequence[str] = ()) -> dict[str, Any]:
    """What ``load`` would call the function with: its parameters by name, defaults among them.

    Raises:
        JobError: as ``load`` does.
    """
    where = f"job {target!r}"
    module, _, name = target.partition(":")
    return dict(_bind(where, _function(where, _import(where, module), name), args).arguments)


def _import(where: str, name: str) -> types.ModuleType:
    cwd = str(Path.cwd())
    if cwd not in [str(Path(entry).absolute()) for entry in sys.path]:
        sys.path.insert(0, cwd)  # a console script, unlike python -m, leaves it out
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except RequestError:
        raise
    except (Exception, SystemExit) as error:  # the user's code runs here, and may raise anything
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing and f"{name}.".startswith(f"{missing}."):
            raise JobError(f"{where}: there is no module {missing!r}; {_nearby(missing, cwd)}") from None
        remedy = f"install {missing.partition('.')[0]}, or fix the import" if missing else "fix the module"
        raise JobError(f"{where}: importing it failed at {_frame(error)}: {_brief(error)}; {remedy}") from error


def _nearby(missing: str, cwd: str) -> str:
    """Say what stands beside a missing module, or where modules are looked for."""
    parent, _, leaf = missing.rpartition(".")
    if not parent:
        return f"run from the folder that holds it (this is {cwd}), or install it"
    paths = getattr(sys.modules.get(parent), "__path__", None)
    if paths is None:
        return f"{parent!r} is a module, not a package: name a function of it, as in {parent}:{leaf}"
    names = [found.name for found in pkgutil.iter_modules(paths)]
    return did_you_mean(leaf, names) if names else f"the package {parent!r} has no modules"


def _function(where: str, module: types.ModuleType, name: str) -> Callable[..., object]:
    function = getattr(module, name, None)
    if callable(function) and not isinstance(function, type):
        return typing.cast("Callable[..., object]", function)
    found = [n for n, f in inspect.getmembers(module, inspect.isfunction) if n[0] != "_" and _returns_job(f)]
    choices = did_you_mean(name, found) if found else "it has no function that returns a Job: write one, with '-> Job'"
    problem = "is not a function" if hasattr(module, name) else "does not exist"
    raise JobError(f"{where}: {name!r} {problem} in {module.__name__}; {choices}")


def _returns_job(function: Callable[..., object]) -> bool:
    returned = getattr(function, "__annotations__", {}).get("return")
    return returned is Job or (isinstance(returned, str) and returned.strip("'\"").rpartition(".")[2] == "Job")


def _call(where: str, function: Callable[..., object], args: Sequence[str]) -> Job:
    name = getattr(function, "__name__", "it")
    bound = _bind(where, function, args)
    try:
        job = function(*bound.args, **bound.kwargs)
    except RequestError:
        raise
    except ValidationError as error:
        finding = explain_validation(error)
        raise JobError(f"{where}: {name}() makes a wrong value at {_frame(error)}: {finding}") from error
    except (Exception, SystemExit) as error:  # the user's code runs here, and may raise anything
        raise JobError(f"{where}: {name}() failed at {_frame(error)}: {_brief(error)}; fix it, or its --arg") from error
    if not isinstance(job, Job):
        raise JobError(f"{where}: {name}() returns a {type(job).__name__}: make it return an orchestrator.job.Job")
    return job


# -- its arguments -----------------------------------------------------------------------------


def _bind(where: str, function: Callable[..., object], args: Sequence[str]) -> inspect.BoundArguments:
    signature = inspect.signature(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = {n: p for n, p in signature.parameters.items() if p.kind not in variadic}
    annotations = {n: _annotation(where, function, p) for n, p in parameters.items()}
    bound = signature.bind_partial()
    given: dict[str, Any] = {}
    for arg in args:
        name, equals, text = arg.partition("=")
        name = name.strip()
        if not equals or not name:
            raise JobError(f"--arg {arg!r}: write it as name=value, as in epochs=3")
        if name not in parameters:
            raise JobError(f"{where}: unknown --arg {name!r}; {_valid(name, parameters, annotations)}")
        given[name] = _parse(where, name, text, annotations[name])
    for name, parameter in parameters.items():
        if name not in given and parameter.default is parameter.empty:
            raise JobError(f"{where}: needs --arg {name}=value, {_type_name(annotations[name])}")
    bound.arguments.update({name: given[name] for name in parameters if name in given})
    bound.apply_defaults()
    return bound


def _annotation(where: str, function: Callable[..., object], parameter: inspect.Parameter) -> Any:
    """Return the type to read a parameter as; without an annotation, its default's."""
    if parameter.annotation is parameter.empty:
        plain = isinstance(parameter.default, bool | int | float | str | Path)
        return type(parameter.default) if plain else str
    try:
        return typing.get_type_hints(function, include_extras=True)[parameter.name]
    except Exception as error:  # evaluates the user's annotations, which may raise anything
        raise JobError(f"{where}: an annotation of its parameters cannot be read: {_brief(error)}") from error


def _valid(name: str, parameters: Mapping[str, inspect.Parameter], annotations: Mapping[str, Any]) -> str:
    """Return the near miss, if any, and all parameters with types and defaults."""
    if not parameters:
        return "the function has no parameters"
    described = []
    for key, parameter in sorted(parameters.items()):
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        described.append(f"{key}: {_type_name(annotations[key])}{default}")
    hint, _, _ = did_you_mean(name, parameters).rpartition("valid: ")
    return f"{hint}valid: {'; '.join(described)}"


def _parse(where: str, name: str, text: str, annotation: Any) -> Any:
    """Read ``text`` as ``annotation``; a comma separates the members of a tuple or list."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        kind = _type_name(annotation)
        raise JobError(f"{where}: --arg {name} cannot be given as text: it is {kind}") from None
    if text.strip().lower() in ("none", "null") and _allows_none(annotation):
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    readings: tuple[Callable[[], Any], ...] = (
        lambda: adapter.validate_strings(text),
        lambda: adapter.validate_python(_number(text)),
        lambda: adapter.validate_python(parts),
        lambda: adapter.validate_python([_number(part) for part in parts]),
    )
    bounds: dict[str, None] = {}
    for read in readings:
        try:
            return read()
        except ValidationError as error:
            findings = [item["msg"] for item in error.errors() if "_than" in item["type"]]
            bounds |= dict.fromkeys(finding.removeprefix("Input should be ") for finding in findings)
    wanted = ", ".join([_type_name(annotation), *bounds])
    raise JobError(f"{where}: --arg {name}={text!r} should be {wanted}")


def _number(text: str) -> Any:
    """Return a number where the text is one, for a Literal of numbers takes no text."""
    value = parse_value(text)
    return text if isinstance(value, bool) or value is None else value


def _allows_none(annotation: Any) -> bool:
    return annotation is None or annotation is type(None) or any(_allows_none(a) for a in _members(annotation))


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _type_name(annotation: Any) -> str:
    """Name a type as a user would: ``int``, ``'sgd' or 'adamw'``, ``float or none``."""
    if annotation is type(None) or annotation is None:
        return "none"
    if get_origin(annotation) is typing.Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return _join([repr(value) for value in get_args(annotation)], "or")
    if members := _members(annotation):
        return _join([_type_name(member) for member in members], "or")
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _join([repr(member.value) for member in annotation], "or")
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


# -- saying what went wrong in the user's code -------------------------------------------------


def _frame(error: BaseException) -> str:
    """Return ``path:line: source`` of the innermost frame that is the user's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)] or list(frames[-1:])
    if not own:
        return "an unknown line"
    frame = own[-1]
    source = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{_short(frame.filename)}:{frame.lineno}: {source}"


def _is_users(filename: str) -> bool:
    path = Path(filename)
    library = {"site-packages", "dist-packages"} & set(path.parts)
    standard = path.is_relative_to(sysconfig.get_path("stdlib")) or filename.startswith("<frozen")
    return not library and not standard and not path.is_relative_to(Path(__file__).parent)


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _brief(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _join(words: Sequence[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)
