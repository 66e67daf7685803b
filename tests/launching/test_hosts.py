"""Runs on a real Ray cluster of three hosts, each with its own network and processes; its head is killed and replaced.

The hosts are namespaces of this machine, made by ``ray-hosts.sh``; Ray's state is in a real Redis on a fourth. On one
host a driver would attach to the head's own node and die with it, whatever node it was meant for.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, TIMEOUT_S, Ended, environment, losses, records

import kube
from orchestrator.telemetry.records import read

SCRIPT = (kube.test_data() or Path("/nonexistent")).parent / "tools" / "ray-hosts.sh"
ADDRESS = "http://10.77.0.1:8265"
ADDRESS_OF = {"w1": "10.77.0.2", "w2": "10.77.0.3"}
LISTED = ("--address", ADDRESS, "--format=json", "--limit=100")
ELSEWHERE = "s3"  # the host without Ray: Redis is there, and whoever submits
TOKEN = "three-hosts-0123456789"
RUN = ("jobs.vision:digits", "--set", "policy.name=fixed", "--set", "scale.workers=2")
# As the chart sets them: work waits for the head, a job that is stopped may save, and the driver is not on the head.
# It waits longer here than there: a head may have to be started three times (see start_head).
HEAD_MAY_GO = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
DRIVER_ELSEWHERE = ("--driver-cpus", "1")


def why_not() -> str | None:
    if not SCRIPT.is_file():
        return "no ray-hosts.sh: set ORCHESTRATOR_TEST_DATA to the folder beside tools/ that holds it"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "unshare", "redis-server") if shutil.which(name) is None]
    if absent:
        return f"not found: {', '.join(absent)} (Debian: iproute2, util-linux, redis-server)"
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return "the hosts are up already, for somebody else" if "rhsw" in listed.stdout else None


WHY_NOT = why_not()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]


@dataclass(frozen=True)
class Hosts:
    """A head that has no CPUs, two hosts with two each, and Redis."""

    folder: Path
    password: str

    def __call__(self, verb: str, *words: str, **more: str) -> None:
        ended = self._script(verb, *words, **more)
        assert ended == 0, [path.read_text() for path in self.folder.glob("*.log")]

    def _script(self, verb: str, *words: str, **more: str) -> int:
        return subprocess.run(
            ["bash", str(SCRIPT), verb, str(self.folder), *words],
            env={**self.environment(), **more},
            cwd=self.folder,
            timeout=TIMEOUT_S,
            check=False,
        ).returncode

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        kept = {key: value for key, value in environment(self.folder).items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"RAY": f"{sys.executable} -m ray.scripts.scripts", "RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}
        return {**kept, **own, "PATH": path, "RAY_API_SERVER_ADDRESS": ADDRESS}

    def start_head(self) -> None:
        """Ray gives a head 30 s to start in; on a busy machine that may be too few, and whoever runs it tries again."""
        redis = {"RAY_REDIS_ADDRESS": "10.77.0.4:6380", "RAY_ARGS": f"--redis-password={self.password}"}
        for _ in range(3):
            (self.folder / "head.log").unlink(missing_ok=True)  # or the script reads of the last head that it started
            if self._script("start", "head", CPUS="0", **redis, **HEAD_MAY_GO) == 0:
                return
            self("kill", "head")
        raise AssertionError((self.folder / "head.log").read_text())

    def start(self, *words: str, token: str = TOKEN) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", f"rh{ELSEWHERE}", *words],
            env=self.environment(token),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def orchestrator(self, *words: str, token: str = TOKEN) -> Ended:
        process = self.start(sys.executable, "-m", "orchestrator", *words, token=token)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return Ended(process.returncode, out, err)

    def ray_job(self, verb: str, *words: str) -> int:
        """Ray's own command line; returns its exit code."""
        process = self.start(sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", ADDRESS, *words)
        process.communicate(timeout=TIMEOUT_S)
        return process.returncode

    def processes_on(self, host: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", f"rh{host}"], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def workers_on(self, host: str) -> list[int]:
        """The processes that train on ``host``, by the names that Ray gives them."""
        found = []
        for pid in self.processes_on(host):
            with contextlib.suppress(OSError):  # it has ended
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def given_up(self, host: str) -> bool:
        """Whether no Ray on ``host`` is alive, as the head has it."""
        asked = self.start(sys.executable, "-m", "ray.scripts.scripts", "list", "nodes", *LISTED)
        out, err = asked.communicate(timeout=TIMEOUT_S)
        assert asked.returncode == 0, out + err
        states = {node["state"] for node in json.loads(out) if node["node_ip"] == ADDRESS_OF[host]}
        assert states, out
        return "ALIVE" not in states

    def run(self, name: str) -> Path:
        return self.folder / "orchestrator" / "runs" / name

    def step(self, name: str) -> int:
        """The last step that the run has recorded; its folder is on a disk that all hosts share."""
        records = self.run(name) / "metrics.jsonl"
        return max((int(record["step"]) for record in read(records)), default=0) if records.exists() else 0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), secrets.token_hex(8))
    try:
        made("up")
        redis = made.start(
            *["redis-server", "--port", "6380", "--bind", "10.77.0.4", "--requirepass", made.password, "--save", ""]
        )
        made.start_head()
        for host in ("w1", "w2"):
            made("start", host, CPUS="2", **HEAD_MAY_GO)
        yield made
    finally:
        made("down")
    redis.communicate()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_run_outlives_its_head_and_finishes(hosts: Hosts) -> None:
    words = (*RUN, "--set", "name=outlives", "--arg", "epochs=40", *DRIVER_ELSEWHERE)
    followed = hosts.start(sys.executable, "-m", "orchestrator", "submit", *words)
    wait_until(lambda: hosts.step("outlives") > 10, followed)
    hosts("kill", "head")
    killed_at = hosts.step("outlives")
    wait_until(lambda: hosts.step("outlives") > killed_at + 100, followed)  # Ray is asked of drains meanwhile
    hosts.start_head()
    wait_until(lambda: hosts.orchestrator("jobs").code == 0)

    again = hosts.orchestrator("submit", *words, "--no-follow", "--json")
    assert again.code == 0, again.err
    assert again.summary["submission_id"] == "outlives", "the new head knows the run"
    out, err = followed.communicate(timeout=TIMEOUT_S)
    assert followed.returncode == 0, out + err
    assert out.count("outlives: finished") == 1
    attempts = read(hosts.run("outlives") / "attempts.jsonl")
    assert sum(record["event"] == "started" for record in attempts) == 1, "no worker was started anew"
    assert hosts.orchestrator("status", "outlives", "--json").summary["status"] == "SUCCEEDED"


@pytest.mark.parametrize(
    ("name", "more", "code", "said"),
    [
        ("plain", ("--arg", "epochs=1"), 0, "plain: finished"),
        ("broken", ("--set", "checkpoint.uri=/proc/nowhere"), 2, "cannot write the run's folder"),
    ],
)
def test_plain_ray_job_submit_ends_as_the_run_does(
    hosts: Hosts, name: str, more: tuple[str, ...], code: int, said: str
) -> None:
    entrypoint = ["python", "-m", "orchestrator", "run", *RUN, "--set", f"name={name}", *more]
    words = ["job", "submit", "--submission-id", name, "--entrypoint-num-cpus", "1", "--address", ADDRESS]
    submit = [sys.executable, "-m", "ray.scripts.scripts", *words, "--working-dir", ".", "--", *entrypoint]
    process = hosts.start(*submit)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode == 0) is (code == 0), out + err
    assert said in out
    assert hosts.orchestrator("wait", name).code == code


def test_a_run_that_fails_is_followed_to_its_end(hosts: Hosts) -> None:
    ended = hosts.orchestrator("submit", *RUN, "--set", "name=failing", "--set", "checkpoint.uri=/proc/nowhere")
    assert ended.code == 2, ended.out + ended.err
    assert "cannot write the run's folder" in ended.out + ended.err
    assert hosts.orchestrator("wait", "failing").code == 2


@pytest.mark.parametrize("name", ["stopped", "plainly"])
def test_a_stopped_run_saves_on_every_host(hosts: Hosts, name: str) -> None:
    """Both ways to submit, each with its own way to stop."""
    words = (*RUN, "--set", f"name={name}", "--arg", "epochs=2000")
    if name == "stopped":
        sent = hosts.orchestrator("submit", *words, *DRIVER_ELSEWHERE, "--no-follow", "--json")
        assert sent.code == 0, sent.err
    else:
        plain = ("--no-wait", f"--submission-id={name}", "--working-dir=.", "--entrypoint-num-cpus=1", "--")
        assert hosts.ray_job("submit", *plain, "python", "-m", "orchestrator", "run", *words) == 0
    wait_until(lambda: hosts.step(name) > 5)
    if name == "stopped":
        stopped = hosts.orchestrator("stop", name, "--json")
        assert stopped.summary["status"] == "STOPPED", stopped.err
    else:
        assert hosts.ray_job("stop", name) == 0
        wait_until(lambda: (hosts.run(name) / "summary.json").exists())
        assert hosts.orchestrator("status", name, "--json").summary["status"] == "STOPPED"
    summary: dict[str, Any] = json.loads((hosts.run(name) / "summary.json").read_text())
    manifest = json.loads((Path(summary["checkpoint"]) / "manifest.json").read_text())
    assert summary["checkpoint"].endswith(f"step-{summary['step']:08d}")
    assert {f"rank-{rank:05d}.pt" for rank in (0, 1)} <= set(json.dumps(manifest).split('"'))


def test_a_host_that_is_cut_off_and_then_dies_costs_no_more_than_time(hosts: Hosts, undisturbed: Ended) -> None:
    """One worker on each host: those who are left wait for the other in a collective, and nobody says that it is gone.

    The driver is on the head. Ray ends what it had given up once it hears of it; its host then starts Ray again. Later
    all that runs on it is killed at once.
    """
    words = (*RUN, "--set", "name=cut", "--set", "scale.cpus_per_worker=1.5", "--set", "checkpoint.interval_steps=10")
    followed = hosts.start(sys.executable, "-m", "orchestrator", "submit", *words)
    wait_until(lambda: hosts.step("cut") > 20, followed)
    hosts("cut", "w1")
    wait_until(lambda: hosts.given_up("w1"), followed)
    hosts("heal", "w1")
    wait_until(lambda: not hosts.processes_on("w1"), followed)
    hosts("start", "w1", CPUS="2", **HEAD_MAY_GO)
    wait_until(lambda: newest_attempt(hosts, "cut") == 2, followed)
    again_at = hosts.step("cut")
    wait_until(lambda: hosts.step("cut") > again_at + 20, followed)
    hosts("kill", "w1")
    hosts("start", "w1", CPUS="2", **HEAD_MAY_GO)
    out, err = followed.communicate(timeout=TIMEOUT_S)
    assert followed.returncode == 0, out + err
    assert {record["action"] for record in failures(hosts, "cut")} == {"restart"}
    assert [record["cause"] for record in failures(hosts, "cut") if record["cause"] != "start"] == ["worker_lost"] * 2
    cut, killed = starts(hosts, "cut")[1:]
    assert [len(set(start["nodes"])) for start in starts(hosts, "cut")] == [2, 2, 2]
    assert 20 <= cut["step"] < killed["step"]
    assert losses(hosts.run("cut")) == losses(Path(undisturbed.summary["folder"]))


def test_a_node_on_which_workers_die_again_is_left(hosts: Hosts, undisturbed: Ended) -> None:
    """Something else fills the other host at first, or Ray would place workers there after the first failure."""
    fill = ["submit", "--no-wait", "--submission-id=filler", "--entrypoint-num-cpus=2", "--", "sleep", "1000"]
    assert hosts.ray_job(*fill) == 0
    fields = ("name=left", "checkpoint.interval_s=1000")
    words = (*RUN, *(word for field in fields for word in ("--set", field)))
    followed = hosts.start(sys.executable, "-m", "orchestrator", "submit", *words)
    for attempt in (1, 2):
        wait_until(lambda n=attempt: newest_attempt(hosts, "left") == n, followed)  # type: ignore[misc]
        os.kill(next(worker for host in ("w1", "w2") for worker in hosts.workers_on(host)), 9)
        wait_until(lambda n=attempt: len(failures(hosts, "left")) == n, followed)  # type: ignore[misc]
    assert hosts.ray_job("stop", "filler") == 0
    out, err = followed.communicate(timeout=TIMEOUT_S)
    assert followed.returncode == 0, out + err
    first, again = failures(hosts, "left")
    assert (first["node"], first["action"], again["action"]) == (again["node"], "restart", "change")
    assert again["reason"] == f"2 failures in a row began on node {first['node']}"
    assert f"starting the workers anew, without node {first['node']}" in out + err
    assert first["node"] not in starts(hosts, "left")[-1]["nodes"]
    assert losses(hosts.run("left")) == losses(Path(undisturbed.summary["folder"]))


def test_a_host_that_is_found_slow_at_the_start_is_left_where_asked(hosts: Hosts) -> None:
    """One worker on each host, of which one has a tenth of its time; there is room without it for one."""
    fields = ("name=slow", "scale.workers=1,2", "scale.cpus_per_worker=2", "health.exclude=true")
    words = ("broken_jobs:braked", "--set", "recipe.stop.epochs=4", "--set", "policy.name=fixed")
    words = (*words, *(word for field in (*fields, "health.slow_factor=0.75") for word in ("--set", field)))
    done = hosts.orchestrator("submit", *words)
    assert done.code == 0, done.out + done.err
    health = records(hosts.run("slow"), "health.jsonl")
    assert [len(record["ranks"]) for record in health] == [2, 1], health
    other, slow = health[0]["ranks"]
    assert slow["matmul_flops_per_s"] < 0.75 * other["matmul_flops_per_s"]
    (failure,) = failures(hosts, "slow")
    assert (failure["cause"], failure["action"], failure["step"]) == ("slow", "change", 0)
    assert "is far behind the others" in failure["message"]
    assert f"starting the workers anew, without node {failure['node']}" in done.out + done.err
    assert failure["node"] == slow["node"] != other["node"]
    assert all(start["nodes"] == [other["node"]] for start in starts(hosts, "slow"))
    assert len(losses(hosts.run("slow"))) == math.ceil(4 * 1437 / 64)


def failures(hosts: Hosts, name: str) -> list[dict[str, Any]]:
    return records(hosts.run(name), "failures.jsonl")


def starts(hosts: Hosts, name: str) -> list[dict[str, Any]]:
    return [record for record in records(hosts.run(name), "attempts.jsonl") if record["event"] == "started"]


def newest_attempt(hosts: Hosts, name: str) -> int:
    """The attempt of the last step that the run has recorded."""
    return max((int(record["attempt"]) for record in records(hosts.run(name))), default=0)


@pytest.mark.parametrize(
    ("token", "address", "said"),
    [
        ("wrong-token-0123456789", ADDRESS, "refuses the token"),
        (TOKEN, "http://10.77.0.2:8265", "no Ray job server answers at http://10.77.0.2:8265"),
    ],
)
def test_wrong_token_and_wrong_address(hosts: Hosts, token: str, address: str, said: str) -> None:
    refused = hosts.orchestrator("submit", *RUN, "--address", address, token=token)
    assert refused.code == 2
    assert said in refused.err
    assert len(refused.err.strip().splitlines()) == 1, refused.err


LONG, SHORT = 100, 40
SHARING = (
    "benchmarks.fleet_jobs:waiting",
    "--set",
    "policy.name=fixed",
    "--set",
    "recipe.schedule.name=constant",
    "--set",
    "recipe.schedule.warmup=0",
)
QUEUED = ("--queue", "team-a", "--set", "fleet.policy=fair", "--set", "scale.workers=1,4")


def _submit(hosts: Hosts, name: str, epochs: int, *more: str) -> None:
    words = (*SHARING, "--set", f"name={name}", "--arg", f"epochs={epochs}", "--set", "checkpoint.interval_s=5", *more)
    sent = hosts.orchestrator("submit", *words, "--no-follow")
    assert sent.code == 0, sent.err
    wait_until(lambda: hosts.step(name) > 3)


def _service(hosts: Hosts) -> int | None:
    for number in hosts.processes_on("head"):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{number}/cmdline").read_bytes().startswith(b"ray::FleetActor"):
                return number
    return None


def _losses(hosts: Hosts, name: str) -> list[float]:
    found = read(hosts.run(name) / "metrics.jsonl")
    assert [record["step"] for record in found] == list(range(1, len(found) + 1)), "each step once, in order"
    return [record["loss"] for record in found]


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "ORCHESTRATOR_LONG_TESTS" not in os.environ,
    reason="about six minutes on two CPUs: set ORCHESTRATOR_LONG_TESTS=1 to run it",
)
def test_runs_share_the_cluster_and_end_as_they_would_alone(hosts: Hosts) -> None:
    """Three runs in a queue beside one that is in none; the service and a host are killed meanwhile."""
    _submit(hosts, "alone", SHORT)
    for name, epochs in (("first", SHORT), ("second", SHORT), ("long", LONG)):
        _submit(hosts, name, epochs, *QUEUED)
    queue = hosts.orchestrator("queue", "--json")
    assert queue.code == 0, queue.err
    rows = {row["name"]: row for row in queue.summary["rows"]}
    assert set(rows) <= {"first", "second", "long"}, "a run without a queue is somebody else's"
    assert queue.summary["used"] == sum(row["devices"] for row in rows.values()) <= queue.summary["devices"] <= 4
    assert rows["long"]["state"] == "running"
    assert all(row["why"] for row in rows.values())

    service = _service(hosts)
    assert service is not None
    attempts = len(read(hosts.run("long") / "attempts.jsonl"))
    os.kill(service, signal.SIGKILL)
    reached = hosts.step("long")
    wait_until(lambda: hosts.step("long") > reached + 20)
    wait_until(lambda: _service(hosts) not in (None, service))
    assert len(read(hosts.run("long") / "attempts.jsonl")) - attempts <= 2, "no more than a resize that was under way"

    hosts("kill", "w2")
    time.sleep(5.0)  # as long as a host takes to come back
    hosts("start", "w2", CPUS="2", **HEAD_MAY_GO)
    names = ("alone", "first", "second", "long")
    wait_until(lambda: all((hosts.run(name) / "summary.json").exists() for name in names))
    summaries = {name: json.loads((hosts.run(name) / "summary.json").read_text()) for name in names}
    assert {name: summary["state"] for name, summary in summaries.items()} == dict.fromkeys(names, "finished")
    reference = _losses(hosts, "alone")
    for name in ("first", "second", "long"):
        own = _losses(hosts, name)
        assert own[: len(reference)] == pytest.approx(reference, abs=1e-4), name
        assert len(own) == math.ceil((LONG if name == "long" else SHORT) * 1437 / 64)
    for name in ("first", "second"):
        assert summaries[name]["samples"] == summaries["alone"]["samples"]
        assert summaries[name]["metrics"]["accuracy"] == pytest.approx(
            summaries["alone"]["metrics"]["accuracy"], abs=1e-2
        )
    started = [record for record in read(hosts.run("long") / "attempts.jsonl") if record["event"] == "started"]
    ends = [read(hosts.run(name) / "attempts.jsonl")[-1]["time"] for name in ("first", "second")]
    grown = [
        after
        for before, after in pairwise(started)
        if len(after["nodes"]) > len(before["nodes"]) and after["cause"] == "resized"
    ]
    assert any(record["time"] > min(ends) for record in grown), "when one ends, the others get its devices"
    told = [event["text"] for event in read(hosts.run("long") / "events.jsonl") if event["event"] == "fleet"]
    assert len(told) == len(started)


def test_a_dead_head_is_said(hosts: Hosts) -> None:
    """The last test: nothing is left to submit to."""
    hosts("kill", "head")
    refused = hosts.orchestrator("submit", *RUN)
    assert refused.code == 2
    assert "no Ray job server answers" in refused.err
    assert len(refused.err.strip().splitlines()) == 1, refused.err
