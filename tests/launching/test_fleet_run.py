"""Runs that share a small cluster through the command line: they wait, are paused, go on, are stopped, leave a node."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import TIMEOUT_S, Ended, end_family, environment, losses, records
from ports import free_port

from orchestrator.telemetry.metrics import TABLE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = str(Path(sys.executable).with_name("ray"))
JOB = ("broken_jobs:held_mlp", "--arg", "wait_s=0.2", "--set", "recipe.stop.epochs=60", "--set", "policy.name=fixed")


@dataclass(frozen=True)
class Shared:
    """A cluster of two nodes with a CPU each, both on this machine, and a folder for its runs."""

    address: str
    folder: Path
    nodes: tuple[subprocess.Popen[bytes], ...]

    def command(self, *words: str, name: str) -> subprocess.Popen[str]:
        with (self.folder / f"{name}.err").open("w") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *words, "--address", self.address],
                cwd=self.folder,
                env={**environment(self.folder), "RAY_AUTH_MODE": "disabled"},
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )

    def run(self, name: str, workers: str, *more: str) -> subprocess.Popen[str]:
        """Its steps take so long that it ends by itself only once ``hold`` is gone."""
        (self.folder / "hold").touch()
        place = ("--arg", f"place={self.folder}")
        settings = ("--set", f"name={name}", "--set", f"scale.workers={workers}", "--set", "fleet.policy=fifo", *more)
        return self.command("run", *JOB, *place, *settings, "--queue", "team-a", "--json", name=name)

    def queue(self, *words: str) -> Ended:
        process = self.command("queue", *words, "--json", name="queue")
        out, _ = process.communicate(timeout=TIMEOUT_S)
        return Ended(process.returncode, out, self.said("queue"))

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()

    def steps(self, name: str) -> int:
        return len(records(self.folder / "runs" / name))

    def attempt(self, name: str) -> int:
        """That of the last step which the run has recorded."""
        return max((int(record["attempt"]) for record in records(self.folder / "runs" / name)), default=0)

    def workers(self) -> list[psutil.Process]:
        family = (child for node in self.nodes for child in psutil.Process(node.pid).children(recursive=True))
        found = []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    port = free_port()
    address = f"127.0.0.1:{port}"
    nodes = [start_node(folder, "head", "--head", f"--port={port}", "--include-dashboard=false")]
    try:
        nodes.append(start_node(folder, "other", f"--address={address}"))
        yield Shared(address, folder, tuple(nodes))
    finally:
        end_family(*nodes)


def start_node(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    env = {**environment(folder), "RAY_AUTH_MODE": "disabled"}
    with (folder / f"{name}.log").open("w") as log:
        command = [RAY, "start", "--block", "--num-cpus=1", *words]
        node = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    wait_until(lambda: "Ray runtime started" in (folder / f"{name}.log").read_text())
    return node


def wait_until(ready: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def rows(ended: Ended) -> dict[str, dict[str, Any]]:
    assert ended.code == 0, ended.err
    return {row["name"]: row for row in ended.summary["rows"]}


def test_runs_wait_are_paused_go_on_and_are_stopped(shared: Shared) -> None:
    none = shared.queue()
    assert none.code == 2
    assert "there is no fleet on this cluster: one begins with the first run that names a queue" in none.err

    a = shared.run("a", "2")
    wait_until(lambda: shared.steps("a") > 3)
    b, c = shared.run("b", "1,2"), None
    wait_until(lambda: "waiting in queue team-a: next in turn" in shared.said("b"))
    c = shared.run("c", "1")
    wait_until(lambda: "1 before it (b)" in shared.said("c"))
    assert "running: a" in shared.said("c")
    c.send_signal(signal.SIGTERM)
    stopped = json.loads(c.communicate(timeout=TIMEOUT_S)[0])
    assert c.returncode == 1
    assert (stopped["state"], stopped["step"]) == ("stopped", None)
    assert stopped["reason"] == "stop requested while it waited in its queue"

    before = shared.steps("a")
    shared.queue("pause", "a")
    wait_until(lambda: shared.steps("b") > 3)
    seen = rows(shared.queue("move", "b", "--queue", "team-b", "--priority", "4"))
    assert (seen["a"]["state"], seen["a"]["devices"]) == ("paused", 0)
    assert (seen["b"]["state"], seen["b"]["queue"], seen["b"]["priority"]) == ("running", "team-b", 4)
    assert "c" not in seen
    moved = 'orchestrator_fleet_devices{queue="team-b",run="b"}'
    wait_until(lambda: moved in metrics(shared.said("a")))
    page = metrics(shared.said("a"))
    assert page[moved] == seen["b"]["devices"]
    assert page['orchestrator_fleet_devices{queue="team-a",run="a"}'] == 0.0
    assert page['orchestrator_run_state{run="a",state="waiting"}'] == 1.0
    assert page["orchestrator_fleet_capacity_devices"] == 2.0
    assert page["orchestrator_fleet_moves_total"] >= 1.0
    of_the_fleet = {name for metric in TABLE if metric.source == "fleet" for name in metric.series}
    assert of_the_fleet <= {series.partition("{")[0] for series in page}

    unknown = shared.queue("pause", "nobody")
    assert unknown.code == 2
    assert "no run called 'nobody' is in the queue" in unknown.err

    b.send_signal(signal.SIGTERM)
    ended = json.loads(b.communicate(timeout=TIMEOUT_S)[0])
    assert (b.returncode, ended["state"]) == (1, "stopped")
    assert ended["checkpoint"] is not None
    assert list(rows(shared.queue("resume", "a"))) == ["a"]
    (shared.folder / "hold").unlink()
    finished = json.loads(a.communicate(timeout=TIMEOUT_S)[0])
    assert (a.returncode, finished["state"]) == (0, "finished")
    assert len(losses(shared.folder / "runs" / "a")) == finished["step"] > before
    started = [one for one in records(shared.folder / "runs" / "a", "attempts.jsonl") if one["event"] == "started"]
    assert [(len(one["nodes"]), one.get("cause")) for one in started] == [(2, None), (2, "preempted_by_the_fleet")]
    assert finished["restarts"] == {"preempted_by_the_fleet": 1}
    book = list((shared.folder / "runs" / ".fleet").glob("*.json"))
    assert len(book) == 1
    assert json.loads(book[0].read_text())["book"]["entries"] == []


def test_a_node_on_which_workers_die_again_is_left_for_another(shared: Shared) -> None:
    sick = shared.run("sick", "1", "--set", "checkpoint.interval_s=1000")
    run = shared.folder / "runs" / "sick"
    for attempt in (1, 2):
        wait_until(lambda n=attempt: shared.attempt("sick") == n)  # type: ignore[misc]
        for worker in shared.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        wait_until(lambda n=attempt: len(records(run, "failures.jsonl")) == n)  # type: ignore[misc]
    wait_until(lambda: shared.attempt("sick") == 3)
    sick.send_signal(signal.SIGTERM)
    assert json.loads(sick.communicate(timeout=TIMEOUT_S)[0])["state"] == "stopped"
    first, second = records(run, "failures.jsonl")
    assert (first["action"], second["action"], first["node"]) == ("restart", "change", second["node"])
    assert f"starting the workers anew, without node {first['node']}" in shared.said("sick")
    nodes = [one["nodes"] for one in records(run, "attempts.jsonl") if one["event"] == "started"]
    assert nodes[:2] == [[first["node"]]] * 2
    assert len(nodes) == 3
    assert first["node"] not in nodes[2]


def metrics(said: str) -> dict[str, float]:
    """The hub's page, found as a person would: by what the run says."""
    where = next(word for word in said.split() if word.startswith("http://") and word.endswith("/metrics"))
    with urllib.request.urlopen(where, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
