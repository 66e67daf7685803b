"""The command: what it passes on, what it prints and how it exits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.launching.doctor import examination
from orchestrator.launching.doctor.finding import Finding

HEALTHY = Finding("python", "ok", "3.12.1")
OLD_RAY = Finding("package.ray", "problem", "2.59.1", "pip install 'ray[train]'")
Doctor = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run the command on a machine with these findings: exit code, output and what was examined."""

    def command(*words: str, findings: Sequence[Finding]) -> tuple[int, str, dict[str, Any]]:
        asked: dict[str, Any] = {}
        monkeypatch.setattr(examination, "examine", lambda **what: asked.update(what) or findings)
        monkeypatch.setattr(sys, "argv", ["orchestrator", "doctor", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out, asked

    return command


def test_without_words_the_defaults_are_the_examination_s(doctor: Doctor) -> None:
    code, out, asked = doctor(findings=[HEALTHY])
    assert code == 0
    assert out.splitlines()[1].split() == ["python", "ok", "3.12.1"]
    assert asked == {"folder": None, "address": None, "config": None}


def test_a_problem_is_shown_with_its_remedy_word_for_word_and_exits_with_1(doctor: Doctor) -> None:
    code, out, _ = doctor(findings=[HEALTHY, OLD_RAY])
    assert code == 1
    assert "pip install 'ray[train]'" in out


def test_json_is_the_findings(doctor: Doctor) -> None:
    _, out, _ = doctor("--json", "--folder", "s3://bucket/runs", findings=[OLD_RAY])
    assert json.loads(out) == [vars(OLD_RAY)]


def test_the_folder_is_passed_as_it_was_written(doctor: Doctor) -> None:
    assert doctor("--folder", "s3://bucket/runs", findings=[])[2]["folder"] == "s3://bucket/runs"


def test_a_job_is_loaded_for_its_config(doctor: Doctor) -> None:
    assert doctor("jobs.vision:digits", findings=[])[2]["config"].name == "digits"


def test_a_job_that_does_not_exist_is_refused(refuse: Callable[..., str]) -> None:
    assert "jobs.nowhere" in refuse("doctor", "jobs.nowhere:digits")
