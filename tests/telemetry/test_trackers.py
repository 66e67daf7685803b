"""Trackers: real ones where they are installed, and none of them holds a run up."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.telemetry.trackers import Tracking, make_trackers, require_trackers

CONFIG = {"name": "digits", "seed": 0}
STEPS = [
    {"step": n, "time": 1e9 + n, "loss": None if n == 2 else 1 / n, "learning_rate": 0.1, "workers": 2, "parts": {}}
    for n in (1, 2, 3)
]
EVALUATION = {"step": 3, "time": 1e9 + 3, "metrics": {"accuracy": 0.5, "broken": None}}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.telemetry.trackers.FAREWELL_S", 300.0)


def track(*names: str, folder: Path, state: str = "finished") -> None:
    tracking = Tracking(lambda: make_trackers(names, run="digits", folder=folder, config=CONFIG))
    for record in STEPS:
        tracking.step(record)
    tracking.evaluation(EVALUATION)
    tracking.close(state)
    assert tracking.trouble() == []


def test_tensorboard_has_every_finite_scalar(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    track("tensorboard", folder=tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(v.tag, event.step, round(v.simple_value, 6), event.wall_time) for v in event.summary.value]
        data = data[16 + length :]
    losses = [(step, value, time) for tag, step, value, time in found if tag == "train/loss"]
    assert losses == [(1, 1.0, 1e9 + 1), (3, pytest.approx(1 / 3, abs=1e-6), 1e9 + 3)]
    assert ("evaluation/accuracy", 3, 0.5, 1e9 + 3) in found
    assert {tag for tag, *_ in found} == {"train/loss", "train/learning_rate", "evaluation/accuracy"}


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy", reason="a local MLflow store needs sqlalchemy")
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install 'orchestrator[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    track("mlflow", folder=tmp_path, state="stopped")
    track("mlflow", folder=tmp_path)
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.metrics["train/loss"] == pytest.approx(1 / 3)
    assert run.data.metrics["evaluation/accuracy"] == 0.5


def test_wandb_writes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'orchestrator[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", folder=tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-digits.wandb"))


@pytest.mark.parametrize(("name", "wanted"), [("mlflow", "'orchestrator[mlflow]'"), ("tensorboard", "tensorboardX")])
def test_a_tracker_that_is_not_installed_is_refused(name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=re.escape(f"pip install {wanted}")):
        require_trackers([name])


class Recording:
    """A tracker that remembers, and fails or waits if told to."""

    def __init__(self, fail_at: int = 0, wait: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.state = ""
        self._fail_at, self._wait = fail_at, wait

    def log(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        if self._wait is not None:
            self._wait.wait(60)
        if step == self._fail_at:
            raise ConnectionError("its server is away")
        self.steps.append(step)

    def close(self, state: str) -> None:
        self.state = state


def test_one_that_fails_is_left_out_and_the_others_go_on() -> None:
    failing, sound = Recording(fail_at=2), Recording()
    tracking = Tracking(lambda: [failing, sound])
    for record in STEPS:
        tracking.step(record)
    tracking.close("failed")
    assert (failing.steps, failing.state) == ([1], "")
    assert (sound.steps, sound.state) == ([1, 2, 3], "failed")
    assert tracking.trouble() == ["a tracker failed and is left out from here on: ConnectionError: its server is away"]
    assert tracking.trouble() == [], "said once"


def test_one_that_cannot_be_made_costs_nothing() -> None:
    def make() -> list[Any]:
        raise ConnectionError("its server is away")

    tracking = Tracking(make)
    tracking.step(STEPS[0])
    tracking.close("finished")
    assert len(tracking.trouble()) == 1


def test_one_that_hangs_holds_nobody_up() -> None:
    hang = threading.Event()
    slow = Recording(wait=hang)
    tracking = Tracking(lambda: [slow])
    for record in STEPS * 1000:
        tracking.step(record)
    assert slow.steps == []
    hang.set()
    tracking.close("finished")
    assert len(slow.steps) == 3000
