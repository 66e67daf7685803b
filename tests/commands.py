"""The real command line in a process of its own, and how it ended."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
