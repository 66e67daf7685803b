"""What a submission comes to, decided without a cluster."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import ClusterError, ConfigError, DataError, RequestError, StorageError
from orchestrator.job import load
from orchestrator.launching import jobs
from orchestrator.launching.jobs import (
    Attempt,
    Extras,
    JobServer,
    choose,
    command_of,
    dashboard_address,
    hurried,
    make_submission,
    named,
    plan_there,
)
from orchestrator.launching.preflight import RunRequest
from orchestrator.planning.cluster import ClusterShape

REQUEST = RunRequest(job="jobs.vision:digits", args=("epochs=3",), overrides=("seed=2",))


def submission():
    return make_submission(REQUEST, load(REQUEST.job).config, Extras())


def attempt(number: int = 1, status: str = "RUNNING", **changed: object) -> Attempt:
    base = Attempt(
        submission_id="digits" if number == 1 else f"digits.{number}",
        run="digits",
        attempt=number,
        request=submission().request,
        status=status,  # type: ignore[arg-type]
        message="",
        command="python -m orchestrator run x",
        started_s=float(number),
        ended_s=None,
        driver_exit_code=None,
    )
    return replace(base, **changed)


def test_the_command_survives_a_shell() -> None:
    awkward = replace(REQUEST, args=("text=it's; rm -rf / $HOME",), fresh=True)
    words = shlex.split(command_of(awkward, overrides=["checkpoint.uri=s3://a/b"]))
    assert words[:5] == ["python", "-m", "orchestrator", "run", "jobs.vision:digits"]
    assert words[5:] == ["--arg", awkward.args[0], "--set", "checkpoint.uri=s3://a/b", "--set", "seed=2", "--fresh"]


def test_no_shell_stands_between_ray_and_the_driver() -> None:
    assert submission().command == "exec " + command_of(REQUEST)


def test_a_stopped_run_gets_the_time_it_needs_to_save() -> None:
    config = load(REQUEST.job, (), ("failures.stop_grace_s=100",)).config
    environment = make_submission(REQUEST, config, Extras(env=("A=b=c",))).runtime_env["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": "130", "A": "b=c"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, None),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "kills this job 3 s after"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "59"}, "kills this job 59 s after"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "60"}, None),
    ],
    ids=["no job", "as Ray has it", "too short", "long enough"],
)
def test_a_job_that_would_be_killed_before_it_has_saved_says_so(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str | None
) -> None:
    for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = hurried(load(REQUEST.job, (), ()).config)
    if said is None:
        assert told is None
    else:
        assert told is not None
        assert said in told
        given = json.loads(told.partition("--runtime-env-json='")[2].partition("'")[0])
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", given["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
        assert hurried(load(REQUEST.job, (), ()).config) is None


def test_requirements_come_from_the_line_and_from_files(tmp_path: Path) -> None:
    path = tmp_path / "more.txt"
    path.write_text("# a comment\neinops==0.8  # why\n\ntqdm\n")
    assert Extras(pip=("numpy>=2", str(path))).requirements() == ["numpy>=2", "einops==0.8", "tqdm"]
    with pytest.raises(RequestError, match="there is no such file"):
        Extras(pip=("none.txt",)).requirements()
    with pytest.raises(RequestError, match="NAME=VALUE"):
        Extras(env=("A",)).variables()


def test_a_first_submission_has_the_runs_name() -> None:
    assert choose(submission(), []) == ("digits", 1, None)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "SUCCEEDED"])
def test_submitting_twice_is_harmless(status: str) -> None:
    known = attempt(status=status)
    assert choose(submission(), [known]).existing == known


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_after_its_end_the_next_attempt_goes_on(status: str) -> None:
    assert choose(submission(), [attempt(1, "STOPPED"), attempt(2, status)]) == ("digits.3", 3, None)


def test_fresh_starts_anew_after_success() -> None:
    assert choose(submission(), [attempt(1, "SUCCEEDED")], fresh=True) == ("digits.2", 2, None)


def test_an_id_that_another_run_has_is_passed_over() -> None:
    other = attempt(1, "RUNNING", submission_id="digits.2", run="digits.2")
    assert choose(submission(), [attempt(1, "FAILED"), other]) == ("digits.3", 3, None)


def test_another_command_under_the_name_of_a_living_run_is_refused() -> None:
    with pytest.raises(RequestError, match="with another command: python -m orchestrator run x"):
        choose(submission(), [attempt(request="other")])
    assert choose(submission(), [attempt(1, "SUCCEEDED", request="other")]).attempt == 2


def test_a_runs_name_is_its_last_attempt_and_an_id_is_that_attempt() -> None:
    """The first attempt has the run's name for its id."""
    first, second, third = attempt(1, "STOPPED"), attempt(2, "FAILED"), attempt(3)
    known = [second, third, first, attempt(1, submission_id="other", run="other")]
    assert named("digits", known) == third
    assert named("digits.2", known) == second
    assert named("digits.1", known) == first
    assert named("digits", [first]) == named("digits.1", [first]) == first
    assert named("digit", known) is None
    made_again = attempt(1, submission_id="team-digits-x7f2k", started_s=9.0)
    assert (
        named("digits", [attempt(1, "FAILED", submission_id="team-digits-a1b2c", started_s=3.0), made_again])
        == made_again
    )


def test_exit_codes() -> None:
    codes = [attempt(1, status).exit_code for status in ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED")]
    assert codes == [None, None, 0, 1, 1]
    assert attempt(1, "FAILED", driver_exit_code=2).exit_code == 2


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (None, "http://127.0.0.1:8265"),
        ("head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example.com", "https://ray.example.com"),
    ],
)
def test_addresses(given: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert dashboard_address(given) == address
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert dashboard_address(given) == (address if given else "http://other:1")


@pytest.mark.parametrize("given", ["ray://head:10001", "head", "http://head:port", "head:6379"])
def test_what_is_no_job_server_is_refused(given: str) -> None:
    with pytest.raises(ClusterError, match="8265"):
        dashboard_address(given)


def test_nothing_is_sent_to_a_place_where_nobody_answers(refuse: Callable[..., str]) -> None:
    for words in (["submit", "jobs.vision:digits"], ["jobs"], ["status", "x"], ["stop", "x"], ["wait", "x"]):
        message = refuse(*words, "--address", "http://127.0.0.1:9")
        assert message.count("\n") == 0
        assert "no Ray job server answers at http://127.0.0.1:9" in message


class Agentless(BaseHTTPRequestHandler):
    """A head as Ray 2.60 answers while it has no agent: for a moment after its start, or for ever."""

    submissions = 0

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"}
        self._answer(200, json.dumps([] if self.path == "/api/jobs/" else version))

    def do_POST(self) -> None:
        type(self).submissions += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(500, "No available agent to submit job, please try again later.")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def agentless() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Agentless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_head_whose_agent_never_comes_is_explained(
    agentless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="submitting needs ray[default]")
    (tmp_path / "code.zip").write_bytes(b"zip")
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    server = JobServer(agentless, agent_patience_s=2.5 * jobs.POLL_S)
    with pytest.raises(ClusterError, match="another Ray on that machine has the agent's port") as refused:
        server.start(submission(), choose(submission(), []), str(tmp_path / "code.zip"))
    assert "--dashboard-agent-listen-port" in str(refused.value)
    assert str(refused.value).count("\n") == 0
    assert Agentless.submissions == 4, "it is asked again for a while"


@pytest.mark.parametrize("error", [DataError, StorageError])
def test_the_plan_is_left_to_the_cluster_only_where_the_data_cannot_be_read_here(
    error: type[RequestError],
) -> None:
    def unreadable() -> None:
        raise error("s3://data/train: no permission")

    notes: list[str] = []
    job = load(REQUEST.job)
    assert plan_there(replace(job, prepare=unreadable), ClusterShape(nodes=1, cpus=4), notes.append) is None
    assert notes == ["the plan is left to the cluster, since the data is not here: s3://data/train: no permission"]
    with pytest.raises(ConfigError, match=r"layout\.micro_batch=7"):
        plan_there(load(REQUEST.job, (), ("layout.micro_batch=7",)), ClusterShape(nodes=1, cpus=4), notes.append)
