"""The tables of a run's folder survive torn writes, restarts and readers that come early."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import RunError, RunFolderError
from orchestrator.telemetry.records import Follower, JsonLines, read, truncate_after


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def follower(table: Path) -> Iterator[Follower]:
    with Follower(table) as follower:
        yield follower


def poll(path: Path) -> list[dict[str, Any]]:
    with Follower(path) as follower:
        return follower.poll()


def row(step: int, attempt: int = 1) -> dict[str, Any]:
    return {"step": step, "attempt": attempt, "loss": 1.0 / step}


def write(path: Path, *rows: dict[str, Any]) -> None:
    with JsonLines(path) as lines:
        for item in rows:
            lines.append(item)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=5))
def test_what_is_appended_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    write(path, *rows)
    assert read(path) == rows


def test_opens_at_the_first_append_and_again_after_close(table: Path) -> None:
    lines = JsonLines(table)
    assert not table.exists()
    lines.append(row(1))
    assert read(table) == [row(1)]  # visible before close
    lines.close()
    lines.append(row(2))
    lines.close()
    assert read(table) == [row(1), row(2)]


def test_non_finite_numbers_become_null(table: Path) -> None:
    write(table, {"step": 1, "loss": float("nan"), "metrics": {"a": float("inf"), "b": [1.0, float("-inf")]}})
    assert table.read_text() == '{"step": 1, "loss": null, "metrics": {"a": null, "b": [1.0, null]}}\n'


def test_a_torn_line_is_skipped_by_readers_and_cut_by_the_next_writer(table: Path) -> None:
    write(table, row(1))
    with table.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read(table) == [row(1)]
    write(table, row(2))
    assert read(table) == [row(1), row(2)]


@pytest.mark.parametrize("line", ["{oops}", "3", '"text"', "", "\udcff"])
def test_a_corrupt_middle_line_is_named(table: Path, line: str) -> None:
    table.write_bytes(b'{"step": 1}\n' + line.encode(errors="surrogateescape") + b'\n{"step": 3}\n')
    for act in (read, lambda path: truncate_after(path, 1), poll):
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
            act(table)


def test_a_follower_counts_lines_from_the_top_of_the_file(table: Path, follower: Follower) -> None:
    write(table, row(1), row(2))
    follower.poll()
    with table.open("a") as file:
        file.write("oops\n")
    with pytest.raises(RunFolderError, match="line 3 is not"):
        follower.poll()


def test_missing_files_are_empty(table: Path) -> None:
    assert read(table) == []
    assert truncate_after(table, 3) == 0
    assert poll(table) == []
    assert not table.exists()


def test_a_folder_that_cannot_be_written_is_a_run_error(table: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory"):
        JsonLines(table.parent / "gone" / "metrics.jsonl").append(row(1))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(1, 30), unique=True).map(sorted), cut=st.integers(0, 31), torn=st.booleans())
def test_truncation_keeps_exactly_the_steps_up_to_the_cut(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int, torn: bool
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    path.write_text("".join(json.dumps(row(s)) + "\n" for s in steps) + ('{"step"' if torn else ""))
    kept = [row(s) for s in steps if s <= cut]
    assert truncate_after(path, cut) == len(steps) - len(kept)
    assert path.read_text() == "".join(json.dumps(r) + "\n" for r in kept)
    assert list(path.parent.iterdir()) == [path]


def test_truncation_keeps_records_without_a_step(table: Path) -> None:
    write(table, {"event": "started"}, row(5))
    truncate_after(table, 1)
    assert read(table) == [{"event": "started"}]


def test_a_follower_returns_each_record_once(table: Path, follower: Follower) -> None:
    assert follower.poll() == []
    write(table, row(1), row(2))
    assert follower.poll() == [row(1), row(2)]
    assert follower.poll() == []
    write(table, row(3))
    assert follower.poll() == [row(3)]


def test_a_follower_waits_for_the_rest_of_a_line(table: Path, follower: Follower) -> None:
    whole = json.dumps(row(1)) + "\n"
    table.write_text(whole[:9])
    assert follower.poll() == []
    table.write_text(whole)
    assert follower.poll() == [row(1)]


@pytest.mark.parametrize("poll_between", [True, False])
def test_a_follower_goes_on_after_a_restart(table: Path, follower: Follower, poll_between: bool) -> None:
    write(table, *(row(s) for s in range(1, 10)))
    assert len(follower.poll()) == 9
    truncate_after(table, 6)
    if poll_between:
        assert follower.poll() == []
    again = [row(s, attempt=2) for s in range(7, 12)]  # longer than the file that was replaced
    write(table, *again)
    assert follower.poll() == again
    truncate_after(table, 8)
    truncate_after(table, 7)  # two replacements between two polls
    write(table, row(8, attempt=3))
    assert follower.poll() == [row(8, attempt=3)]


def test_a_follower_survives_truncation_in_place_removal_and_close(table: Path, follower: Follower) -> None:
    write(table, row(1), row(2))
    follower.poll()
    os.truncate(table, 0)
    assert follower.poll() == []
    write(table, row(1), row(2, attempt=2))
    assert follower.poll() == [row(2, attempt=2)]
    table.unlink()
    assert follower.poll() == []
    write(table, row(1), row(3))
    follower.close()
    assert follower.poll() == [row(3)]


def test_events_of_one_attempt_and_step_are_told_apart(table: Path) -> None:
    events = [{"attempt": 1, "step": 0, "event": "started"}, {"attempt": 1, "step": 0, "event": "ended"}]
    write(table, *events)
    assert poll(table) == events


def test_failures_at_one_step_are_told_apart(table: Path) -> None:
    failures = [{"step": 40, "time": 1.0, "cause": "worker_lost"}, {"step": 40, "time": 2.0, "cause": "worker_lost"}]
    write(table, *failures)
    assert poll(table) == failures
