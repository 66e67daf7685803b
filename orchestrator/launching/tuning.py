"""What `tune` does: runs of a job with other settings, many at a time, the poor ones ended early.

Ray Tune places the trials, and asynchronous successive halving says which: after a ninth and after a third of its
length a trial goes on if it is in the best quarter of those that have come so far. Until then it is no process: its run
has saved and stopped, as any run can be, and given back what it held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from orchestrator.launching.trials import Trial, Trials
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.halving import SHARES
from orchestrator.scheduling.metric_direction import direction_of
from orchestrator.scheduling.search_space import Range, draw, parse_search
from orchestrator.storage.folder import read_json, write_json, write_text
from orchestrator.telemetry.searched import SearchedTrial, render_search

__all__ = ["TuneRequest", "Tuned", "run_trial", "tune"]

RATE = "recipe.optimizer.learning_rate"
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
    """Try ``request.trials`` settings by halving; the same command again goes on after a crash.

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
        trials = Trials(folder, request.metric, grows)
        _fit(request, ranges, trials, together, listener.note)
    ranked = trials.ranked()
    if not ranked or ranked[0].best is None:
        raise _nothing_measured(trials)
    tuned = Tuned(folder, request.metric, grows, ranked, together)
    _draw(tuned, trials, job.config.name)
    if lost := [trial for trial in ranked if trial.state == "lost"]:
        listener.note(
            f"{len(lost)} of {len(ranked)} trials were lost to the machine: the same command tries them again"
        )
    return tuned


def _draw(tuned: Tuned, trials: Trials, name: str) -> None:
    """Write the search down as a page: what was tried, what came of it, and each trial's way there."""
    rows = [
        SearchedTrial(
            name=trial.name,
            settings=trial.settings,
            state=trial.state,
            share=trial.progress,
            best=trial.best,
            points=trials.points(trial.name),
        )
        for trial in tuned.trials
    ]
    write_text(tuned.report, render_search(name, tuned.metric, rows, tuned.set_line))


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


def _fit(
    request: TuneRequest, ranges: Sequence[Range], trials: Trials, together: int, tell: Callable[[str], None]
) -> None:
    """Run all that is to be run; what the trials wrote down themselves says how far each has come."""
    from ray import tune as ray_tune

    from orchestrator.launching.asha import Halving

    known = _written_down(request, ranges, trials)
    for name in known:
        trials.begin(name)
    more = _optuna(request, ranges, trials) if len(known) < request.trials else None

    def trial(chosen: dict[str, Any]) -> None:
        run_trial(request, trials, chosen["trial"], chosen["share"])

    ray_tune.Tuner(
        # A trial's workers take what they need by themselves; Ray Tune wants it to take something.
        ray_tune.with_resources(trial, {"memory": 1}),
        tune_config=ray_tune.TuneConfig(
            num_samples=request.trials * len(SHARES),  # at most
            max_concurrent_trials=together,
            search_alg=Halving(trials, request.trials, more, tell),
        ),
        run_config=ray_tune.RunConfig(name="search", storage_path=str(trials.folder / "ray"), verbose=0),
    ).fit()


def _written_down(request: TuneRequest, ranges: Sequence[Range], trials: Trials) -> list[str]:
    """Names of all trials whose settings are known: all of them, unless Optuna draws one after the other."""
    (trials.folder / "settings").mkdir(exist_ok=True)
    if not request.optuna and len(trials.names()) < request.trials:  # it may have been killed between two of them
        for index, drawn in enumerate(draw(ranges, request.trials, request.seed)):
            trials.keep(f"trial-{index:03d}", drawn)
    return trials.names()


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


def _optuna(request: TuneRequest, ranges: Sequence[Range], trials: Trials) -> Any:
    """Optuna's search, told what earlier trials had at their first rung, as it is told of the others while it runs."""
    from ray.tune.search.optuna import OptunaSearch

    names = trials.names()
    known = {name: found.best for name in names if (found := trials.judged(name, SHARES[0])) and found.best is not None}
    return OptunaSearch(
        space={found.field: _domain(found) for found in ranges},
        metric="value",
        mode="max" if trials.grows else "min",
        points_to_evaluate=[{r.field: _value(r, trials.settings(name)[r.field]) for r in ranges} for name in known],
        evaluated_rewards=list(known.values()),
        seed=request.seed + len(names),  # the same seed would begin with the same settings again
    )


def _value(found: Range, text: str) -> Any:
    """What a range's own text stands for; rounding must not carry it over the edge."""
    if found.kind == "choice":
        return text
    low, high = found.bounds
    return min(max(int(text) if found.kind == "randint" else float(text), low), high)


def run_trial(request: TuneRequest, trials: Trials, name: str, share: float) -> None:
    """Run a trial on to the first evaluation past ``share`` of its length, in the process that Ray Tune gave it."""
    overrides = [*request.overrides, *(f"{field}={value}" for field, value in trials.settings(name).items())]
    overrides += [f"name={name}", f"checkpoint.uri={trials.folder / 'runs'}"]
    trial = RunRequest(
        request.job,
        request.args,
        tuple(overrides),
        address="auto",
        probe=False,
        pause_share=share if share < 1.0 else None,
    )
    try:
        driver.run(trial, _Silent())
    except OWN_FAULT as error:  # a setting that diverges is a result, and no reason to end the search
        trials.end(name, "failed", str(error))
    except OrchestratorError as error:  # workers, a node or a store were lost: that says nothing of the setting
        trials.end(name, "lost", str(error))


class _Silent:
    """Hears of a trial and says nothing: the search tells of its rounds."""

    def planned(self, plan: Plan, folder: str) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def decision(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def begins(self, config: RunConfig) -> None: ...


def _nothing_measured(trials: Trials) -> OrchestratorError:
    """Why there is no result: what the first trial that failed said, or else the first that was lost."""
    said = f"no trial measured metric={trials.metric!r}"
    for name in trials.names():
        if (why := trials.why(name, "failed")) is not None:
            return ConfigError(f"{said}: the first that failed said: {why}")
    for name in trials.names():
        if (why := trials.why(name, "lost")) is not None:
            return WorkerLostError(
                f"{said}: the first that was lost said: {why}\nthe same command tries the lost ones again"
            )
    return ConfigError(f"{said}: the job has no such metric, or no evaluation data")
