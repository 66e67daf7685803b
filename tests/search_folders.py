"""What a search leaves in its folder, without having run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.launching.trials import Trials
from orchestrator.storage.folder import write_json


def trials_in(folder: Path, metric: str = "loss", *, grows: bool = False) -> Trials:
    (folder / "settings").mkdir(exist_ok=True)
    return Trials(folder, metric, grows)


def has_run(trials: Trials, name: str, losses: Sequence[float], *, of: int = 9, state: str = "stopped") -> None:
    """Leave the records of a trial that was evaluated after each of ``of`` equal parts, as far as there are losses."""
    run = trials.run(name)
    run.root.mkdir(parents=True, exist_ok=True)
    write_json(run.plan, {"length": 10.0 * of})
    records = [{"step": n, "progress": 10.0 * n, "metrics": {"loss": loss}} for n, loss in enumerate(losses, start=1)]
    run.evaluations.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(run.summary, {"state": state})
