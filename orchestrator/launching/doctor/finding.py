"""What the doctor says: findings, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.telemetry.human import printable

__all__ = ["Finding", "Status", "breaks_a_run", "ok", "problem", "rows", "warning"]

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found. ``remedy`` is a command or a setting, and empty where the status is ok."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", detail)


def warning(check: str, detail: str, remedy: str) -> Finding:
    """A run starts, and is slower or more fragile than it need be."""
    return Finding(check, "warning", detail, remedy)


def problem(check: str, detail: str, remedy: str) -> Finding:
    """A run does not start, or fails."""
    return Finding(check, "problem", detail, remedy)


def breaks_a_run(findings: Sequence[Finding]) -> bool:
    """Whether a run would fail, or not start, as things stand: the command's exit code is 1."""
    return any(finding.status == "problem" for finding in findings)


def rows(findings: Sequence[Finding]) -> list[tuple[str, Status, str, str]]:
    """Check, status, detail and remedy of each finding, fit for a terminal."""
    return [(f.check, f.status, printable(f.detail), printable(f.remedy)) for f in findings]
