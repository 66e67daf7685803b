"""`export` and `compress` as a user gives them: files that run, a report, and one clear message for what cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import cli

pytestmark = pytest.mark.slow


def give(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["orchestrator", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path / "digits"))


def test_an_exported_file_runs_with_torch_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert give(monkeypatch, "export", str(run), "--to", "torch", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["file"] == str(run / "exported" / "digits-torch.pt2")
    assert entry["difference"] < 1e-6
    answer = torch.export.load(entry["file"]).module()(torch.zeros(3, 1, 8, 8))
    assert answer.shape == (3, 10)


def test_a_report_is_written_and_the_budget_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'orchestrator[edge]'")
    ways = ["--to", "torch", "--to", "onnx-int8"]
    assert give(monkeypatch, "compress", str(run), *ways, "--min-accuracy", "0.9", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in found["entries"]] == ["torch", "onnx-int8"]
    assert found["best"]["path"] == "onnx-int8"
    assert found["quality"] == "accuracy"
    written = json.loads((run / "compressed" / "report.json").read_text())
    assert written == {name: found[name] for name in ("quality", "best", "entries")}
    assert give(monkeypatch, "compress", str(run), "--to", "torch", "--max-size", "10") == 1
    assert "nothing keeps the budget: loosen one of its limits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "RUN", "--to", "onxx"], "error: 'onxx' is no way to write a model; did you mean 'onnx'? valid: "),
        (["export", "/nowhere"], "error: no run at '/nowhere'; "),
        (
            ["export", "RUN", "--to", "tensorrt"],
            "error: tensorrt builds for the GPU of its own machine, and here is no ",
        ),
        (["export", "RUN", "--to", "onnx-int8", "--calibrate", "0"], "error: int8 needs samples to calibrate on"),
        (["compress", "RUN", "--max-size", "0"], "error: max_size_bytes=0: give a number above 0"),
        (["compress", "RUN", "--prune", "1.5"], "error: sparsity=1.5: should lie between 0 and 1"),
        (["compress", "RUN", "--prune", "0.5", "--pattern", "rings"], "should be 'global', '2:4' or 'channels'"),
        (["compress", "RUN", "--student", "widht=8"], "unknown --arg 'widht'; did you mean 'width'?"),
        (
            ["compress", "s3://bucket/runs/digits"],
            "error: s3://bucket/runs/digits: compress keeps what it makes beside",
        ),
        (
            ["compress", "RUN", "--prune", "0.8", "--pattern", "2:4"],
            "error: sparsity=0.8: 2:4 takes half of the weights",
        ),
        (["compress", "RUN", "--student", "width"], "--arg width=''"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_answered_once(
    digits_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    before = sorted(digits_run.parent.iterdir())
    arguments = [str(digits_run) if argument == "RUN" else argument for argument in arguments]
    assert give(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert sorted(digits_run.parent.iterdir()) == before
