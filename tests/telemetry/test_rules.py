"""The alerts: promtool sees each fire and not fire, and each metric they name is one that is exported."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator.launching.monitor import cluster_files
from orchestrator.telemetry.metrics import TABLE
from orchestrator.telemetry.rules import ALERTS, RECORDED

PROMETHEUS = Path(__file__).parents[2] / "cluster" / "prometheus"
SERIES = {name for metric in TABLE for name in metric.series}


def test_the_files_are_what_is_generated() -> None:
    for name, text in cluster_files().items():
        assert (PROMETHEUS.parent / name).read_text() == text, "run: orchestrator dashboards"


@pytest.mark.parametrize("expr", [*RECORDED.values(), *(alert.expr for alert in ALERTS)])
def test_a_rule_asks_for_what_is_exported(expr: str) -> None:
    assert set(re.findall(r"\borchestrator_\w+", expr)) <= SERIES


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for fires in (True, False):
        assert {c["alertname"] for c in cases if bool(c["exp_alerts"]) == fires} == {alert.name for alert in ALERTS}
    recorded = {case["expr"] for test in tests for case in test.get("promql_expr_test", ())}
    assert recorded == set(RECORDED)


@pytest.mark.parametrize(
    "words",
    [("test", "rules", "rules_test.yml"), ("check", "rules", "rules.yml"), ("check", "config", "compose.yml")],
)
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, *words], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
