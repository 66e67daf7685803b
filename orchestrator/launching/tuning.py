"""What `tune` does: runs of a job with other settings, many at a time, the poor ones ended early, by Ray Tune."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import ClusterError, ConfigError, OrchestratorError, RunFolderError
from orchestrator.job import load
from orchestrator.launching import driver
from orchestrator.launching.cluster import RayCluster, address_of
from orchestrator.launching.preflight import RunRequest, prepare, run_root
from orchestrator.planning.cluster import ClusterShape
from orchestrator.scheduling.search_space import Range, parse_search
from orchestrator.storage.folder import read_json, write_json

__all__ = ["Trial", "TuneRequest", "Tuned", "tune"]

GROWING = ("accuracy", "auc", "recall", "reciprocal", "f1", "precision")
"""Beginnings of metrics that grow as a model gets better."""


@dataclass(frozen=True)
class TuneRequest:
    """What the command line asks for."""

    job: str
    search: tuple[str, ...]
    args: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    trials: int = 12
    metric: str = "loss"
    optuna: bool = False
    address: str | None = None
    seed: int = 0


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
    def set_line(self) -> str:
        """What the best trial was, ready for the command line."""
        return " ".join(f"--set {name}={value}" for name, value in self.trials[0].settings.items())


def tune(request: TuneRequest, listener: driver.Listener) -> Tuned:
    """Try ``request.trials`` settings by asynchronous halving; the same command again goes on after a crash.

    Every trial is a run like any other, in ``<checkpoint.uri>/tune-<name>/runs/<trial>``: its checkpoints let it go on.

    Raises:
        RequestError: the job, the search space, the metric or the cluster does not allow it; nothing was started.
    """
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
    grows = request.metric.startswith(GROWING)
    trials = _trials(folder, request.metric, grows)
    if not trials or trials[0].best is None:
        raise ConfigError(f"no trial measured metric={request.metric!r}: {_why(folder)}")
    return Tuned(folder, request.metric, grows, trials, together)


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
    }


def _same_search(request: TuneRequest, folder: Path) -> None:
    old = read_json(folder / "search.json")
    if old is not None and old != _identity(request):
        raise RunFolderError(
            f"{folder} holds another search ({' '.join(old['search'])}, {old['trials']} trials by {old['metric']}): "
            "give this one another name with --set name=..., or move that folder away"
        )


def _together(config: RunConfig, shape: ClusterShape) -> int:
    """How many runs the cluster holds side by side."""
    workers = config.scale.workers if isinstance(config.scale.workers, int) else config.scale.workers[0]
    each = workers * config.scale.cpus_per_worker
    by_cpu = math.floor(shape.cpus / each)
    found = min(by_cpu, shape.accelerators // workers) if shape.accelerators else by_cpu
    if found < 1:
        raise ClusterError(f"a trial takes {each:g} CPUs and the cluster has {shape.cpus:g}: lower scale.workers")
    return found


def _fit(request: TuneRequest, ranges: Sequence[Range], folder: Path, together: int) -> None:
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    def trial(settings: dict[str, str]) -> None:
        run_trial(request, folder, settings)

    # A trial's workers take what they need by themselves; Ray Tune wants it to take something.
    trainable = ray_tune.with_resources(trial, {"memory": 1})
    state = folder / "search"
    if ray_tune.Tuner.can_restore(str(state)):
        tuner = ray_tune.Tuner.restore(str(state), trainable, resume_unfinished=True, restart_errored=True)
    else:
        mode = "max" if request.metric.startswith(GROWING) else "min"
        tuner = ray_tune.Tuner(
            trainable,
            param_space=_space(request, ranges),
            tune_config=ray_tune.TuneConfig(
                metric="value",
                mode=mode,
                num_samples=1 if not request.optuna else request.trials,
                max_concurrent_trials=together,
                search_alg=_optuna(request.seed) if request.optuna else None,
                scheduler=ASHAScheduler(time_attr="rung", max_t=81, grace_period=9, reduction_factor=3),
            ),
            run_config=ray_tune.RunConfig(name=state.name, storage_path=str(folder), verbose=0),
        )
    tuner.fit()


def _space(request: TuneRequest, ranges: Sequence[Range]) -> dict[str, Any]:
    """Settings drawn beforehand, so that the same search tries the same ones; or, for Optuna, where it may look."""
    from ray import tune as ray_tune

    if not request.optuna:
        source = random.Random(request.seed)
        drawn = [{found.field: found.draw(source) for found in ranges} for _ in range(request.trials)]
        return {"settings": ray_tune.grid_search(drawn)}
    return {"settings": {found.field: _domain(found) for found in ranges}}


def _domain(found: Range) -> Any:
    """A range as Ray Tune, and Optuna through it, has it."""
    from ray import tune as ray_tune

    if found.kind == "choice":
        return ray_tune.choice(list(found.values))
    low, high = found.bounds
    if found.kind == "randint":
        return ray_tune.randint(round(low), round(high) + 1)
    return (ray_tune.loguniform if found.kind == "loguniform" else ray_tune.uniform)(low, high)


def _optuna(seed: int) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=seed)


def run_trial(request: TuneRequest, folder: Path, settings: dict[str, Any]) -> None:
    """Run the job with a trial's settings, in the process that Ray Tune gave it, and report each evaluation."""
    from ray import tune as ray_tune

    name = f"trial-{ray_tune.get_context().get_trial_id().replace('_', '-')}"
    chosen = {
        field: f"{value:.6g}" if isinstance(value, float) else str(value)
        for field, value in settings["settings"].items()
    }
    runs = folder / "runs"
    overrides = [*request.overrides, *(f"{field}={value}" for field, value in chosen.items())]
    overrides += [f"name={name}", f"checkpoint.uri={runs}"]
    (folder / "settings").mkdir(exist_ok=True)
    write_json(folder / "settings" / f"{name}.json", chosen)
    length = 1.0

    class Reporter:
        """Reports a trial's evaluations to Ray Tune, at its progress in 81 parts."""

        def planned(self, plan: Any, _: Path) -> None:
            nonlocal length
            length = float(plan.length or 1.0)

        def evaluation(self, record: Mapping[str, Any]) -> None:
            if request.metric in record["metrics"]:
                part = min(81, max(1, round(81 * record["progress"] / length)))
                ray_tune.report({"value": record["metrics"][request.metric], "rung": part})

        def step(self, record: Mapping[str, Any]) -> None: ...
        def decision(self, record: Mapping[str, Any]) -> None: ...
        def note(self, text: str) -> None: ...

    try:
        driver.run(RunRequest(request.job, request.args, tuple(overrides), address="auto"), Reporter())
    except OrchestratorError as error:  # a setting that diverges is a result, and no reason to end the search
        write_json(folder / "settings" / f"{name}.failed.json", {"error": str(error)})


def _trials(folder: Path, metric: str, grows: bool) -> tuple[Trial, ...]:
    """What the runs wrote down themselves, from best to worst; those that measured nothing last."""
    found = []
    for path in sorted((folder / "settings").glob("trial-*.json")):
        if path.stem.endswith(".failed"):
            continue
        root = folder / "runs" / path.stem
        records = _lines(root / "evaluations.jsonl")
        values = [record["metrics"][metric] for record in records if metric in record["metrics"]]
        plan, summary = read_json(root / "plan.json") or {}, read_json(root / "summary.json") or {}
        progress = records[-1]["progress"] / plan["length"] if records and plan.get("length") else 0.0
        failed = path.with_name(f"{path.stem}.failed.json").exists()
        state = "failed" if failed else str(summary.get("state", "ended early"))
        best = (max if grows else min)(values, default=None)
        found.append(Trial(path.stem, read_json(path) or {}, state, min(progress, 1.0), best))
    sign = -1.0 if grows else 1.0
    return tuple(sorted(found, key=lambda trial: math.inf if trial.best is None else sign * trial.best))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _why(folder: Path) -> str:
    for path in sorted((folder / "settings").glob("*.failed.json")):
        return f"the first that failed said: {(read_json(path) or {}).get('error')}"
    return "the job has no such metric, or no evaluation data"
