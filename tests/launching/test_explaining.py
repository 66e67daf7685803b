"""Which words a run that failed ends with: those of what ended it, and of nothing before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import UserCodeError, WorkerLostError
from orchestrator.launching.driver import _explain
from orchestrator.launching.failures import Failure, write_failure
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.records import JsonLines

BUG = Failure(rank=1, step=3, kind="user", error="ZeroDivisionError", message="division by zero", frame="", trace="...")


@pytest.fixture
def home(tmp_path: Path) -> Any:
    folder = RunFolder(tmp_path)
    folder.create()
    write_failure(folder, BUG)
    return SimpleNamespace(folder=folder, driver="2", address="runs/x")


def log(home: Any, **record: Any) -> None:
    with JsonLines(home.folder.failure_log) as lines:
        lines.append({"driver": "2", "rank": None, "message": "", **record})


def test_a_bug_is_told_by_the_worker_that_met_it(home: Any) -> None:
    log(home, action="stop", reason="the job's own code raised: it would again", rank=1)
    told = _explain(RuntimeError("Training failed"), home)
    assert isinstance(told, UserCodeError)
    assert str(told).startswith("ZeroDivisionError on rank 1, step 3: division by zero")


def test_what_an_earlier_run_said_is_not_told_again(home: Any) -> None:
    """The bug was mended, and then the workers died at their start: no worker has cleared its words away."""
    log(home, action="stop", reason="the job's own code raised: it would again", rank=1, driver="1")
    log(home, action="restart", reason="workers were lost while they started: restart 3 of 3 without progress")
    log(home, action="stop", reason="workers were lost while they started 4 times", message="Worker exit detail: OOM")
    told = _explain(RuntimeError("Training failed"), home)
    assert isinstance(told, WorkerLostError)
    assert str(told) == (
        "workers were lost while they started 4 times; the last time with: Worker exit detail: OOM\n"
        "run the same command again to go on from the last checkpoint; the logs are in runs/x/logs"
    )


def test_what_ray_gave_up_by_itself_is_said_in_its_words(home: Any) -> None:
    log(home, action="stop", reason="the job's own code raised: it would again", rank=1, driver="1")
    error = RuntimeError("Training failed due to controller error:\nsomething")
    error.controller_failure = ImportError("Traceback\nno module named x")  # type: ignore[attr-defined]
    assert str(_explain(error, home)).startswith("Ray has given the workers up: no module named x\n")
