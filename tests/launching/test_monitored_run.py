"""A real Prometheus scrapes a real run of two workers whose hub and whose worker are killed on the way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import TIMEOUT_S, environment

from orchestrator.telemetry.accounting import account
from orchestrator.telemetry.dashboards import DASHBOARDS, expressions
from orchestrator.telemetry.metrics import TABLE
from orchestrator.telemetry.records import read
from orchestrator.telemetry.rules import RECORDED

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on PATH (Debian: apt-get install it)"),
]

TTL_S = 3.0
OPTIONS = {
    "recipe.stop.epochs": 70,
    "policy.name": "goodput",
    "checkpoint.interval_steps": 60,
    "telemetry.ttl_s": TTL_S,
    "telemetry.tokens_per_sample": 64,
    "telemetry.flops_per_sample": 1e8,
    "telemetry.peak_flops_per_s": 1e11,
}
Samples = list[tuple[float, float]]


@dataclass(frozen=True)
class Monitored:
    """What is left of the run: its folder, and a Prometheus that watched it."""

    folder: Path
    url: str
    err: str
    hub_killed_at: float
    worker_killed_at: float

    def ask(self, path: str, **query: Any) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def scraped(self, selector: str) -> dict[tuple[tuple[str, str], ...], Samples]:
        """Every sample as it was scraped, by labels."""
        result = self.ask("query", query=f"{selector}[30m]")["result"]
        return {tuple(sorted(r["metric"].items())): [(t, float(v)) for t, v in r["values"]] for r in result}

    def only(self, selector: str) -> Samples:
        (samples,) = self.scraped(selector).values()
        return samples


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    place = tmp_path_factory.mktemp("monitored")
    env = {**environment(place), "ORCHESTRATOR_TARGETS": str(place / "targets")}
    monitor = [sys.executable, "-m", "orchestrator", "monitor"]
    words = ["up", "--folder", "prometheus", "--port", str(free_port()), "--json"]
    done = subprocess.run([*monitor, *words], cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    url = json.loads(done.stdout)["url"]
    try:
        yield _run(place, env, url)
    finally:
        words = ["down", "--folder", "prometheus"]
        stopped = subprocess.run([*monitor, *words], cwd=place, env=env, capture_output=True, text=True, check=False)
        assert stopped.returncode == 0, stopped.stderr
        assert "stopped" in stopped.stdout


def _run(place: Path, env: dict[str, str], url: str) -> Monitored:
    words = [sys.executable, "-m", "orchestrator", "run", "jobs.vision:digits", "--arg", "batch=16"]
    for name, value in {**OPTIONS, "telemetry.port": free_port()}.items():
        words += ["--set", f"{name}={value}"]
    folder = place / "runs" / "digits"
    process = subprocess.Popen(words, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: steps(folder) >= 130, process)
        found = Monitored(folder, url, "", 0.0, 0.0)
        until(lambda: since(found, 'orchestrator_rank_seconds_total{part="forward",rank="0"}', 0.0) > 4, process)
        hub_killed_at = time.time()
        process_named(process, "HubActor").send_signal(signal.SIGKILL)
        until(lambda: since(found, "orchestrator_run_step", hub_killed_at + 3) > 1, process)
        worker_killed_at = time.time()
        process_named(process, "RayTrainWorker").send_signal(signal.SIGKILL)
        until(lambda: restarted_at(folder) is not None, process)
        again = restarted_at(folder) or 0.0
        until(lambda: since(found, 'orchestrator_rank_step_seconds{rank="1"}', again) > 4, process)
        process.terminate()  # it saves, and has been watched for long enough
        out, _ = process.communicate(timeout=TIMEOUT_S)
        assert "run the same command again" in out, out
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=TIMEOUT_S)
    return Monitored(folder, url, out, hub_killed_at, worker_killed_at)


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def restarted_at(folder: Path) -> float | None:
    """When the second attempt started."""
    return next((r["time"] for r in read(folder / "attempts.jsonl") if r["attempt"] == 2), None)


def since(found: Monitored, selector: str, moment: float) -> int:
    return sum(time > moment for samples in found.scraped(selector).values() for time, _ in samples)


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def process_named(process: subprocess.Popen[str], name: str) -> psutil.Process:
    family = psutil.Process(process.pid).children(recursive=True)
    return next(member for member in reversed(family) if name in " ".join(member.cmdline()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(int(probe.getsockname()[1]), 65_000)


def test_every_metric_of_the_table_is_there(monitored: Monitored) -> None:
    names = set(monitored.ask("label/__name__/values"))
    assert {name for metric in TABLE for name in metric.series} <= names


def test_samples_are_exact(monitored: Monitored) -> None:
    """What was scraped is what was recorded; a cursor that was lost with an attempt was on its way there."""
    kept = {record["samples"] for record in read(monitored.folder / "metrics.jsonl")}
    started = [r["time"] for r in read(monitored.folder / "attempts.jsonl") if r["event"] == "started"]
    scraped = monitored.only("orchestrator_run_samples")
    seen = [value for moment, value in scraped if moment > started[-1]]
    assert seen
    assert set(seen) <= kept
    counted, repeated = (
        monitored.only("orchestrator_samples_total"),
        monitored.only("orchestrator_repeated_samples_total"),
    )
    again = [r for r in read(monitored.folder / "attempts.jsonl") if r.get("repeated_samples")]
    assert max(value for _, value in repeated) == sum(r["repeated_samples"] for r in again)
    first = dict(counted)
    for moment, cursor in scraped:
        if moment < monitored.worker_killed_at:
            assert first[moment] == cursor, "nothing has been repeated yet"
    # Of the attempt that was killed only the last second had not been told.
    untold = scraped[-1][1] + repeated[-1][1] - counted[-1][1]
    assert 0 <= untold <= sum(r["repeated_samples"] for r in again) + 2_000


def test_counters_never_fall(monitored: Monitored) -> None:
    for metric in TABLE:
        if metric.kind == "gauge" or metric.source == "hub":
            continue
        for series in metric.series:
            for labels, samples in monitored.scraped(series).items():
                values = [value for _, value in samples]
                assert values == sorted(values), labels


def test_the_gap_of_the_killed_hub_is_visible_and_nothing_else(monitored: Monitored) -> None:
    moments = [moment for moment, _ in monitored.only("orchestrator_run_step")]
    assert any(moment < monitored.hub_killed_at for moment in moments)
    assert any(monitored.hub_killed_at < moment < monitored.worker_killed_at for moment in moments)
    starts = {value for _, value in monitored.only("orchestrator_hub_start_timestamp_seconds")}
    assert len(starts) == 2, "the hub was started again"
    attempts = [r["attempt"] for r in read(monitored.folder / "attempts.jsonl") if r["event"] == "started"]
    assert attempts == [1, 2], "it cost no attempt; the worker did"


def test_a_killed_rank_disappears_and_comes_back_and_its_loss_is_counted(monitored: Monitored) -> None:
    moments = [moment for moment, _ in monitored.only('orchestrator_rank_step_seconds{rank="1"}')]
    back = next(r["time"] for r in read(monitored.folder / "attempts.jsonl") if r["attempt"] == 2)
    away = [m for m in moments if monitored.worker_killed_at + TTL_S + 1 < m < back - 1]
    assert not away
    assert any(moment > back for moment in moments)
    assert monitored.only('orchestrator_restarts_total{cause="worker_lost"}')[-1][1] == 1
    restarting = monitored.only('orchestrator_run_state{state="restarting"}')
    assert any(value == 1 for _, value in restarting)


def test_times_are_the_recorded_ones(monitored: Monitored) -> None:
    records = read(monitored.folder / "metrics.jsonl")
    parts = [record["parts"] for record in records]
    assert sum(sum(part.values()) for part in parts[1:120]) == pytest.approx(
        records[119]["time"] - records[0]["time"], rel=0.02
    )
    scraped = monitored.scraped('orchestrator_rank_seconds_total{rank="0"}')
    by_time: dict[float, float] = {}
    for samples in scraped.values():
        for moment, value in samples:
            by_time[moment] = by_time.get(moment, 0.0) + value
    inside = sorted(m for m in by_time if monitored.hub_killed_at - 60 < m < monitored.hub_killed_at)[1:]
    took = inside[-1] - inside[0]
    # A scrape shows the last snapshot, which is up to a second old, at both ends.
    assert by_time[inside[-1]] - by_time[inside[0]] == pytest.approx(took, rel=0.02, abs=1.5)
    last_moment, ratio = monitored.only("orchestrator_goodput_ratio")[-1]
    until_then = [r for r in records if r["time"] <= last_moment]
    known = account([r for r in read(monitored.folder / "attempts.jsonl") if r["time"] <= last_moment], until_then)
    assert ratio == pytest.approx(known.goodput_ratio(last_moment), abs=0.03)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_every_panel_shows_something(monitored: Monitored, dashboard: Any) -> None:
    end = monitored.only("orchestrator_run_step")[-1][0]
    for query in expressions(dashboard):
        filled = query.replace("$run", "digits").replace("$rank", ".+").replace("$__rate_interval", "20s")
        found = monitored.ask("query_range", query=filled, start=end - 300, end=end, step=5)["result"]
        assert found, query


def test_rules_are_evaluated(monitored: Monitored) -> None:
    groups = monitored.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert all(rule["health"] == "ok" for rule in rules), [r for r in rules if r["health"] != "ok"]
    for name in RECORDED:
        assert monitored.scraped(name), name


def test_the_run_says_where_its_metrics_are(monitored: Monitored) -> None:
    assert re.search(r"^metrics at http://127\.0\.0\.1:\d+/metrics$", monitored.err, re.MULTILINE)
