"""Runs the real command line, in this process for what is refused and in processes of its own for what starts."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import DIGITS, FIXED, TIMEOUT_S, Ended, environment


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The main job at a fixed batch, left alone; once for all processes that run tests."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "undisturbed"
    folder.mkdir(exist_ok=True)
    ended = folder / "ended.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ended.exists():
            words = [sys.executable, "-m", "orchestrator", "run", DIGITS, "--json", *FIXED]
            done = subprocess.run(
                words,
                cwd=folder,
                env=environment(folder),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            ended.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    return Ended(*json.loads(ended.read_text()))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, as the first run writes them."""
    from jobs.vision import write_digits

    folder = tmp_path_factory.mktemp("data")
    write_digits(str(folder / "digits"))
    return folder


@pytest.fixture
def command(data: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``orchestrator run JOB ... --json`` in a folder of the test's own; whatever is left is killed.

    At a fixed batch, unless an option names the policy: what is compared bit for bit must not depend on step times.
    """
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "data").symlink_to(data)

    def start(job: str, *options: str) -> subprocess.Popen[str]:
        policy = () if any("policy." in option for option in options) else FIXED
        words = [sys.executable, "-m", "orchestrator", "run", job, "--json", *options, *policy]
        process = subprocess.Popen(
            words,
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run(command: Callable[..., subprocess.Popen[str]]) -> Callable[..., Ended]:
    """Run a command to its end."""

    def to_end(job: str, *options: str) -> Ended:
        process = command(job, *options)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return Ended(process.returncode, out, err)

    return to_end


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Give a command that must be refused: exit code 2, one message, nothing left behind. Returns the message."""
    from orchestrator import cli

    def refused(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["orchestrator", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2, err
        assert "Traceback" not in out + err
        assert err.startswith("error: "), err
        return err.removeprefix("error: ").strip()

    return refused
