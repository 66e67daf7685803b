"""What the driver makes of a run's records, of which the mark of a loss is the one that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.job import load
from orchestrator.launching.failures import lost_mark
from orchestrator.launching.telling import Teller
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.records import JsonLines


def test_with_telemetry_off_the_mark_of_a_loss_goes_when_the_workers_are_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    config = load("jobs.vision:digits", overrides=("telemetry.enabled=false",)).config
    plan: Any = None  # nothing is told of it
    teller = Teller(folder, config, plan, embedded=True)
    _start(folder, 1)
    teller.look()
    lost_mark(folder).touch()
    teller.look()
    assert lost_mark(folder).exists(), "they are still away"
    _start(folder, 2)
    teller.look()
    assert not lost_mark(folder).exists()
    teller.end("finished")


def _start(folder: RunFolder, attempt: int) -> None:
    with JsonLines(folder.attempts) as log:
        log.append({"event": "started", "time": float(attempt), "attempt": attempt, "step": 0, "cause": "worker_lost"})
