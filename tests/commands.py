"""The real command line, in a process of its own or in this one, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]
DIGITS = "jobs.vision:digits"
FIXED = ("--set", "policy.name=fixed")
TIMEOUT_S = 240


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.out)


def environment(runs: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name == "RAY_AUTH_MODE"}
    return {**kept, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests' / 'launching'}", "HOME": str(runs)}


def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Ended:
    """Give a command from the repository: all of it but the start of Python and its imports."""
    from orchestrator import cli

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["orchestrator", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return Ended(int(ended.value.code or 0), out, err)


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(folder: Path) -> list[float]:
    found = records(folder)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1)), "each step once, in order"
    return [record["loss"] for record in found]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: any(record["step"] >= step for record in records(folder)), process)


def wait_for(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end_family(*processes: subprocess.Popen[Any]) -> None:
    """Kill them and all that they started, at once, as a lost machine would, and wait until that has ended."""
    family = []
    for process in processes:
        if process.poll() is None:
            family += psutil.Process(process.pid).children(recursive=True)
    for member in [*processes, *family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for process in processes:
        process.wait(TIMEOUT_S)
    wait_for_end(family, TIMEOUT_S)


def wait_for_end(family: Iterable[psutil.Process], seconds: float) -> None:
    """A zombie has ended: a container's init may reap none."""
    deadline = time.monotonic() + seconds
    while alive := [member for member in family if _lives(member)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray names its processes after what they run."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended; a zombie is one, to psutil
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found
