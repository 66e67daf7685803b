"""Where a worker's time goes, in real steps of two workers: the parts are the wall time, and the right one rises."""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gloo import GlooGroup
from gloo_jobs import Observed, Slow, mlp, new_run, observed_loop, parts_of, toy_config
from orchestrator.config import CheckpointConfig, RunConfig, Stop
from orchestrator.telemetry.hub import Board
from orchestrator.telemetry.metrics import PARTS
from orchestrator.telemetry.records import read

pytestmark = pytest.mark.slow

STEPS = 20
HELD_UP_S = STEPS * Slow.SLEEP_S
RULES = Path(__file__).parents[2] / "cluster" / "prometheus" / "rules.yml"
MEASURED = {"orchestrator_rank_seconds_total", "orchestrator_straggler_ratio"}
ABOUT_RANKS = {"OrchestratorStraggler", "OrchestratorDataSlow"}


def config_of(stage: int = 1) -> RunConfig:
    return toy_config(
        recipe={"stop": Stop(steps=STEPS)},
        layout={"zero_stage": stage},
        checkpoint=CheckpointConfig(interval_steps=10),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_parts_are_the_wall_time(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    root, driver = new_run(tmp_path / "run")
    for parts, wall_s, _ in two.run(observed_loop, config_of(stage), Slow(mlp), root, driver):
        assert set(parts) <= set(PARTS)
        assert {"data_wait", "forward", "backward", "communication", "optimizer", "checkpoint"} <= set(parts)
        assert sum(parts.values()) == pytest.approx(wall_s, rel=1e-6)
    records = read(root / "metrics.jsonl")
    # A record is written a moment after its step's last mark, and on a busy machine a few of these moments are long:
    # what is usual in the run's first half and in its second.
    parts_s = itertools.accumulate(sum(record["parts"].values()) for record in records)
    late = [record["time"] - so_far for record, so_far in zip(records, parts_s, strict=True)]
    drift = statistics.median(late[STEPS // 2 :]) - statistics.median(late[: STEPS // 2])
    assert abs(drift) < 0.05 * (records[-1]["time"] - records[0]["time"]) / 2


@pytest.mark.parametrize(
    ("where", "part", "alerts"),
    [
        ("data", "data_wait", {"OrchestratorStraggler", "OrchestratorDataSlow"}),
        ("loss", "forward", {"OrchestratorStraggler"}),
    ],
)
def test_what_holds_a_rank_up_shows_there_the_other_rank_waits_and_its_alert_fires(
    two: GlooGroup, tmp_path: Path, where: str, part: str, alerts: set[str]
) -> None:
    run = new_run(tmp_path / "run")
    found = two.run(observed_loop, config_of(), Slow(mlp, where=where, rank=1), *run)
    assert found[1].parts[part] >= HELD_UP_S
    waiting, slow = (parts_of(one.usual) for one in found)
    assert slow[part] >= HELD_UP_S
    assert waiting[part] < 0.5 * HELD_UP_S
    assert waiting["communication"] >= 0.8 * HELD_UP_S
    assert waiting["communication"] > slow["communication"] + 0.5 * HELD_UP_S
    assert fired(found, tmp_path) & ABOUT_RANKS == alerts


def test_a_slow_store_shows_in_the_checkpoints_and_its_alert_fires(two: GlooGroup, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    found = two.run(observed_loop, config_of(), Slow(mlp, where="store"), *run)
    for one in found:
        usual = parts_of(one.usual)
        assert min(one.parts["checkpoint"], usual["checkpoint"]) >= 2 * 10 * Slow.SLEEP_S
        assert max(usual["data_wait"], usual["forward"]) < 0.5 * usual["checkpoint"]
    fires = fired(found, tmp_path)
    assert "OrchestratorCheckpointSlow" in fires
    assert "OrchestratorDataSlow" not in fires


def fired(found: list[Observed], folder: Path) -> set[str]:
    """Alerts of ``cluster/`` that fire where what is usual goes on for half an hour, as promtool replays it."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH (Debian: apt-get install prometheus)")
    board = Board(ttl_s=60.0)
    for one in found:
        board.take(one.usual)
    wall_s = max(sum(parts_of(one.usual).values()) for one in found)
    series = [
        {"series": _named(sample), "values": _going_on(metric.type, sample.value, wall_s)}
        for metric in board.collect()
        for sample in metric.samples
        if sample.name in MEASURED
    ]
    names = yaml.safe_load((RULES).read_text())["groups"][1]["rules"]
    asked = [
        {
            "expr": f'count(ALERTS{{alertname="{rule["alert"]}",alertstate="firing"}}) or vector(0)',
            "eval_time": "30m",
            "exp_samples": [{"labels": "{}", "value": 0}],
        }
        for rule in names
    ]
    test = {"interval": "15s", "input_series": series, "promql_expr_test": asked}
    file = folder / "replay.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    # Whatever fires is named as an expectation that failed: none was expected to.
    return set(re.findall(r'expr: "count\(ALERTS\{alertname=\\?"(\w+)', done.stdout + done.stderr))


def _named(sample: Any) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
    return f"{sample.name}{{{labels}}}"


def _going_on(kind: str, value: float, wall_s: float) -> str:
    """Values every 15 s: a gauge stays, a counter rises as fast as it did."""
    return f"{value}x120" if kind == "gauge" else f"0+{15 * value / wall_s}x120"
