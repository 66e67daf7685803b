"""`monitor up` and `down`: what they refuse, and a real Prometheus that comes, stays one, and goes."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ports import free_port

from orchestrator.launching import monitor
from orchestrator.launching.hub import forget_the_dead, targets_folder, write_target
from orchestrator.telemetry.dashboards import DASHBOARDS, Dashboard, expressions, render
from orchestrator.telemetry.hub import Board, serve
from orchestrator.telemetry.meter import Meter, Snapshot
from orchestrator.telemetry.observing import FleetFacts, observe_fleet, observe_parts

Refuse = Callable[..., str]
RAY = Path(tempfile.gettempdir()) / "ray"


def test_down_where_nothing_was_started(refuse: Refuse) -> None:
    assert "nothing to stop" in refuse("monitor", "down", "--folder", "here")


def test_up_without_prometheus_says_how_to_get_it(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "apt-get install prometheus" in refuse("monitor", "up", "--folder", "here")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on PATH")
def test_up_refuses_a_port_that_is_taken(refuse: Refuse) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in refuse("monitor", "up", "--folder", "here", "--port", str(port))


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer to start it."""
    monkeypatch.setattr(monitor, "READY_S", 240.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on PATH")
def test_up_starts_one_prometheus_that_finds_hubs_and_down_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_TARGETS", str(tmp_path / "targets"))
    port = free_port()
    first = monitor.up(tmp_path / "prometheus", port=port)
    try:
        assert monitor.up(tmp_path / "prometheus", port=port, hubs=["127.0.0.1:9"]) == first
        until(lambda: '"127.0.0.1:9"' in asked(f"{first.url}/api/v1/targets"))
        with urllib.request.urlopen(f"{first.url}/api/v1/status/config", timeout=10) as answer:
            config = json.load(answer)["data"]["yaml"]
        assert str(tmp_path / "targets") in config
        with urllib.request.urlopen(f"{first.url}/api/v1/rules", timeout=10) as answer:
            assert len(json.load(answer)["data"]["groups"]) == 2
    finally:
        monitor.down(tmp_path / "prometheus")
    assert not (tmp_path / "targets" / monitor.GIVEN).exists()
    assert not psutil.pid_exists(first.pid) or psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on PATH")
def test_panels_of_a_fleet_and_variables_show_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What test_monitored_run.py cannot ask: its run is in no queue."""
    monkeypatch.setenv("ORCHESTRATOR_TARGETS", str(tmp_path / "targets"))
    board = Board(ttl_s=600)
    told(board)
    port, stop = serve(board, bind="127.0.0.1", port=free_port(), ports=1)
    write_target(tmp_path / "targets" / "hub.json", f"127.0.0.1:{port}")
    watching = monitor.up(tmp_path / "prometheus", port=free_port(), interval_s=1)
    queries = {query for each in DASHBOARDS for query in expressions(each) if "orchestrator_fleet_" in query}
    try:
        assert len(queries) == 9
        for query in queries:
            filled = {"query": query.replace("$__rate_interval", "20s")}
            until(lambda: ask(watching, "query", filled)["result"], query)  # noqa: B023 - called at once
        for each in DASHBOARDS:
            found = {name: ask(watching, f"label/{name}/values", {"match[]": of}) for name, of in variables(each)}
            assert found == {name: {"run": ["a"], "rank": ["0", "1"]}[name] for name in each.variables}
    finally:
        monitor.down(tmp_path / "prometheus")
        stop()


def told(board: Board) -> None:
    """Two ranks of a run and a fleet tell the hub how they are."""
    waiting = FleetFacts((("a", "q", 2, 0.0), ("b", "q", 0, 9.0)), capacity=2, earned=1.8, decisions=3, moves=1)
    for run, source in (("a", "0"), ("a", "1"), ("fleet", "fleet")):
        meter = Meter()
        if run == "fleet":
            observe_fleet(meter, waiting)
        else:
            meter.set("orchestrator_run_step", 7)
            observe_parts(meter, {"forward": 0.1})
        own, gauges = meter.counted(), meter.gauges()
        board.take(Snapshot(run, source, 1, time.time(), own, totals={}, gauges=gauges))


def variables(dashboard: Dashboard) -> list[tuple[str, str]]:
    """Name of each variable that is asked for, and the series whose labels have its values."""
    listed = json.loads(render(dashboard))["templating"]["list"]
    asked_for = [variable["query"]["query"] for variable in listed if variable["type"] == "query"]
    parsed = [re.fullmatch(r"label_values\((.+), (\w+)\)", query) for query in asked_for]
    return [(found[2], found[1].replace("$run", "a")) for found in parsed if found is not None]


def ask(watching: monitor.Monitor, path: str, query: dict[str, str]) -> Any:
    return json.loads(asked(f"{watching.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"))["data"]


def asked(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def until(true: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_hub_elsewhere_is_given_by_its_address(refuse: Refuse) -> None:
    assert refuse("monitor", "up", "--hub", "head") == "--hub head: write it as HOST:PORT, as in head.example:9400"


def test_addresses_of_dead_hubs_of_this_machine_are_taken_back(tmp_path: Path) -> None:
    with socket.socket() as alive:
        alive.bind(("127.0.0.1", 0))
        alive.listen()
        for name, target in {
            "hub-alive": f"127.0.0.1:{alive.getsockname()[1]}",
            "hub-dead": f"127.0.0.1:{free_port()}",
            "hub-elsewhere": "192.0.2.1:9400",
            "given": f"127.0.0.1:{free_port()}",
        }.items():
            write_target(tmp_path / f"{name}.json", target)
        (tmp_path / "hub-strange.json").write_text("no JSON")
        forget_the_dead(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {"hub-alive", "hub-elsewhere", "hub-strange", "given"}


def test_the_dashboards_are_written_where_asked(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "orchestrator", "dashboards", "--output", str(tmp_path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    written = [Path(path).relative_to(tmp_path).as_posix() for path in json.loads(done.stdout)]
    assert written == [monitor.CONFIG, *monitor.cluster_files()]


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "by default"])
def test_the_configuration_looks_where_this_users_hubs_and_ray_leave_their_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    for name in ("ORCHESTRATOR_TARGETS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
        if chosen:
            monkeypatch.setenv(name, str(tmp_path / name))
    targets, ray = (tmp_path / "ORCHESTRATOR_TARGETS", tmp_path / "RAY_TMPDIR") if chosen else (targets_folder(), RAY)
    monitor.write_cluster_files(tmp_path)
    jobs = yaml.safe_load((tmp_path / monitor.CONFIG).read_text())["scrape_configs"]
    files = {job["job_name"]: job["file_sd_configs"][0]["files"] for job in jobs}
    assert files["orchestrator"] == [f"{targets}/*.json"]
    assert files["ray"] == [f"{ray}/prom_metrics_service_discovery.json"]


def test_the_table_is_printed_for_people_and_for_scripts() -> None:
    words = [sys.executable, "-m", "orchestrator", "metrics"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    table = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    assert len(table) > 60
    assert all(f"{metric['name']}{{{', '.join(metric['labels'])}}}" in shown for metric in table)
