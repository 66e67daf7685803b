"""What follows from findings."""

from __future__ import annotations

from orchestrator.launching.doctor.finding import Finding, breaks_a_run, rows


def test_only_a_problem_breaks_a_run() -> None:
    assert not breaks_a_run([])
    assert not breaks_a_run([Finding("cpu", "ok", "2"), Finding("open_files", "warning", "1,024", "ulimit -n 65536")])
    assert breaks_a_run([Finding("cpu", "ok", "2"), Finding("storage.runs", "problem", "full", "rm")])


def test_rows_cannot_steer_a_terminal() -> None:
    assert rows([Finding("lock.run", "ok", "run\x1b[2J is owned\nby me")]) == [
        ("lock.run", "ok", "run?[2J is owned?by me", "")
    ]
