"""Where a worker's time goes, in real steps of two workers: the parts are the wall time, and the right one rises."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from gloo import GlooGroup
from gloo_jobs import Slow, mlp, new_run, observed_loop, toy_config
from orchestrator.config import CheckpointConfig, RunConfig, Stop
from orchestrator.telemetry.metrics import PARTS
from orchestrator.telemetry.records import read

pytestmark = pytest.mark.slow

STEPS = 20
HELD_UP_S = STEPS * Slow.SLEEP_S


def config_of(stage: int = 1) -> RunConfig:
    return toy_config(
        recipe={"stop": Stop(steps=STEPS)},
        layout={"zero_stage": stage},
        checkpoint=CheckpointConfig(interval_steps=10),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_parts_are_the_wall_time(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    root, driver = new_run(tmp_path / "run")
    for parts, wall_s in two.run(observed_loop, config_of(stage), Slow(mlp), root, driver):
        assert set(parts) <= set(PARTS)
        assert {"data_wait", "forward", "backward", "communication", "optimizer", "checkpoint"} <= set(parts)
        assert sum(parts.values()) == pytest.approx(wall_s, rel=0.02)
    records = read(root / "metrics.jsonl")
    for before, now in itertools.pairwise(records):
        assert sum(now["parts"].values()) == pytest.approx(now["time"] - before["time"], rel=0.05, abs=2e-3)


@pytest.mark.parametrize(("where", "part"), [("data", "data_wait"), ("loss", "forward")])
def test_what_holds_a_rank_up_shows_there_and_the_other_rank_waits(
    two: GlooGroup, tmp_path: Path, where: str, part: str
) -> None:
    run = new_run(tmp_path / "run")
    (waiting, _), (slow, _) = two.run(observed_loop, config_of(), Slow(mlp, where=where, rank=1), *run)
    assert slow[part] >= HELD_UP_S
    assert waiting[part] < 0.5 * HELD_UP_S
    assert waiting["communication"] >= 0.8 * HELD_UP_S
    assert waiting["communication"] > slow["communication"] + 0.5 * HELD_UP_S


def test_a_slow_store_shows_in_the_checkpoints(two: GlooGroup, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    for parts, _ in two.run(observed_loop, config_of(), Slow(mlp, where="store"), *run):
        assert parts["checkpoint"] >= 2 * 10 * Slow.SLEEP_S
        assert max(parts["data_wait"], parts["forward"]) < 0.5 * parts["checkpoint"]
