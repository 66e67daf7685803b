"""What `tune` does: runs of a job with other settings, many at a time, the poor ones ended early.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all trials run to a ninth of their length, the best
third of them to a third, the best third of those to the end. A trial that is left is not killed: it saves and stops as
any run does, and gives back what it held. Ray Tune places the trials of a round and, with Optuna, chooses settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig, differing_fields
from orchestrator.errors import (
    ConfigError,
    JobError,
    NonFiniteLossError,
    OrchestratorError,
    RunFolderError,
    UserCodeError,
    WorkerLostError,
)
from orchestrator.job import load
from orchestrator.launching import driver
from orchestrator.launching.cluster import RayCluster, address_of
from orchestrator.launching.preflight import RunRequest, prepare, run_root
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.metric_direction import direction_of
from orchestrator.scheduling.search_space import Range, draw, parse_search
from orchestrator.storage.folder import RunFolder, read_json, write_json, write_text
from orchestrator.telemetry.searched import SearchedTrial, render_search

__all__ = ["Trial", "TuneRequest", "Tuned", "tune"]

RATE = "recipe.optimizer.learning_rate"
FACTOR = 3
SHARES = (1 / 9, 1 / 3, 1.0)
"""Of its length that a trial runs in each round; one of ``FACTOR`` goes on."""
OWN_FAULT = (ConfigError, JobError, NonFiniteLossError, UserCodeError)
"""What a trial's own settings or the job's own code did wrong: it would end the same way again."""


@dataclass(frozen=True)
class TuneRequest:
    """What the command line asks for."""

    job: str
    search: tuple[str, ...]
    args: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    trials: int = 12
    metric: str = "loss"
    mode: str | None = None
    """"min" or "max", which of the metric's values is the best; None: as its name says."""
    optuna: bool = False
    address: str | None = None
    seed: int = 0

    @property
    def grows(self) -> bool:
        """Whether more of the metric is better."""
        return direction_of(self.metric, self.mode) == "max"


@dataclass(frozen=True)
class Trial:
    """One run of a search: what was set, how far it came, and the best of the metric on the way."""

    name: str
    settings: Mapping[str, str]
    state: str
    progress: float
    best: float | None


@dataclass(frozen=True)
class Tuned:
    """What came of a search; ``trials`` from best to worst."""

    folder: Path
    metric: str
    grows: bool
    trials: tuple[Trial, ...]
    together: int

    @property
    def report(self) -> Path:
        """The page that draws it."""
        return self.folder / "report.html"

    @property
    def set_line(self) -> str:
        """What the best trial was, ready for the command line."""
        return " ".join(f"--set {name}={value}" for name, value in self.trials[0].settings.items())

    @property
    def halved(self) -> str:
        """What to set in its place where the batch is to grow; empty where no learning rate was searched."""
        rate = self.trials[0].settings.get(RATE)
        return "" if rate is None else f"--set {RATE}={float(rate) / 2:.6g}"


def tune(request: TuneRequest, listener: driver.Listener) -> Tuned:
    """Try ``request.trials`` settings by successive halving; the same command again goes on after a crash.

    Every trial is a run like any other, in ``<checkpoint.uri>/tune-<name>/runs/<trial>``: its checkpoints let it go on.

    Raises:
        RequestError: the job, the search space, the metric or the cluster does not allow it; nothing was started.
    """
    grows = request.grows
    job = load(request.job, request.args, request.overrides)
    ranges = parse_search(request.search, job.config)
    if request.trials < 2:
        raise ConfigError(f"trials={request.trials}: give 2 at least")
    if request.optuna:
        _need_optuna()
    prepare(job)
    folder = run_root(job.config).with_name(f"tune-{job.config.name}")
    _same_search(request, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "search.json", _identity(request))
    with RayCluster.connect(address_of(request.address), log=folder / "ray.log") as cluster:
        together = _together(job.config, cluster.shape)
        listener.note(f"{request.trials} trials, {together} at a time, in {folder}")
        _fit(request, ranges, folder, together)
    trials = _trials(folder, request.metric, grows)
    if not trials or trials[0].best is None:
        raise _nothing_measured(request, folder)
    tuned = Tuned(folder, request.metric, grows, trials, together)
    _draw(tuned, job.config.name)
    if lost := [trial for trial in trials if trial.state == "lost"]:
        listener.note(
            f"{len(lost)} of {len(trials)} trials were lost to the machine: the same command tries them again"
        )
    return tuned


def _draw(tuned: Tuned, name: str) -> None:
    """Write the search down as a page: what was tried, what came of it, and each trial's way there."""
    rows = [
        SearchedTrial(
            name=trial.name,
            settings=trial.settings,
            state=trial.state,
            share=trial.progress,
            best=trial.best,
            points=_points(tuned.folder / "runs" / trial.name, tuned.metric),
        )
        for trial in tuned.trials
    ]
    write_text(tuned.report, render_search(name, tuned.metric, rows, tuned.set_line))


def _points(root: Path, metric: str) -> tuple[tuple[float, float, int], ...]:
    records = _lines(root / "evaluations.jsonl")
    return tuple((r["progress"], r["metrics"][metric], r["step"]) for r in records if metric in r["metrics"])


def _need_optuna() -> None:
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise ConfigError("--optuna needs the package optuna: pip install 'orchestrator[search]'")


def _identity(request: TuneRequest) -> dict[str, Any]:
    return {
        "job": request.job,
        "args": sorted(request.args),
        "overrides": sorted(request.overrides),
        "search": list(request.search),
        "trials": request.trials,
        "metric": request.metric,
        "mode": "max" if request.grows else "min",
        "optuna": request.optuna,
    }


def _same_search(request: TuneRequest, folder: Path) -> None:
    old = read_json(folder / "search.json")
    if old is not None and (changed := differing_fields(old, _identity(request))):
        raise RunFolderError(
            f"{folder} holds another search:\n  "
            + "\n  ".join(changed)
            + "\ngive this one another name with --set name=..., or move that folder away"
        )


def _together(config: RunConfig, shape: ClusterShape) -> int:
    """How many runs the cluster holds side by side.

    Raises:
        ClusterError: not one.
    """
    shape.workers(config.scale)  # refuses what it cannot hold once, naming what is short
    fewest = config.scale.workers if isinstance(config.scale.workers, int) else config.scale.workers[0]
    return shape.room(config.scale) // fewest


def _fit(request: TuneRequest, ranges: Sequence[Range], folder: Path, together: int) -> None:
    """Run every round that is not done yet: what the trials wrote down themselves says how far each has come."""
    names = _first_round(request, ranges, folder, together)
    for share in SHARES:
        due = [name for name in names if _reached(folder, name) < share]
        if due:
            trials = [{"name": name, "settings": read_json(folder / "settings" / f"{name}.json")} for name in due]
            _round(request, folder, {"trial": _grid(trials)}, share, together)
        order = [trial.name for trial in _trials(folder, request.metric, request.grows) if trial.best is not None]
        names = [name for name in order if name in names][: max(1, math.ceil(len(names) / FACTOR))]


def _first_round(request: TuneRequest, ranges: Sequence[Range], folder: Path, together: int) -> list[str]:
    """Names of all trials, whose settings are written down: drawn at once, or one after another by Optuna."""
    (folder / "settings").mkdir(exist_ok=True)
    known = _names(folder)
    if request.optuna and len(known) < request.trials:
        space = {"settings": {found.field: _domain(found) for found in ranges}}
        searcher = _optuna(request, ranges, folder)
        _round(request, folder, space, SHARES[0], together, request.trials - len(known), searcher)
    elif len(known) < request.trials:  # a search may have been killed between two of them
        for index, drawn in enumerate(draw(ranges, request.trials, request.seed)):
            write_json(folder / "settings" / f"trial-{index:03d}.json", drawn)
    return _names(folder)


def _round(
    request: TuneRequest,
    folder: Path,
    space: dict[str, Any],
    share: float,
    together: int,
    count: int = 1,
    searcher: Any = None,
) -> None:
    """Run trials to ``share`` of their length: those in ``space``, or ``count`` of what ``searcher`` finds in it."""
    from ray import tune as ray_tune

    def trial(chosen: dict[str, Any]) -> None:
        run_trial(request, folder, chosen.get("trial", chosen), share)

    tuner = ray_tune.Tuner(
        # A trial's workers take what they need by themselves; Ray Tune wants it to take something.
        ray_tune.with_resources(trial, {"memory": 1}),
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric="value",
            mode="max" if request.grows else "min",
            num_samples=count,
            max_concurrent_trials=together,
            search_alg=searcher,
        ),
        run_config=ray_tune.RunConfig(name=f"round-{share:.3f}", storage_path=str(folder / "ray"), verbose=0),
    )
    tuner.fit()


def _grid(trials: list[dict[str, Any]]) -> Any:
    from ray import tune as ray_tune

    return ray_tune.grid_search(trials)


def _reached(folder: Path, name: str) -> float:
    """How far a trial has come, as a share of its length; one that failed is done, one that was lost is not."""
    if _ended(folder, name, "failed").exists():
        return 1.0
    summary = read_json(folder / "runs" / name / "summary.json") or {}
    return 1.0 if summary.get("state") == "finished" else _progress(folder / "runs" / name)


def _progress(root: Path) -> float:
    records, plan = _lines(root / "evaluations.jsonl"), read_json(root / "plan.json") or {}
    return min(1.0, records[-1]["progress"] / plan["length"]) if records and plan.get("length") else 0.0


def _domain(found: Range) -> Any:
    """A range as Ray Tune, and Optuna through it, has it."""
    from ray import tune as ray_tune

    if found.kind == "choice":
        return ray_tune.choice(list(found.values))
    low, high = found.bounds
    if found.kind == "randint":
        first, last = found.integers[0], found.integers[-1]
        # Ray Tune leaves the upper end out, but where there are steps.
        return ray_tune.randint(first, last + 1) if found.step == 1 else ray_tune.qrandint(first, last, found.step)
    return (ray_tune.loguniform if found.kind == "loguniform" else ray_tune.uniform)(low, high)


def _optuna(request: TuneRequest, ranges: Sequence[Range], folder: Path) -> Any:
    """Optuna's search, told what earlier trials of this search found, for one that goes on after a crash."""
    from ray.tune.search.optuna import OptunaSearch

    trials = _trials(folder, request.metric, request.grows)
    known = [trial for trial in trials if trial.best is not None and trial.state != "failed"]
    return OptunaSearch(
        points_to_evaluate=[
            {f"settings/{r.field}": _value(r, trial.settings[r.field]) for r in ranges} for trial in known
        ],
        evaluated_rewards=[trial.best for trial in known],
        seed=request.seed + len(trials),  # the same seed would begin with the same settings again
    )


def _value(found: Range, text: str) -> Any:
    """What a range's own text stands for; rounding must not carry it over the edge."""
    if found.kind == "choice":
        return text
    low, high = found.bounds
    return min(max(int(text) if found.kind == "randint" else float(text), low), high)


def run_trial(request: TuneRequest, folder: Path, chosen: Mapping[str, Any], share: float) -> None:
    """Run a trial on to ``share`` of its length, in the process that Ray Tune gave it, and report its last value."""
    from ray import tune as ray_tune

    name = chosen.get("name") or f"trial-{ray_tune.get_context().get_trial_id().replace('_', '-')}"
    settings = {field: _text(value) for field, value in chosen["settings"].items()}
    write_json(folder / "settings" / f"{name}.json", settings)
    overrides = [*request.overrides, *(f"{field}={value}" for field, value in settings.items())]
    overrides += [f"name={name}", f"checkpoint.uri={folder / 'runs'}"]
    trial = RunRequest(
        request.job,
        request.args,
        tuple(overrides),
        address="auto",
        probe=False,
        pause_share=share if share < 1.0 else None,
    )
    _ended(folder, name, "lost").unlink(missing_ok=True)
    try:
        driver.run(trial, _Silent())
    except OWN_FAULT as error:  # a setting that diverges is a result, and no reason to end the search
        write_json(_ended(folder, name, "failed"), {"error": str(error)})
    except OrchestratorError as error:  # workers, a node or a store were lost: that says nothing of the setting
        write_json(_ended(folder, name, "lost"), {"error": str(error)})
    records = _lines(RunFolder(folder / "runs" / name).evaluations)
    values = [r["metrics"][request.metric] for r in records if request.metric in r["metrics"]]
    worst = -math.inf if request.grows else math.inf
    ray_tune.report({"value": values[-1] if values else worst})


def _ended(folder: Path, name: str, how: str) -> Path:
    """Where a trial that ``failed``, or was ``lost``, says why."""
    return folder / "settings" / f"{name}.{how}.json"


class _Silent:
    """Hears of a trial and says nothing: the search tells of its rounds."""

    def planned(self, plan: Plan, folder: str) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def decision(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def begins(self, config: RunConfig) -> None: ...


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _trials(folder: Path, metric: str, grows: bool) -> tuple[Trial, ...]:
    """What the runs wrote down themselves, from best to worst; those that measured nothing last."""
    found = []
    for name in _names(folder):
        root = folder / "runs" / name
        values = [r["metrics"][metric] for r in _lines(root / "evaluations.jsonl") if metric in r["metrics"]]
        best = (max if grows else min)(values, default=None)
        settings = read_json(folder / "settings" / f"{name}.json") or {}
        found.append(Trial(name, settings, _state(folder, name), _progress(root), best))
    sign = -1.0 if grows else 1.0
    return tuple(sorted(found, key=lambda trial: math.inf if trial.best is None else sign * trial.best))


def _names(folder: Path) -> list[str]:
    """All trials whose settings are written down."""
    return sorted(path.stem for path in (folder / "settings").glob("trial-*.json") if "." not in path.stem)


def _state(folder: Path, name: str) -> str:
    for how in ("failed", "lost"):
        if _ended(folder, name, how).exists():
            return how
    summary = read_json(folder / "runs" / name / "summary.json") or {}
    return "finished" if summary.get("state") == "finished" else "ended early"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _nothing_measured(request: TuneRequest, folder: Path) -> OrchestratorError:
    """Why there is no result: what the first trial that failed said, or else the first that was lost."""
    said = f"no trial measured metric={request.metric!r}"
    names = _names(folder)
    for failed in (_ended(folder, name, "failed") for name in names):
        if (why := read_json(failed)) is not None:
            return ConfigError(f"{said}: the first that failed said: {why['error']}")
    for lost in (_ended(folder, name, "lost") for name in names):
        if (why := read_json(lost)) is not None:
            return WorkerLostError(
                f"{said}: the first that was lost said: {why['error']}\nthe same command tries the lost ones again"
            )
    return ConfigError(f"{said}: the job has no such metric, or no evaluation data")
