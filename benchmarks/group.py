"""Runs one after the other in one group of workers, and what they wrote down; what several benchmarks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def train(runs: Sequence[dict[str, Any]], description: Path, *options: str, workers: int = 2) -> None:
    """Train all ``runs``, which ``without_ray`` describes, in one group; ends the program where that fails.

    The file ``description`` is written to say what is to be done; ``options`` are passed on.
    """
    description.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += ["--module", "benchmarks.without_ray", f"--runs={description}", *options]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode} from {' '.join(command)}\n" + "\n".join(done.stderr.splitlines()[-20:]))


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a table that a run wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
