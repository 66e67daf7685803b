"""The real command line, in a process of its own or in this one, and how it ended."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
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
