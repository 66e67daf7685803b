"""A run's folder: what lies where, writes that are whole or absent, and what is said when it cannot be used."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import RunFolderError
from orchestrator.storage.folder import RunFolder, read_json, write_json, write_text

WRITER = """
import itertools, sys
from pathlib import Path
from orchestrator.storage.folder import write_text
for n in itertools.count():
    write_text(Path(sys.argv[1]), ["a" * 300_000, "b" * 200_000][n % 2])
"""


def test_what_lies_where() -> None:
    folder = RunFolder(Path("/runs/a"))
    names = [name for name in vars(RunFolder) if isinstance(vars(RunFolder)[name], property)]
    assert {name: str(getattr(folder, name).relative_to(folder.root)) for name in names} == {
        "config": "config.json",
        "job": "job.json",
        "plan": "plan.json",
        "metrics": "metrics.jsonl",
        "evaluations": "evaluations.jsonl",
        "decisions": "decisions.jsonl",
        "events": "events.jsonl",
        "attempts": "attempts.jsonl",
        "health": "health.jsonl",
        "failure_log": "failures.jsonl",
        "checkpoints": "checkpoints",
        "summary": "summary.json",
        "report": "report.html",
        "logs": "logs",
        "control": ".control",
        "probe": "probe.json",
        "failures": ".control/failures",
        "outcome": ".control/outcome.json",
        "change": ".control/change.json",
        "stop_request": ".control/stop",
    }


def test_it_is_made_with_all_that_is_in_it_and_leaves_no_probe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    for _ in range(2):  # a second time for a run that goes on
        folder.create()
        found = {str(path.relative_to(folder.root)) for path in folder.root.rglob("*")}
        assert found == {".control", ".control/failures", "checkpoints", "logs"}


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path / "runs" / "a").create()
    assert str(caught.value) == (
        f"cannot write the run's folder: {tmp_path / 'runs' / 'a'}: Not a directory; "
        "choose another with --set checkpoint.uri=FOLDER"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RunFolderError, match=r"Permission denied; choose another with --set checkpoint\.uri=FOLDER"):
        RunFolder(tmp_path / "a").create()
    tmp_path.chmod(stat.S_IRWXU)


def test_a_place_that_does_not_take_files() -> None:
    with pytest.raises(RunFolderError, match=r"^cannot write the run's folder: /proc/a: .*checkpoint\.uri=FOLDER$"):
        RunFolder(Path("/proc/a")).create()


# -- JSON --------------------------------------------------------------------------------------


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"name": "ä", "numbers": [1, 2.5, None], "inner": {"yes": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text() == json.dumps(value, indent=2) + "\n"
    assert read_json(tmp_path / "none.json") is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    for unfit in ({"new": float("nan")}, {"new": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, unfit)
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """While another process writes two long texts in turn."""
    path = tmp_path / "a.txt"
    texts = ["a" * 300_000, "b" * 200_000]
    write_text(path, texts[0])
    last, changes = texts[0], 0
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
        try:
            while changes < 20:
                assert writer.poll() is None
                seen = path.read_text()
                assert seen in texts
                last, changes = seen, changes + (seen != last)
        finally:
            writer.kill()


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b'{"a": 1} and more'])
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as JSON (")
    assert str(caught.value).endswith("); remove it or start anew with --fresh")


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ("1", "int"), ("null", "NoneType")])
def test_json_that_is_no_object(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RunFolderError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path}: holds {kind}, not an object; start anew with --fresh"
