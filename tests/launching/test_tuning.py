"""`tune`: what is refused before anything starts, and a small search on a real cluster that is killed and goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import TIMEOUT_S, end_family, environment, in_this_process, losses, records
from search_folders import has_run, trials_in

from orchestrator.config import ScaleConfig
from orchestrator.errors import (
    ClusterError,
    ConfigError,
    NonFiniteLossError,
    OrchestratorError,
    RunFolderError,
    StorageLostError,
    UserCodeError,
    WorkerLostError,
)
from orchestrator.job import load
from orchestrator.launching import tuning
from orchestrator.launching.preflight import RunRequest
from orchestrator.launching.trials import Trial
from orchestrator.launching.tuning import Tuned, TuneRequest, _together
from orchestrator.planning.cluster import ClusterShape
from orchestrator.scheduling.halving import Standing
from orchestrator.scheduling.search_space import Range, parse_search
from orchestrator.storage.folder import write_json

MLP = "jobs.vision:mlp"
RATE = "optimizer.learning_rate=loguniform(1e-5,1e-1)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to search: give --search FIELD=RANGE"),
        (["--search", "optimizer.learning_rate=0.1"], "write it as FIELD=RANGE"),
        (["--search", "recipe.bach=randint(8,64)"], "did you mean 'batch'"),
        (["--search", RATE, "--trials", "1"], "trials=1: give 2 at least"),
        (["--search", RATE, "--metric", "calibration"], "give --mode max where more is better, --mode min where less"),
        (["--search", RATE, "--mode", "up"], "mode='up': use min for a metric that should fall"),
        (["--search", "recipe.batch=randint(16,17)", "--arg", "workers=3"], "no multiple of 3 lies between 16 and 17"),
    ],
    ids=["nothing", "no-range", "unknown-field", "one-trial", "no-direction", "no-mode", "no-batch"],
)
def test_what_is_refused(refuse: Callable[..., str], tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refuse("tune", MLP, *arguments)
    assert not (tmp_path / "runs").exists()


def test_as_many_run_together_as_the_cluster_holds() -> None:
    from jobs.vision import mlp

    config = mlp(workers=2).config
    assert _together(config, ClusterShape(nodes=1, cpus=9)) == 4
    assert _together(config, ClusterShape(nodes=2, cpus=64, accelerators=8, accelerator="H100")) == 4
    on_cpus = config.model_copy(update={"scale": ScaleConfig(workers=2, accelerators_per_worker=0)})
    assert _together(on_cpus, ClusterShape(nodes=2, cpus=64, accelerators=8, accelerator="H100")) == 32
    wide = config.model_copy(update={"scale": ScaleConfig(workers=2, cpus_per_worker=8)})
    with pytest.raises(ClusterError, match=r"scale.workers=2 needs 8 CPU .* has 9 CPUs .*cpus_per_worker"):
        _together(wide, ClusterShape(nodes=1, cpus=9))
    with pytest.raises(ClusterError, match=r"has 64 CPUs and 1 accelerators .*set .*scale.accelerators_per_worker=0$"):
        _together(config, ClusterShape(nodes=1, cpus=64, accelerators=1, accelerator="H100"))


def test_a_search_by_other_means_is_another_search(tmp_path: Path) -> None:
    write_json(tmp_path / "search.json", tuning._identity(request()))
    tuning._same_search(request(), tmp_path)
    tuning._same_search(request(mode="min"), tmp_path)  # what the name says anyway
    for other, said in [
        (request(optuna=True), "optuna: False -> True"),
        (request(mode="max"), "mode: 'min' -> 'max'"),
        (request(5), "trials: 4 -> 5"),
    ]:
        with pytest.raises(RunFolderError, match=said):
            tuning._same_search(other, tmp_path)


def test_the_line_to_set_is_the_best_trials() -> None:
    trials = tuple(Trial(f"t{n}", {"recipe.batch": str(n), "seed": "1"}, "finished", 1.0, float(n)) for n in (3, 5))
    assert Tuned(Path(), "loss", False, trials, 2).set_line == "--set recipe.batch=3 --set seed=1"
    assert Tuned(Path(), "loss", False, trials, 2).halved == ""


def test_a_search_of_the_rate_says_what_to_take_where_the_batch_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = Trial("trial-000", {"recipe.optimizer.learning_rate": "0.05", "seed": "1"}, "finished", 1.0, 0.1)
    monkeypatch.setattr(tuning, "tune", lambda *_: Tuned(Path("there"), "loss", False, (best,), 1))
    said = in_this_process(monkeypatch, capsys, "tune", MLP, "--search", RATE).out.splitlines()
    assert said[-3:] == [
        "--set recipe.optimizer.learning_rate=0.05 --set seed=1",
        "a rate that a search finds lies at the edge of what is stable; where the batch grows take half of it:",
        "--set recipe.optimizer.learning_rate=0.025",
    ]


@pytest.mark.slow
def test_a_range_test_says_what_its_rate_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = in_this_process(monkeypatch, capsys, "tune", MLP, "--range-test", "--arg", f"data={tmp_path}").out
    last, line = said.splitlines()[-2:]
    assert last.startswith("where the loss fell fastest, well below the edge of what is stable")
    rate = line.removeprefix("--set recipe.optimizer.learning_rate=")
    assert 0.001 < float(rate) < 0.02, "a grid's best, the last that is stable, is 0.036 to 0.051"


def request(trials: int = 4, **fields: Any) -> TuneRequest:
    return TuneRequest(job=MLP, search=(RATE, "seed=randint(1,5)"), trials=trials, **fields)


def ranges_of(made: TuneRequest) -> tuple[Range, ...]:
    return parse_search(made.search, load(MLP).config)


def test_settings_are_drawn_once_and_written_down(tmp_path: Path) -> None:
    made, trials = request(), trials_in(tmp_path)
    names = tuning._written_down(made, ranges_of(made), trials)
    assert names == [f"trial-{n:03d}" for n in range(4)]
    settings = [trials.settings(name) for name in names]
    rates = {float(each["recipe.optimizer.learning_rate"]) for each in settings}
    assert len(rates) == 4
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert tuning._written_down(made, ranges_of(made), trials) == names
    assert [trials.settings(name) for name in names] == settings


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NonFiniteLossError("the loss is nan"), "failed"),
        (UserCodeError("ZeroDivisionError"), "failed"),
        (ConfigError("layout.global_batch=33 does not divide"), "failed"),
        (WorkerLostError("rank 1 is gone"), "lost"),
        (StorageLostError("no answer"), "lost"),
        (ClusterError("no such cluster"), "lost"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_only_what_a_trial_did_wrong_itself_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OrchestratorError, state: str
) -> None:
    """A trial that was lost to the machine is due again when the search is given again."""
    made, trials, name = request(), trials_in(tmp_path), "trial-000"
    trials.keep(name, {"seed": 3})

    def ends(*_: object) -> None:
        raise error

    monkeypatch.setattr(tuning.driver, "run", ends)
    tuning.run_trial(made, trials, name, 1.0)
    assert [trial.state for trial in trials.ranked()] == [state]
    assert trials.standing(name) == Standing(name, (math.inf,) if state == "failed" else (), may_go_on=False)
    said = tuning._nothing_measured(trials)
    assert type(said) is (ConfigError if state == "failed" else WorkerLostError)
    assert str(error) in str(said)
    trials.begin(name)
    assert trials.standing(name).may_go_on is (state == "lost")


def test_settings_that_a_crash_kept_from_being_written_are_drawn_again(tmp_path: Path) -> None:
    made, trials = request(), trials_in(tmp_path)
    names = tuning._written_down(made, ranges_of(made), trials)
    settings = [trials.settings(name) for name in names]
    for name in names[2:]:
        (tmp_path / "settings" / f"{name}.json").unlink()
    assert tuning._written_down(made, ranges_of(made), trials) == names
    assert [trials.settings(name) for name in names] == settings


def test_a_trial_runs_to_the_share_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, trials = request(), trials_in(tmp_path)
    trials.keep("trial-000", {"recipe.optimizer.learning_rate": 0.123456789})
    asked: list[RunRequest] = []
    monkeypatch.setattr(tuning.driver, "run", lambda request, _: asked.append(request))
    for share in (1 / 3, 1.0):
        tuning.run_trial(made, trials, "trial-000", share)
    assert [one.pause_share for one in asked] == [1 / 3, None]
    assert asked[0].overrides == (
        "recipe.optimizer.learning_rate=0.123457",
        "name=trial-000",
        f"checkpoint.uri={tmp_path / 'runs'}",
    )


def test_optuna_too_is_offered_only_batches_that_the_workers_can_share() -> None:
    def drawn(text: str, workers: int) -> set[int]:
        (found,) = parse_search([text], load(MLP, [f"workers={workers}"]).config)
        domain = tuning._domain(found)
        return {int(domain.sample()) for _ in range(200)}

    assert drawn("recipe.batch=randint(16,24)", 2) == {16, 18, 20, 22, 24}
    assert drawn("recipe.batch=randint(15,19)", 1) == {15, 16, 17, 18, 19}


def test_optuna_goes_on_from_what_earlier_trials_found(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed: pip install 'orchestrator[search]'")
    made, trials = request(optuna=True), trials_in(tmp_path)
    for number, loss in enumerate((2.0, 0.5, None)):
        name = f"trial-{number:03d}"
        trials.keep(name, {"recipe.optimizer.learning_rate": 10.0**-number, "seed": 3})  # the first lies outside
        if loss is not None:
            has_run(trials, name, [loss, loss / 2])
    drawn = []
    for _ in range(2):
        search = tuning._optuna(made, ranges_of(made), trials)
        assert sorted(trial.value for trial in search._ot_study.trials) == [0.5, 2.0]
        drawn.append([search.suggest(str(number)) for number in range(3)])
    assert drawn[0] == drawn[1]
    for settings in drawn[0]:
        assert 1e-5 <= settings["recipe.optimizer.learning_rate"] <= 1e-1
        assert settings["seed"] in range(1, 6)


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_where_it_was_and_finds_a_rate_that_works(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "orchestrator", "tune", MLP, "--search", RATE, "--trials", "3", "--json"]
    if find_spec("optuna") is not None:
        words.append("--optuna")
    words += ["--metric", "accuracy", "--arg", "workers=1", "--arg", "epochs=3", "--set", "policy.name=fixed"]
    words += ["--set", "evaluation.every_epochs=1"]

    def tune() -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    killed = tune()
    try:
        done = wait_for_a_trial(tmp_path, killed)
    finally:
        end_family(killed)
        killed.communicate()
    before = {root: records(root) for root in done}
    search = tune()
    try:
        out, err = search.communicate(timeout=2 * TIMEOUT_S)
    finally:
        end_family(search)
    assert search.returncode == 0, err
    found = json.loads(out)
    trials = found["trials"]
    assert len(trials) == 3
    ways = sorted((trial["state"], round(trial["progress"], 2)) for trial in trials)
    assert ways == [("ended early", 0.34), ("ended early", 0.34), ("finished", 1.0)]
    best = [trial["best"] for trial in trials]
    assert best == sorted(best, reverse=True)
    assert best[0] > 0.8
    rate = trials[0]["settings"]["recipe.optimizer.learning_rate"]
    assert found["set"] == f"--set recipe.optimizer.learning_rate={rate}"
    title = f"accuracy by {RATE.partition('=')[0]}".replace("optimizer", "recipe.optimizer")
    assert title in Path(found["report"]).read_text()
    for root in Path(found["folder"]).glob("runs/*"):
        assert losses(root), "each step once, in order"
    for root, steps in before.items():  # with the times they took: not one step was taken anew
        assert records(root)[: len(steps)] == steps


def wait_for_a_trial(root: Path, search: subprocess.Popen[str]) -> list[Path]:
    """Wait until a trial has run its first share, and return the folders of those that have by then."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (done := [path.parent for path in root.glob("runs/tune-*/runs/trial-*/summary.json")]):
        assert search.poll() is None, search.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return done
