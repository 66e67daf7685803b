"""Runs on a cluster that is somewhere else: submit, follow, stop and look, through the job server of Ray's head.

A run is submitted under its own name, so submitting it twice is harmless: while an attempt lives it is followed, and
after its end the next one goes on from the run's newest checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import secrets
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from orchestrator.config import RunConfig
from orchestrator.errors import ClusterError, ClusterLostError, DataError, RequestError, StorageError, did_you_mean
from orchestrator.job import Job, load
from orchestrator.launching.packing import pack
from orchestrator.launching.preflight import RunRequest, prepare
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.telemetry.human import count, size

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = [
    "Attempt",
    "Extras",
    "JobServer",
    "Submission",
    "choose",
    "command_of",
    "dashboard_address",
    "hurried",
    "make_submission",
    "named",
    "plan_there",
    "submit",
]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S = 5.0
AGENT_PATIENCE_S = 60.0
NO_AGENT = "No available agent"  # in Ray's answer to a submission
NODES = 10_000  # the most that Ray lists, dead ones too
POLL_S = 0.5
RECONNECT_S = 2.0  # each new connection leaves one behind in the head, until the run ends
PATIENCE_S = 180.0  # a head that is restarted is back within this: the chart has the other nodes wait for it for 120 s
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
STOP_MARGIN_S = 30.0
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
RAYS_STOP_WAIT_S = 3  # where nobody says otherwise
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray gives it to what it runs as a job's entrypoint
RUN, ATTEMPT, REQUEST = "orchestrator_run", "orchestrator_attempt", "orchestrator_request"
Status = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]


@dataclass(frozen=True)
class Extras:
    """What a run takes along: environment, pip requirements, code, and CPUs for its driver.

    ``working_dir`` is a folder to pack, or the address of a zip. ``cpus`` above 0 lets Ray place the driver on any
    node that has them, so that it need not share the head's fate; None leaves it to whoever starts the run.
    """

    env: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    working_dir: str = "."
    cpus: float | None = None

    def variables(self) -> dict[str, str]:
        """The environment as a mapping.

        Raises:
            RequestError: an entry is not NAME=VALUE.
        """
        pairs = [entry.partition("=") for entry in self.env]
        for name, equals, _ in pairs:
            if not equals or not name.isidentifier():
                raise RequestError(f"--env {name!r}: write it as NAME=VALUE")
        return {name: value for name, _, value in pairs}

    def requirements(self) -> list[str]:
        """pip requirements, those of a requirements file one by one.

        Raises:
            RequestError: a named file does not exist.
        """
        found: list[str] = []
        for entry in self.pip:
            if not entry.endswith(".txt"):
                found.append(entry)
                continue
            if not Path(entry).is_file():
                raise RequestError(f"--pip {entry}: there is no such file")
            lines = (line.partition(" #")[0].strip() for line in Path(entry).read_text(encoding="utf-8").splitlines())
            found += [line for line in lines if line and not line.startswith("#")]
        return found


@dataclass(frozen=True)
class Submission:
    """Everything that is sent, but the code."""

    run: str
    command: str
    request: str
    """A digest of the command: two submissions are the same run where it is the same."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    cpus: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One submission of a run, as the job server knows it. Times are seconds since 1970; ``exit_code`` the driver's."""

    submission_id: str
    run: str
    attempt: int
    request: str
    status: Status
    message: str
    command: str
    started_s: float | None
    ended_s: float | None
    driver_exit_code: int | None

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int | None:
        """What a command that waited for it ends with: the run's own, or None while it lives."""
        if not self.ended:
            return None
        if self.status == "SUCCEEDED":
            return 0
        return 2 if self.status == "FAILED" and self.driver_exit_code == 2 else 1

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        names = ("submission_id", "run", "attempt", "status", "message", "started_s", "ended_s", "exit_code")
        return {name: getattr(self, name) for name in names}


class Choice(NamedTuple):
    """What a submission comes to: a new attempt under an id, or one that exists already."""

    submission_id: str
    attempt: int
    existing: Attempt | None


def command_of(request: RunRequest, *, overrides: Sequence[str] = ()) -> str:
    """The shell command that is the run, the same on every machine."""
    words = ["python", "-m", "orchestrator", "run", request.job]
    words += [word for arg in request.args for word in ("--arg", arg)]
    words += [word for override in (*overrides, *request.overrides) for word in ("--set", override)]
    words += ["--fresh"] if request.fresh else []
    words += ["--force-config"] if request.force_config else []
    return shlex.join(words)


def make_submission(request: RunRequest, config: RunConfig, extras: Extras) -> Submission:
    """What would be sent for ``request``.

    Raises:
        RequestError: an environment variable or a requirement that cannot be read.
    """
    command = command_of(request)
    variables = {STOP_WAIT_VARIABLE: str(_stop_wait_s(config)), **extras.variables()}
    requirements = extras.requirements()
    return Submission(
        run=config.name,
        # Ray runs it in a shell and signals both. A shell that dies first leaves the driver to process 1, which in a
        # container may be Ray itself and buries nobody: Ray would then wait for the dead until the grace is over.
        command=f"exec {command}",
        request=hashlib.sha256(command.encode()).hexdigest()[:16],
        runtime_env={"env_vars": variables, **({"pip": requirements} if requirements else {})},
        cpus=extras.cpus or 0.0,
    )


def _stop_wait_s(config: RunConfig) -> int:
    """How long Ray is to wait for a job that was asked to stop before it kills it."""
    return math.ceil(config.failures.stop_grace_s + STOP_MARGIN_S)


def hurried(config: RunConfig) -> str | None:
    """What to say where this process is a Ray job's that would be killed before its grace is over, or None."""
    if JOB_VARIABLE not in os.environ:
        return None
    with contextlib.suppress(ValueError):  # Ray's own stop would fail on it
        given_s = int(os.environ.get(STOP_WAIT_VARIABLE, RAYS_STOP_WAIT_S))
        if given_s >= config.failures.stop_grace_s:
            return None
    wanted = json.dumps({"env_vars": {STOP_WAIT_VARIABLE: str(_stop_wait_s(config))}})
    return (
        f"Ray kills this job {os.environ.get(STOP_WAIT_VARIABLE, RAYS_STOP_WAIT_S)} s after it is asked to stop, "
        f"whether it has saved or not (failures.stop_grace_s={config.failures.stop_grace_s:g}): give "
        f"`ray job submit` --runtime-env-json='{wanted}', or use `orchestrator submit`, which does"
    )


def choose(submission: Submission, attempts: Sequence[Attempt], *, fresh: bool = False) -> Choice:
    """Whether to start anew, and under which id. ``attempts`` are all that the server knows.

    Raises:
        RequestError: another command is running under this run's name.
    """
    mine = sorted((a for a in attempts if a.run == submission.run), key=lambda a: a.attempt)
    for living in (a for a in mine if not a.ended):
        if living.request != submission.request:
            raise RequestError(
                f"the run {submission.run!r} is {living.status.lower()} with another command: {living.command}\n"
                f"stop it with `orchestrator stop {living.submission_id}`, or give this run another name with "
                "--set name=..."
            )
        return Choice(living.submission_id, living.attempt, living)
    last = mine[-1] if mine else None
    if last and last.status == "SUCCEEDED" and last.request == submission.request and not fresh:
        return Choice(last.submission_id, last.attempt, last)
    taken = {a.submission_id for a in attempts}
    number = (last.attempt if last else 0) + 1
    while (name := submission.run if number == 1 else f"{submission.run}.{number}") in taken:
        number += 1
    return Choice(name, number, None)


def named(name: str, attempts: Sequence[Attempt]) -> Attempt | None:
    """The last attempt of the run with this name; else the attempt with this id, the first one's being RUN.1 too.

    The first attempt has the run's name for its id, and a run that was submitted again must not be taken for it. A
    RayJob that was made anew counts as a first attempt again; its later submission is the last one.
    """
    of_the_run = [a for a in attempts if a.run == name]
    with_the_id = [a for a in attempts if name in (a.submission_id, f"{a.run}.{a.attempt}")]
    return max(of_the_run or with_the_id, key=lambda a: (a.attempt, a.started_s or 0.0), default=None)


def submit(
    request: RunRequest, extras: Extras, server: JobServer, note: Callable[[str], None]
) -> tuple[Attempt, Plan | None]:
    """Check the run against the cluster, pack the code and send both; returns the attempt that now is the run.

    The plan is None where this machine lacks the data that the plan needs; the cluster makes it then.

    Raises:
        RequestError: the request is wrong, and nothing was sent.
    """
    job = load(request.job, request.args, request.overrides)
    submission = make_submission(request, job.config, extras)
    plan = plan_there(job, server.shape(), note)
    choice = choose(submission, server.attempts(), fresh=request.fresh)
    if choice.existing:
        return choice.existing, plan
    with _code(extras.working_dir, note) as working_dir:
        server.start(submission, choice, working_dir)
    return server.attempt(choice.submission_id), plan


def plan_there(job: Job, shape: ClusterShape, note: Callable[[str], None]) -> Plan | None:
    """The plan that the run will make on a cluster of this shape, or None where this machine cannot read its data.

    Raises:
        RequestError: the run cannot be as it is asked for.
    """
    try:
        sizes = prepare(job)
        return make_plan(job.config, shape, train_samples=sizes[0], evaluation_samples=sizes[1])
    except (DataError, StorageError) as error:
        note(f"the plan is left to the cluster, since the data is not here: {error}")
        return None


@contextlib.contextmanager
def _code(working_dir: str, note: Callable[[str], None]) -> Iterator[str]:
    """The code as Ray takes it: an address as it stands, or a folder's zip."""
    if "://" in working_dir:
        yield working_dir
        return
    root = Path(working_dir).absolute()
    if not root.is_dir():
        raise RequestError(f"--working-dir {working_dir}: give a folder, or the address of a zip")
    with tempfile.TemporaryDirectory() as folder:
        package = pack(root, Path(folder) / "code.zip")
        note(f"sending {count(package.files)} files, {size(package.size_bytes)}, from {root}")
        yield str(package.path)


def dashboard_address(address: str | None) -> str:
    """The job server: as given, else ``RAY_API_SERVER_ADDRESS``, else this machine's (a port-forward ends there).

    Raises:
        ClusterError: not an address of a job server.
    """
    text = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    text = text if "://" in text else f"http://{text}"
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or (port is None and parts.scheme == "http"):
        raise ClusterError(f"address {address!r}: write it as http://HEAD:8265, where Ray's dashboard listens")
    if port == 6379:
        raise ClusterError(
            f"{text}: port 6379 is for drivers on the cluster; jobs are submitted to http://{parts.hostname}:8265"
        )
    return text.rstrip("/")


class JobServer:
    """The job server of a cluster; every failure is one of ours.

    ``patience_s``: how many seconds the server may be gone while a run is followed; ``agent_patience_s``: how long a
    head that has just been started may take to be ready for jobs.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        agent_patience_s: float = AGENT_PATIENCE_S,
    ) -> None:
        self.address = dashboard_address(address)
        self._patience_s = patience_s
        self._agent_patience_s = agent_patience_s
        self._require_reachable()
        if any(os.environ.get(name) for name in TOKEN_VARIABLES):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # without it Ray's client keeps the token to itself
        self._client = self._connect()

    def _require_reachable(self) -> None:
        parts = urlsplit(self.address)
        try:
            port = parts.port or 443
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except OSError as error:
            raise ClusterError(
                f"no Ray job server answers at {self.address} ({error.strerror or error}): is the head up? Kubernetes: "
                "kubectl port-forward service/NAME-head-svc 8265"
            ) from None

    def _connect(self) -> JobSubmissionClient:
        with self._explained():
            from ray.job_submission import JobSubmissionClient

            return JobSubmissionClient(self.address)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Ray's and requests' errors as ours."""
        import requests
        from ray.exceptions import AuthenticationError
        from ray.util.state.exception import RayStateApiException

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(_token_message(self.address, str(error))) from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise ClusterError(f"the Ray job server at {self.address} does not answer: {_first_line(error)}") from None
        except (RuntimeError, RayStateApiException) as error:
            raise ClusterError(f"the Ray job server at {self.address} refuses: {_first_line(error)}") from None

    def shape(self) -> ClusterShape:
        """What the cluster's living nodes offer together."""
        from ray.util.state import list_nodes

        with self._explained():  # asked for living nodes alone, Ray takes the dead ones for missing
            known = list_nodes(address=self.address, limit=NODES, raise_on_missing_output=False)
        nodes = [node.resources_total for node in known if node.state == "ALIVE"]
        kinds = {key.removeprefix("accelerator_type:") for node in nodes for key in node if "accelerator_type:" in key}
        return ClusterShape(
            nodes=len(nodes),
            cpus=sum(node.get("CPU", 0.0) for node in nodes),
            accelerators=int(sum(node.get("GPU", 0) for node in nodes)),
            accelerator=sorted(kinds)[0] if kinds else "",
        )

    def attempts(self) -> list[Attempt]:
        """Every submitted job that the server remembers, oldest first; those of others are runs of their own name."""
        with self._explained():
            found = [_attempt(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda attempt: attempt.started_s or 0.0)

    def attempt(self, name: str) -> Attempt:
        """The last attempt of the run with this name, or the one attempt with this id.

        Raises:
            RequestError: there is none; the message names those there are.
        """
        known = self.attempts()
        if match := named(name, known):
            return match
        hint = did_you_mean(name, {a.submission_id for a in known}) if known else "none was submitted"
        raise RequestError(f"no run {name!r} at {self.address}; {hint}")

    def start(self, submission: Submission, choice: Choice, working_dir: str) -> None:
        """Send a run. Losing a race against the same submission is as good as winning it."""
        metadata = {RUN: submission.run, ATTEMPT: str(choice.attempt), REQUEST: submission.request}
        try:
            self._when_there_is_an_agent(
                lambda: self._client.submit_job(
                    entrypoint=submission.command,
                    submission_id=choice.submission_id,
                    runtime_env={**submission.runtime_env, "working_dir": working_dir},
                    metadata=metadata,
                    entrypoint_num_cpus=submission.cpus,
                )
            )
        except ClusterError:
            rival = next((a for a in self.attempts() if a.submission_id == choice.submission_id), None)
            if rival is None or rival.request != submission.request:
                raise

    def _when_there_is_an_agent(self, send: Callable[[], object]) -> None:
        """Send; a head answers before the agent is there that starts its jobs, so that is waited for.

        Raises:
            ClusterError: there is none after ``agent_patience_s``.
        """
        deadline = time.monotonic() + self._agent_patience_s
        while True:
            try:
                with self._explained():
                    send()
                return
            except ClusterError as error:
                if NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ClusterError(_no_agent_message(self.address)) from None
            time.sleep(POLL_S)

    def ask(self, words: Sequence[str], working_dir: str, note: Callable[[str], None]) -> str:
        """Run a short command on the cluster, and return what it printed; nothing is left of it.

        Raises:
            RequestError: the command refused.
        """
        number = f"ask-{secrets.token_hex(4)}"
        submission = Submission(number, shlex.join(["exec", "python", "-m", "orchestrator", *words]), number)
        with _code(working_dir, note) as code:
            self.start(submission, Choice(number, 1, None), code)
        ended = self.wait(self.attempt(number))
        said = self.logs(ended)
        with self._explained():
            self._client.delete_job(number)
        if ended.status == "SUCCEEDED":
            return said
        errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
        raise RequestError(errors[-1] if errors else f"the cluster could not be asked: {ended.message}")

    def logs(self, attempt: Attempt) -> str:
        """All that the run has printed so far."""
        with self._explained():
            return str(self._client.get_job_logs(attempt.submission_id))

    def stop(self, attempt: Attempt) -> None:
        """Ask a run to finish its step, save and end; ``wait`` tells when it has."""
        with self._explained():
            self._client.stop_job(attempt.submission_id)

    def wait(self, attempt: Attempt, timeout_s: float = math.inf) -> Attempt:
        """Wait for the end of a run, at most ``timeout_s`` seconds; returns it as it then is.

        Raises:
            ClusterLostError: the server was gone for longer than ``patience_s``.
        """
        deadline = time.monotonic() + timeout_s
        while not (attempt := self._look(attempt)).ended and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return attempt

    def follow(self, attempt: Attempt, say: Callable[[str], None], note: Callable[[str], None]) -> Attempt:
        """Hand over what the run prints as it does, until it ends; each character once, also over a lost connection.

        Raises:
            ClusterLostError: the server was gone for longer than ``patience_s``.
        """
        if attempt.status == "PENDING":
            note(f"{attempt.submission_id} waits for the cluster: {_first_line(attempt.message)}")
        while (attempt := self._look(attempt)).status == "PENDING":
            time.sleep(POLL_S)
        shown = 0
        while True:
            shown = asyncio.run(self._tail(attempt, say, shown))
            attempt = self._look(attempt)
            if attempt.ended:
                rest = self.logs(attempt)[shown:]  # what came after the stream had closed
                if rest:
                    say(rest)
                return attempt
            time.sleep(RECONNECT_S)

    async def _tail(self, attempt: Attempt, say: Callable[[str], None], shown: int) -> int:
        """Follow one connection; returns how many characters of the log are now shown."""
        position = 0
        stream: AsyncIterator[str] = self._client.tail_job_logs(attempt.submission_id)
        while (text := await self._next(stream, attempt)) is not None:
            new = text[max(0, shown - position) :]
            position += len(text)
            if new:
                say(new)  # what it raises is the caller's, and no lost connection
        return max(shown, position)

    async def _next(self, stream: AsyncIterator[str], attempt: Attempt) -> str | None:
        """The stream's next text, or None at its end or where it breaks; the caller looks whether the run has ended.

        A host that is cut off says nothing, so it is asked too.
        """
        import aiohttp

        waiting = asyncio.ensure_future(anext(stream, None))
        try:
            while not (await asyncio.wait({waiting}, timeout=CONNECT_S))[0]:
                if (await asyncio.to_thread(self._look, attempt)).ended:
                    return None
            return waiting.result()
        except (RuntimeError, aiohttp.ClientError, OSError):
            return None
        finally:
            waiting.cancel()

    def _look(self, attempt: Attempt) -> Attempt:
        """The attempt as it is now; a server that does not answer is asked again for ``patience_s``."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self._require_reachable()
                with self._explained():
                    return _attempt(self._client.get_job_info(attempt.submission_id))
            except ClusterError as error:
                if time.monotonic() > deadline:
                    raise ClusterLostError(
                        f"lost the cluster while following {attempt.submission_id}: {error}\nthe run may go on without "
                        f"this terminal; on a new cluster the same command resumes it from its last checkpoint"
                    ) from None
                time.sleep(POLL_S)


def _attempt(details: Any) -> Attempt:
    metadata = details.metadata or {}
    name = str(details.submission_id)
    return Attempt(
        submission_id=name,
        run=metadata.get(RUN, name),
        attempt=int(metadata.get(ATTEMPT, 1)),
        request=metadata.get(REQUEST, ""),
        status=getattr(details.status, "value", details.status),
        message=details.message or "",
        command=details.entrypoint,
        started_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
        driver_exit_code=details.driver_exit_code,
    )


def _token_message(address: str, said: str) -> str:
    if "401" in said or "required" in said.lower():
        return f"the Ray cluster at {address} wants a token: set RAY_AUTH_TOKEN to it"
    return f"the Ray cluster at {address} refuses the token in RAY_AUTH_TOKEN: ask its administrator for the right one"


def _no_agent_message(address: str) -> str:
    return (
        f"the Ray head at {address} answers, but not its agent, which starts jobs. Most often another Ray on that "
        "machine has the agent's port (52365 unless told otherwise); dashboard_agent.log of the head says so. End the "
        "other Ray, or start this head with --dashboard-agent-listen-port=PORT"
    )


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
