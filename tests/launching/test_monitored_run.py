"""A real Prometheus scrapes a real run of two workers whose hub and whose worker are killed on the way."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import TIMEOUT_S, environment, wait_for_end, workers_of
from ports import free_port

from orchestrator.telemetry.accounting import account
from orchestrator.telemetry.dashboards import DASHBOARDS, expressions
from orchestrator.telemetry.metrics import PARTS, TABLE
from orchestrator.telemetry.observing import SPEED_MEMORY_S
from orchestrator.telemetry.progress import Estimator
from orchestrator.telemetry.records import read
from orchestrator.telemetry.rules import ALERTS, RECORDED

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on PATH (Debian: apt-get install it)"),
]

TTL_S = 3.0
INTERVAL = 60
TOKENS, PEAK = 64, 1e11
OPTIONS = {
    "recipe.stop.epochs": 200,
    "policy.name": "goodput",
    "health.rates": True,
    "checkpoint.interval_steps": INTERVAL,
    "telemetry.ttl_s": TTL_S,
    "telemetry.progress_interval_s": 1000,
    "telemetry.trackers": "tensorboard",
    "telemetry.tokens_per_sample": TOKENS,
    "telemetry.peak_flops_per_s": PEAK,
}
RECORDED_AS = {
    "loss": "loss",
    "gradient_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "global_batch_samples": "global_batch",
    "micro_batch_samples": "micro_batch",
    "accumulation_micro_batches": "accumulation",
    "workers": "workers",
    "run_samples": "samples",
    "run_epoch": "epoch",
    "run_progress_samples": "progress",
    "last_step_timestamp_seconds": "time",
    "noise_scale_samples": "noise_scale",
    "noise_scale_low_samples": "noise_scale_low",
}
"""Gauges that are a field of the last step's record."""
Samples = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Monitored:
    """What is left of the run: its folder, and a Prometheus that watched it."""

    folder: Path
    url: str
    said: str
    """Standard output and error."""
    hub_killed_at: float
    workers_gone_at: float
    stopped_at: float

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """The run's own records, by step."""
        return {record["step"]: dict(record) for record in read(self.folder / "metrics.jsonl")}

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return [dict(record) for record in read(self.folder / "attempts.jsonl")]

    @property
    def started(self) -> list[float]:
        """When each attempt started."""
        return [record["time"] for record in self.attempts if record["event"] == "started"]

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
    words = ["up", "--folder", "prometheus", "--port", str(free_port()), "--interval", "1", "--json"]
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
    words += ["--profile", "10:12"]
    for name, value in {**OPTIONS, "telemetry.port": free_port()}.items():
        words += ["--set", f"{name}={value}"]
    folder = place / "runs" / "digits"
    process = subprocess.Popen(words, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: has_lived(folder), process)
        found = Monitored(folder, url, "", 0.0, 0.0, 0.0)
        until(lambda: since(found, 'orchestrator_rank_seconds_total{part="forward",rank="0"}', 0.0) > 4, process)
        hub = process_named(process, "HubActor")
        hub.kill()
        hub_killed_at = time.time()
        until(lambda: since(found, "orchestrator_run_step", hub_killed_at + 3) > 2, process)
        until(lambda: 5 < read(folder / "metrics.jsonl")[-1]["step"] % INTERVAL < INTERVAL - 15, process)
        workers = workers_of(process)
        workers[-1].send_signal(signal.SIGKILL)
        wait_for_end(workers, TIMEOUT_S)  # Ray ends the other, which tells the hub of itself until then
        workers_gone_at = time.time()
        until(lambda: len(found.started) > 1, process)
        for told in ("orchestrator_run_step", 'orchestrator_rank_step_seconds{rank="1"}'):
            until(lambda: since(found, told, found.started[1]) > 6, process)  # noqa: B023 - called at once
        # Recorded every 15 s: the last rule to have something is a rate over the second attempt too.
        until(lambda: all(found.scraped(name) for name in RECORDED), process)
        stopped_at = time.time()
        process.terminate()  # it saves, and has been watched for long enough
        out, _ = process.communicate(timeout=TIMEOUT_S)
        assert "run the same command again" in out, out
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=TIMEOUT_S)
    return Monitored(folder, url, out, hub_killed_at, workers_gone_at, stopped_at)


def has_lived(folder: Path) -> bool:
    """Whether there has been an evaluation, a change of the batch, and a checkpoint to go on from."""
    decided = [r for r in read(folder / "decisions.jsonl") if r["event"] == "decided" and r["kind"] == "grow"]
    checkpoints = list(folder.glob("checkpoints/step-*/manifest.json"))
    return bool(decided and checkpoints and read(folder / "evaluations.jsonl"))


def since(found: Monitored, selector: str, moment: float) -> int:
    return sum(time > moment for samples in found.scraped(selector).values() for time, _ in samples)


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def process_named(process: subprocess.Popen[str], name: str) -> psutil.Process:
    for member in reversed(psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # another has just ended
            if name in " ".join(member.cmdline()):
                return member
    raise AssertionError(name)


def test_every_metric_of_the_table_is_there(monitored: Monitored) -> None:
    names = set(monitored.ask("label/__name__/values"))
    of_a_run = [metric for metric in TABLE if metric.source != "fleet"]  # those of a fleet: test_fleet_run.py
    assert {name for metric in of_a_run for name in metric.series} <= names


def test_samples_are_exact(monitored: Monitored) -> None:
    """What was scraped is what was recorded: before the kill, and from the next attempt on, with what was repeated."""
    scraped = monitored.only("orchestrator_run_samples")
    counted = monitored.only("orchestrator_samples_total")
    repeated = monitored.only("orchestrator_repeated_samples_total")
    again = sum(record.get("repeated_samples", 0) for record in monitored.attempts)
    assert again > 0
    assert {value for _, value in repeated} == {0.0, again}
    first, more = dict(counted), dict(repeated)
    assert len(scraped) > 10
    for moment, cursor in scraped:
        assert first[moment] == cursor + more[moment]


def second_attempt(monitored: Monitored, name: str, labels: str = "") -> dict[float, float]:
    """What was scraped of the second attempt while it trained, by moment; a scrape's values are of one snapshot."""
    begin, end = monitored.started[1], monitored.stopped_at
    moments = {moment for moment, _ in monitored.only("orchestrator_run_step") if begin < moment < end}
    known = monitored.only(f"orchestrator_{name}{labels}")
    return {moment: value for moment, value in known if moment in moments}


def test_what_is_scraped_is_the_last_steps_record(monitored: Monitored) -> None:
    records, steps = monitored.steps, second_attempt(monitored, "run_step")
    assert len(steps) > 4
    for name, field in RECORDED_AS.items():
        for moment, value in second_attempt(monitored, name).items():
            assert value == records[int(steps[moment])][field], name
    kept = {value for record in read(monitored.folder / "evaluations.jsonl") for value in record["metrics"].values()}
    for samples in monitored.scraped("orchestrator_evaluation").values():
        assert samples[-1][1] in kept


def test_counters_and_times_are_the_sum_of_the_records(monitored: Monitored) -> None:
    """Between any scrape of the second attempt and its first one."""
    records, steps = monitored.steps, second_attempt(monitored, "run_step")
    begin = min(steps)
    counters = {name: second_attempt(monitored, f"{name}_total") for name in ("steps", "samples", "tokens")}
    parts = {p: second_attempt(monitored, "step_part_seconds_sum", f'{{part="{p}"}}') for p in PARTS}
    for moment, step in steps.items():
        between = [records[n] for n in range(int(steps[begin]) + 1, int(step) + 1)]
        samples = sum(record["global_batch"] for record in between)
        rose = {name: values[moment] - values[begin] for name, values in counters.items()}
        assert rose == {"steps": len(between), "samples": samples, "tokens": TOKENS * samples}
        for part, values in parts.items():
            recorded = sum(record["parts"].get(part, 0.0) for record in between)
            assert values[moment] - values[begin] == pytest.approx(recorded, rel=0.02, abs=1e-3)


def test_speed_and_flops_follow_from_the_records(monitored: Monitored) -> None:
    steps, speeds = second_attempt(monitored, "run_step"), second_attempt(monitored, "samples_per_second")
    estimator, expected = Estimator(SPEED_MEMORY_S), dict[int, float | None]()
    for record in monitored.steps.values():
        if record["attempt"] == 2:
            estimator = estimator.after(record)
            expected[record["step"]] = estimator.samples_per_s
    for moment, speed in speeds.items():
        assert speed == pytest.approx(expected[int(steps[moment])])
    flops = json.loads((monitored.folder / "plan.json").read_text())["flops_per_sample"]
    for moment, value in second_attempt(monitored, "model_flops_per_second").items():
        assert value == pytest.approx(flops * speeds[moment] / 2), "what the planner traced"
    for moment, value in second_attempt(monitored, "mfu_ratio").items():
        assert value == pytest.approx(flops * speeds[moment] / 2 / PEAK)


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
    assert any(monitored.hub_killed_at < moment < monitored.workers_gone_at for moment in moments)
    starts = {value for _, value in monitored.only("orchestrator_hub_start_timestamp_seconds")}
    assert len(starts) == 2, "the hub was started again"
    restarted_at = max(starts)
    answers = [one for samples in monitored.scraped('up{job="orchestrator"}').values() for one in samples]
    assert not any(up for moment, up in answers if monitored.hub_killed_at < moment < restarted_at)
    before, after = max(m for m in moments if m < monitored.hub_killed_at), min(m for m in moments if m > restarted_at)
    steps = dict(monitored.only("orchestrator_run_step"))
    assert steps[after] > steps[before], "it trained on"
    assert len(monitored.started) == 2, "it cost no attempt; the worker did"


def test_a_killed_rank_disappears_and_comes_back_and_its_loss_is_counted(monitored: Monitored) -> None:
    moments = [moment for moment, _ in monitored.only('orchestrator_rank_step_seconds{rank="1"}')]
    back = monitored.started[1]
    away = [m for m in moments if monitored.workers_gone_at + TTL_S + 1 < m < back - 1]
    assert not away
    assert any(moment > back for moment in moments)
    assert monitored.only('orchestrator_restarts_total{cause="worker_lost"}')[-1][1] == 1
    restarting = monitored.only('orchestrator_run_state{state="restarting"}')
    assert any(value == 1 for _, value in restarting)


def test_the_parts_are_the_wall_time(monitored: Monitored) -> None:
    for attempt in (1, 2):
        records = [record for record in monitored.steps.values() if record["attempt"] == attempt]
        parts_s = itertools.accumulate(sum(record["parts"].values()) for record in records)
        known = [(record["time"], so_far) for record, so_far in zip(records, parts_s, strict=True)]
        for one, other in itertools.pairwise(known[n : n + 50] for n in range(0, len(known) - 49, 50)):
            assert drift(one, other) < 0.02 * (other[-1][0] - one[0][0]) / 2
    for rank in "01":  # by the clock of Prometheus; a scrape shows a snapshot that is up to a second old, at both ends
        by_time: dict[float, float] = {}
        for samples in monitored.scraped(f'orchestrator_rank_seconds_total{{rank="{rank}"}}').values():
            for moment, value in samples:
                by_time[moment] = by_time.get(moment, 0.0) + value
        inside = sorted(moment for moment in by_time if moment > monitored.started[1])[1:]
        known, half = [(moment, by_time[moment]) for moment in inside], len(inside) // 2
        assert drift(known[:half], known[half:]) < max(0.02 * (inside[-1] - inside[0]), 1.5)


def drift(one: Samples, other: Samples) -> float:
    """By how much what was counted falls behind the time between two stretches, as is usual in each.

    What is written down at a moment was counted up to a moment before, and on a busy machine some of these are long.
    """
    return abs(statistics.median(t - value for t, value in other) - statistics.median(t - value for t, value in one))


def test_goodput_and_lost_time_are_those_of_the_records(monitored: Monitored) -> None:
    """Of a moment up to two seconds before the scrape: that old the driver's word may be."""
    ratios = [(m, value) for m, value in monitored.only("orchestrator_goodput_ratio") if m < monitored.stopped_at]
    scraped, ratio = ratios[-1]
    lost = {
        dict(labels)["cause"]: dict(samples)[scraped]
        for labels, samples in monitored.scraped("orchestrator_lost_seconds_total").items()
    }
    told = [_told(monitored, scraped - tenths / 10) for tenths in range(25)]
    assert any(ratio == pytest.approx(expected, rel=0.02) for expected, _ in told)
    assert lost["worker_lost"] > 1
    assert any(sum(lost.values()) == pytest.approx(sum(by.values()), rel=0.02) for _, by in told)
    # What the driver saw of steps that are gone from the records, their evaluations say, lies in the gap there.
    for cause in ("startup", "repeated"):
        assert any(lost[cause] == pytest.approx(by[cause], rel=0.02) for _, by in told if cause in by), cause
    oldest = told[-1][1]
    assert all(lost[cause] >= 0.98 * seconds for cause, seconds in oldest.items() if cause in ("evaluation", "other"))


def _told(monitored: Monitored, moment: float) -> tuple[float | None, Mapping[str, float]]:
    """Goodput ratio and lost time at ``moment``, from the run's own records."""
    known = account(
        [record for record in monitored.attempts if record["time"] <= moment],
        [record for record in monitored.steps.values() if record["time"] <= moment],
    )
    return known.goodput_ratio(moment), known.lost_s


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_every_panel_shows_something(monitored: Monitored, dashboard: Any) -> None:
    end = monitored.only("orchestrator_run_step")[-1][0]
    for query in expressions(dashboard):
        if "orchestrator_fleet_" in query:
            continue  # of runs in a queue, and this one is in none: test_monitor.py asks them
        filled = query.replace("$run", "digits").replace("$rank", ".+").replace("$__rate_interval", "20s")
        found = monitored.ask("query_range", query=filled, start=end - 300, end=end, step=5)["result"]
        assert found, query


def test_rules_are_evaluated(monitored: Monitored) -> None:
    groups = monitored.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert all(rule["health"] == "ok" for rule in rules), [r for r in rules if r["health"] != "ok"]
    for name in RECORDED:
        assert monitored.scraped(name), name
    asked = {one for alert in ALERTS for one in re.findall(r"\borchestrator_\w+(?:\{[^}]*\})?", alert.expr)}
    assert len(asked) > 15
    for selector in asked - {"orchestrator_fleet_devices"}:  # this run is in no queue
        assert monitored.scraped(selector), f"an alert asks for {selector}"
    assert monitored.scraped('up{job="orchestrator"}')


def test_the_hub_took_its_address_back(monitored: Monitored) -> None:
    assert list((monitored.folder.parents[1] / "targets").glob("*.json")) == []


def test_a_trace_and_a_trackers_files_lie_in_the_runs_folder(monitored: Monitored) -> None:
    (trace,) = (monitored.folder / "traces").iterdir()
    assert trace.name == "steps-10-12-rank-0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::conv2d" in names
    (events,) = (monitored.folder / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") >= len(monitored.steps)


def test_the_terminal_and_the_report_tell_the_same(monitored: Monitored) -> None:
    said = monitored.said
    assert re.search(r"^metrics at http://127\.0\.0\.1:\d+/metrics$", said, re.MULTILINE)
    assert len(re.findall(r"^step [\d,]+  ", said, re.MULTILINE)) == 2, "the first and the last: a line every 1000 s"
    again = r"^workers were lost and replaced; going on from step \d+ \(worker lost; [\d,]+ samples are taken again\)$"
    assert re.search(again, said, re.MULTILINE)
    assert re.search(r"^  time +\w+ \d+ %  ", said, re.MULTILINE)
    assert re.search(r"^  goodput +\d+ % of the wall time; lost: ", said, re.MULTILINE)
    assert re.search(r"^  restarts +1 worker lost$", said, re.MULTILINE)
    report = (monitored.folder / "report.html").read_text()
    for words in ("Where the time went", "lost: worker lost", "Decisions", "its workers ended without a word"):
        assert words in report
