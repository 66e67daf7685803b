"""Submission to a real Ray head with token authentication: success, failure, stop, twice, and what goes wrong.

The tests share one head and stand in the order in which its story goes: the last ones kill it and start another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, TIMEOUT_S, Ended, end_family, environment, in_this_process
from ports import free_port

from orchestrator.errors import ClusterLostError
from orchestrator.launching.jobs import JobServer
from s3_server import BUCKET, Weed

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # Ray's client says so to aiohttp
]

TOKEN = "right-token-0123456789"
DIGITS = ("jobs.vision:digits", "--set", "policy.name=fixed", "--set", "scale.workers=1")
LONG = (*DIGITS, "--arg", "epochs=2000", "--set", "name=long")


@dataclass
class Head:
    """A head node of the tests' own, and its home."""

    process: subprocess.Popen[bytes]
    address: str
    home: Path
    temporary: Path

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in environment(self.home).items() if not key.startswith("RAY_")}
        return {**kept, "RAY_AUTH_TOKEN": TOKEN, "RAY_API_SERVER_ADDRESS": self.address}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *words],
            cwd=REPOSITORY,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *words: str) -> Ended:
        process = self.start(*words)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return Ended(process.returncode, out, err)

    def get(self, path: str) -> Any:
        """What the job server says, without the cost of a command."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def answers(self) -> bool:
        try:
            return bool(self.get("/api/version"))
        except OSError:
            return False

    def cpus(self) -> float:
        """CPUs of the nodes that have joined: the job server answers before its own node is there."""
        nodes = self.get("/api/v0/nodes?detail=1")["data"]["result"]["result"] if self.answers() else []
        return sum(node["resources_total"].get("CPU", 0.0) for node in nodes if node["state"] == "ALIVE")

    def jobs(self) -> dict[str, dict[str, Any]]:
        return {job["submission_id"]: job for job in self.get("/api/jobs/") if job["submission_id"]}

    def log(self, submission_id: str) -> str:
        return str(self.get(f"/api/jobs/{submission_id}/logs")["logs"]) if submission_id in self.jobs() else ""


def start_head(folder: Path) -> Head:
    port = free_port()
    temporary = Path(tempfile.gettempdir()) / f"orchestrator-{port}"  # sockets in it must have short paths
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    words = ["start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    words += [f"--dashboard-port={port}", "--num-cpus=2", "--object-store-memory=150000000"]
    # Ray's own default for the agent is one fixed port: the second head of a machine would be without its agent.
    words += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"]
    words += [f"--metrics-export-port={free_port()}"]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words, f"--temp-dir={temporary}"],
            env={**kept, **own, "PATH": path},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    head = Head(process, f"http://127.0.0.1:{port}", folder, temporary)
    wait_until(lambda: head.cpus() == 2, process, folder / "head.log")
    return head


def end_head(head: Head) -> None:
    """Kill the head and all that it started, at once, as a lost machine would; once is enough."""
    if head.process.poll() is None:
        end_family(head.process)
    shutil.rmtree(head.temporary, ignore_errors=True)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[Any], log: Path | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None, log.read_text() if log else process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("aiohttp_cors", reason="a head that takes jobs needs ray[default]")
    pytest.importorskip("ray.job_submission")  # before a test's own streams are there, which Ray's log would keep
    started = start_head(tmp_path_factory.mktemp("head"))
    yield started
    end_head(started)


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: Head
) -> Iterator[Callable[..., Ended]]:
    """The command line in this process."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    def run(*words: str, token: str | None = TOKEN) -> Ended:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
        for name, value in {"RAY_AUTH_MODE": token and "token", "RAY_AUTH_TOKEN": token}.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        reset_auth_token_state()  # a process reads them once
        return in_this_process(monkeypatch, capsys, *words)

    yield run
    monkeypatch.undo()
    reset_auth_token_state()


@pytest.fixture(scope="module")
def finished(head: Head) -> Ended:
    """The main job, submitted and followed to its end."""
    return head("submit", *DIGITS, "--env", "MY_FLAG=1")


def test_success_is_followed_and_ends_with_zero(finished: Ended, here: Callable[..., Ended]) -> None:
    assert finished.code == 0, finished.err
    for wanted in ("plan for digits", "samples/s", "evaluation at step", "digits: finished"):
        assert wanted in finished.out
        assert finished.out.count("digits: finished") == 1
    assert "sending" in finished.err
    assert "plan for digits" in finished.err, "it was checked here, against the cluster, before it was sent"
    assert here("status", "digits", "--json").summary["status"] == "SUCCEEDED"
    assert [job["submission_id"] for job in here("jobs", "--json").summary] == ["digits"]
    logged = here("logs", "digits")
    assert logged.out == finished.out, "followed and read afterwards are the same text"
    assert TOKEN not in finished.out + finished.err + logged.out


def test_submitting_it_again_is_harmless(finished: Ended, head: Head, here: Callable[..., Ended]) -> None:
    again = here("submit", *DIGITS, "--env", "MY_FLAG=1", "--json")
    assert again.code == 0, again.err
    assert "finished already" in again.err
    assert again.summary["submission_id"] == "digits"
    assert set(head.jobs()) == {"digits"}


@pytest.fixture(scope="module")
def first(head: Head) -> Iterator[subprocess.Popen[str]]:
    """A long run that is submitted and followed, and trains."""
    process = head.start("submit", *LONG)
    wait_until(lambda: head.log("long").count("samples/s") > 1, process)
    yield process
    process.kill()
    process.communicate()


def test_two_submissions_are_one_run(first: subprocess.Popen[str], head: Head, here: Callable[..., Ended]) -> None:
    second = here("submit", *LONG, "--no-follow", "--json")
    assert second.summary["status"] == "RUNNING"
    other = here("submit", *LONG, "--set", "seed=3")
    assert other.code == 2
    assert "with another command" in other.err
    assert "long.2" not in head.jobs()


def test_a_reader_that_goes_away_ends_the_command_and_not_the_run(first: subprocess.Popen[str], head: Head) -> None:
    """As ``orchestrator logs long --follow | head`` does."""
    watching = head.start("logs", "long", "--follow")
    assert watching.stdout is not None
    assert watching.stderr is not None
    assert watching.stdout.readline()
    watching.stdout.close()
    assert watching.wait(TIMEOUT_S) == 1
    assert watching.stderr.read() == ""
    watching.stderr.close()
    assert head.jobs()["long"]["status"] == "RUNNING"


def test_stop_saves(first: subprocess.Popen[str], head: Head, here: Callable[..., Ended]) -> None:
    stopped = here("stop", "long", "--json")
    assert stopped.code == 0
    assert stopped.summary["status"] == "STOPPED"
    out, err = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 1
    assert "run the same command again to go on from the checkpoint" in out
    assert "long: stopped" in err
    summary = json.loads((head.home / "orchestrator" / "runs" / "long" / "summary.json").read_text())
    assert summary["state"] == "stopped"
    assert summary["checkpoint"].endswith(f"step-{summary['step']:08d}"), "the last step was saved"


def test_failure_ends_with_the_runs_own_code(head: Head, here: Callable[..., Ended]) -> None:
    """Wrong on the cluster only: there the folder cannot be written."""
    refused = here("submit", *DIGITS, "--set", "name=broken", "--set", "checkpoint.uri=/proc/nowhere")
    assert refused.code == 2, refused.err
    assert "cannot write the run's folder" in refused.out
    assert "Traceback" not in refused.out + refused.err
    waited = here("wait", "broken", "--json")
    assert waited.code == 2
    assert waited.summary["status"] == "FAILED"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "layout.micro_batch=7"), "layout.micro_batch=7 x 1 workers"),
        (("--set", "scale.workers=64"), "the cluster has 2 CPUs"),
        (("--set", "layout.micro_bach=1"), "did you mean 'micro_batch'"),
        (("--env", "X"), "NAME=VALUE"),
        (("--working-dir", "/nonexistent"), "give a folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    head: Head, here: Callable[..., Ended], words: tuple[str, ...], said: str
) -> None:
    refused = here("submit", *DIGITS, "--set", "name=never", *words)
    assert refused.code == 2
    assert said in refused.err
    assert refused.err.splitlines()[-1].startswith("error: ")
    assert "never" not in head.jobs()


@pytest.mark.parametrize(("token", "said"), [(None, "wants a token"), ("wrong-token-0123456789", "refuses the token")])
def test_token_that_is_missing_or_wrong(here: Callable[..., Ended], token: str | None, said: str) -> None:
    for words in (("submit", *DIGITS), ("jobs",)):
        refused = here(*words, token=token)
        assert refused.code == 2
        assert said in refused.err
        assert len(refused.err.strip().splitlines()) == 1, refused.err
        assert TOKEN not in refused.err
        assert "wrong-token" not in refused.err


def test_unknown_run_is_answered_with_the_known(finished: Ended, here: Callable[..., Ended]) -> None:
    refused = here("status", "digit")
    assert refused.code == 2
    assert "did you mean 'digits'" in refused.err


def test_plain_ray_job_submit_is_the_same_run(head: Head, here: Callable[..., Ended]) -> None:
    own = {**head.environment(), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": head.address}
    entrypoint = ["python", "-m", "orchestrator", "run", *DIGITS, "--set", "name=plain", "--arg", "epochs=1"]
    words = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--submission-id", "plain"]
    done = subprocess.run(
        [*words, "--working-dir", ".", "--", *entrypoint],
        cwd=REPOSITORY,
        env=own,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "plain: finished" in done.stdout
    assert "kills this job 3 s after it is asked to stop" in done.stdout  # this head is told of no other time
    assert here("wait", "plain", "--json").summary["exit_code"] == 0


def test_a_stopped_run_that_is_submitted_again_goes_on(head: Head, here: Callable[..., Ended]) -> None:
    stopped_at = json.loads((head.home / "orchestrator" / "runs" / "long" / "summary.json").read_text())["step"]
    again = here("submit", *LONG, "--no-follow", "--json")
    assert again.code == 0, again.err
    assert (again.summary["submission_id"], again.summary["attempt"]) == ("long.2", 2)
    wait_until(lambda: "samples/s" in head.log("long.2"), head.process)
    logged = here("logs", "long").out
    assert f"going on from checkpoint step-{stopped_at:08d}" in logged, "the name stands for the newest attempt"
    assert here("status", "long.1", "--json").summary["status"] == "STOPPED"


@pytest.mark.s3
def test_a_lost_cluster_is_said_and_another_one_goes_on_from_s3(
    head: Head, here: Callable[..., Ended], s3: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test: the head is killed under the run that is followed; its successor knows nothing but the store."""
    place = "runs-of-lost-clusters"
    kept = (*DIGITS, "--arg", "epochs=2000", "--set", "name=kept", "--set", f"checkpoint.uri=s3://{BUCKET}/{place}")
    kept = (*kept, "--set", "checkpoint.interval_s=2")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        kept = (*kept, "--env", f"{name}={os.environ[name]}")
    sent = here("submit", *kept, "--no-follow", "--json")
    assert sent.code == 0, sent.err
    server = JobServer(head.address, patience_s=2)
    attempt = server.attempt("kept")
    wait_until(lambda: saved(s3, f"{place}/kept/"), head.process)
    end_head(head)
    with pytest.raises(ClusterLostError, match="lost the cluster while following kept"):
        server.follow(attempt, str, str)
    assert here("status", "kept").code == 2

    successor = start_head(tmp_path)
    try:
        monkeypatch.setattr(head, "address", successor.address)
        again = here("submit", *kept, "--no-follow", "--json")
        assert (again.code, again.summary["submission_id"]) == (0, "kept"), again.err
        wait_until(lambda: "samples/s" in successor.log("kept"), successor.process)
        assert "going on from checkpoint step-" in successor.log("kept")
    finally:
        end_head(successor)


def saved(s3: Weed, prefix: str) -> bool:
    """Whether a checkpoint is whole in the store: its manifest is written last."""
    listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    return any(item["Key"].endswith("manifest.json") for item in listed)
