"""`tune`: what is refused before anything starts, and a small search on a real cluster that is killed and goes on."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import TIMEOUT_S, end_family, environment, in_this_process, losses, records

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
from orchestrator.launching.halving import WORST, Halving, Settings, result_of
from orchestrator.launching.preflight import RunRequest
from orchestrator.launching.trials import Trial, Trials
from orchestrator.launching.tuning import Tuned, TuneRequest, _together
from orchestrator.planning.cluster import ClusterShape
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


def trials_in(folder: Path, metric: str = "loss", *, grows: bool = False) -> Trials:
    (folder / "settings").mkdir(exist_ok=True)
    return Trials(folder, metric, grows)


def has_run(trials: Trials, name: str, losses: Sequence[float], *, of: int = 16, state: str = "stopped") -> None:
    """Leave the records of a trial that was evaluated after each of ``of`` equal parts, as far as there are losses."""
    run = trials.run(name)
    run.root.mkdir(parents=True, exist_ok=True)
    write_json(run.plan, {"length": 10.0 * of})
    records = [{"step": n, "progress": 10.0 * n, "metrics": {"loss": loss}} for n, loss in enumerate(losses, start=1)]
    run.evaluations.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(run.summary, {"state": state})


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
    """A trial that was lost to the machine is due again when the search is given again, and then it counts."""

    made, trials, name = request(), trials_in(tmp_path), "trial-000"
    trials.keep(name, {"seed": 3})
    reported: list[dict[str, Any]] = []

    def ends(*_: object) -> None:
        raise error

    def finishes(*_: object) -> None:
        has_run(trials, name, [0.5], of=1, state="finished")

    monkeypatch.setattr(tuning.driver, "run", ends)
    tuning.run_trial(made, trials, name, reported.append)
    assert [trial.state for trial in trials.ranked()] == [state]
    assert trials.is_done(name) is (state == "failed")
    assert [(result["parts"], result["value"]) for result in reported] == [(1.0, WORST)]
    said = tuning._nothing_measured(trials)
    assert type(said) is (ConfigError if state == "failed" else WorkerLostError)
    assert str(error) in str(said)
    if state == "lost":
        monkeypatch.setattr(tuning.driver, "run", finishes)
        tuning.run_trial(made, trials, name, reported.append)
        (trial,) = trials.ranked()
        assert (trial.state, trial.best) == ("finished", 0.5)
        assert [(result["parts"], result["value"]) for result in reported[1:]] == [(16.0, 0.5)]


def test_settings_that_a_crash_kept_from_being_written_are_drawn_again(tmp_path: Path) -> None:
    made, trials = request(), trials_in(tmp_path)
    names = tuning._written_down(made, ranges_of(made), trials)
    settings = [trials.settings(name) for name in names]
    for name in names[2:]:
        (tmp_path / "settings" / f"{name}.json").unlink()
    assert tuning._written_down(made, ranges_of(made), trials) == names
    assert [trials.settings(name) for name in names] == settings


def test_a_trial_runs_to_where_it_is_judged_and_what_it_had_run_is_only_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trials, name = request(), trials_in(tmp_path), "trial-000"
    trials.keep(name, {"seed": 3})
    has_run(trials, name, [0.9, 0.8])  # an eighth, and then the search was killed
    shares: list[float | None] = []

    def runs(asked: RunRequest, _: object) -> None:
        shares.append(asked.pause_share)
        parts = 4 if asked.pause_share else 16
        has_run(trials, name, [1.0 - n / 20 for n in range(parts)], state="stopped" if parts == 4 else "finished")

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(tuning.driver, "run", runs)
    tuning.run_trial(made, trials, name, reported.append)
    assert shares == [0.25, None]
    assert [result["parts"] for result in reported] == [1.0, 4.0, 16.0]
    assert [result["value"] for result in reported] == pytest.approx([0.9, 0.85, 0.25])
    assert [result["went_on"] for result in reported] == [True, False, False]


def test_one_evaluation_past_two_shares_is_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a trial that is evaluated seldom would have to be the best twice by the same value."""
    trials, reported = trials_in(tmp_path), []  # type: ignore[var-annotated]
    trials.keep("trial-000", {"seed": 3})
    has_run(trials, "trial-000", [0.5, 0.4], of=2, state="finished")
    tuning.run_trial(request(), trials, "trial-000", reported.append)
    assert [(result["parts"], result["value"]) for result in reported] == [(8.0, 0.5), (16.0, 0.4)]


# -- who goes on -------------------------------------------------------------------------------


def judge(halving: Halving, trials: Trials, name: str, share: float) -> str:
    judged = trials.judged(name, share)
    assert judged is not None
    trial = SimpleNamespace(trial_id=f"ray-{name}")
    if name not in halving.seen:  # type: ignore[attr-defined]
        halving.on_trial_add(None, trial)
        halving.seen.add(name)  # type: ignore[attr-defined]
    return halving.on_trial_result(None, trial, result_of(trials, name, judged))


def halving_of(trials: Trials, told: list[str]) -> Halving:
    made = Halving(trials, told.append)
    made.seen = set()  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("grows", [False, True])
def test_the_best_quarter_goes_on_and_the_others_are_left(tmp_path: Path, grows: bool) -> None:
    trials, told = trials_in(tmp_path, grows=grows), []  # type: ignore[var-annotated]
    halving = halving_of(trials, told)
    values = [5.0, 4.0, 6.0, 3.0, 4.5, 2.0]
    for index, value in enumerate(values):
        trials.keep(f"trial-{index:03d}", {"seed": index})
        has_run(trials, f"trial-{index:03d}", [-value if grows else value])
    actions = [judge(halving, trials, f"trial-{index:03d}", 1 / 16) for index in range(len(values))]
    # Against the best quarter of those before: nobody, 5, 4.25, 4.5, 3.75, 4.
    assert actions == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE", "STOP", "CONTINUE"]
    assert [trials.state(f"trial-{index:03d}") for index in (2, 4)] == ["ended early"] * 2
    assert [trials.is_done(f"trial-{index:03d}") for index in range(6)] == [False, False, True, False, True, False]
    sign = "-" if grows else ""
    assert told[:3] == [
        f"trial-000: loss {sign}5 after 6%, goes on",
        f"trial-001: loss {sign}4 after 6%, goes on",
        f"trial-002: loss {sign}6 after 6%, ends here",
    ]


def test_a_search_that_goes_on_holds_new_trials_against_what_is_known(tmp_path: Path) -> None:
    trials, told = trials_in(tmp_path), []  # type: ignore[var-annotated]
    for name, values, state in (
        ("trial-000", [1.0] * 16, "finished"),
        ("trial-001", [2.0], "stopped"),
        ("trial-002", [0.9] * 4, "stopped"),  # it had gone on, and was killed before it was judged again
        ("trial-003", [1.5], "stopped"),
    ):
        trials.keep(name, {"seed": 1})
        has_run(trials, name, values, state=state)
    trials.end("trial-001", "left", "others were better")
    halving = halving_of(trials, told)
    assert judge(halving, trials, "trial-002", 1 / 16) == "CONTINUE"
    assert told == [], "that was decided before"
    assert judge(halving, trials, "trial-002", 1 / 4) == "CONTINUE"
    assert judge(halving, trials, "trial-003", 1 / 16) == "STOP"
    assert told == ["trial-002: loss 0.9 after 25%, goes on", "trial-003: loss 1.5 after 6%, ends here"]
    assert pickle.loads(pickle.dumps(halving))._tell is None


def test_a_trial_that_broke_says_why_and_counts_as_the_worst(tmp_path: Path) -> None:
    trials, told = trials_in(tmp_path), []  # type: ignore[var-annotated]
    halving = halving_of(trials, told)
    for name in ("trial-000", "trial-001"):
        trials.keep(name, {"seed": 1})
        has_run(trials, name, [1.0 if name == "trial-000" else math.nan])
    assert judge(halving, trials, "trial-000", 1 / 16) == "CONTINUE"
    trials.end("trial-001", "failed", "the loss is nan\nat step 3")
    assert judge(halving, trials, "trial-001", 1 / 16) == "STOP"
    assert told[1] == "trial-001: ended: the loss is nan"
    assert trials.state("trial-001") == "failed"
    assert [trial.best for trial in trials.ranked()] == [1.0, None]


def test_trials_that_are_known_come_first_and_a_searcher_hears_only_of_its_own(tmp_path: Path) -> None:
    trials, heard = trials_in(tmp_path), []  # type: ignore[var-annotated]
    trials.keep("trial-000", {"seed": 1})
    draws: Any = SimpleNamespace(
        suggest=lambda _: {"recipe.optimizer.learning_rate": 0.123456789},
        on_trial_complete=lambda *words: heard.append(words),
    )
    settings = Settings(["trial-000"], trials, draws)
    assert [settings.suggest(number) for number in ("a", "b")] == [{"trial": "trial-000"}, {"trial": "trial-001"}]
    assert trials.settings("trial-001") == {"recipe.optimizer.learning_rate": "0.123457"}
    for number in ("a", "b"):
        settings.on_trial_complete(number, {"value": 0.5})
    assert heard == [("b", {"value": 0.5}, False)]
    assert Settings(["trial-000"], trials).suggest("a") == {"trial": "trial-000"}
    assert Settings([], trials).suggest("a") == Settings.FINISHED


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
            has_run(trials, name, [loss], of=1, state="finished")
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
    states = [trial["state"] for trial in trials]
    assert set(states) <= {"finished", "ended early"}
    assert "finished" in states, "the first to be judged has nobody to be held against"
    for trial in trials:
        assert round(trial["progress"], 2) in ((1.0,) if trial["state"] == "finished" else (0.34, 0.67))
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
