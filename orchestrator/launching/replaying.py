"""From a run's folder to a replay of it under another policy."""

from __future__ import annotations

from orchestrator.config import apply_overrides, parse_config
from orchestrator.errors import ConfigError
from orchestrator.scheduling.replay import Replayed, replay
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.report import load_run

__all__ = ["replay_run"]


def replay_run(folder: RunFolder, policy: str, overrides: tuple[str, ...]) -> tuple[Replayed, float]:
    """Replay ``folder``'s records under ``policy``; returns that and the recorded steps' own time in s.

    Raises:
        ConfigError: an override is wrong, or the run has no steps yet.
    """
    run = load_run(folder.root)
    if not run.metrics:
        raise ConfigError(f"{folder.root}: no step was recorded yet: there is nothing to replay")
    config = apply_overrides(parse_config(run.config), [f"policy.name={policy}", *overrides])
    replayed = replay(
        run.metrics,
        config,
        train_samples=run.plan["train_samples"],
        length=run.plan["length"],
        nodes=run.plan.get("nodes", 1),
    )
    return replayed, sum(record["step_time_s"] for record in run.metrics)
