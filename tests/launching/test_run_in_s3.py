"""Whole runs that live in S3, on Ray, through the command line: under faults, killed in every way, moved elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from commands import DIGITS, TIMEOUT_S, Ended, losses, records, wait_for_end, workers_of

import s3_server
from orchestrator.compression.weights import export_weights
from orchestrator.config import StorageConfig
from orchestrator.launching.compressing import export
from orchestrator.launching.replaying import replay_run
from orchestrator.storage.folder import find_run
from orchestrator.storage.stored_run import StoredRun
from s3_server import BUCKET, Weed

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]

Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., Ended]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Weed]:
    """A store of the test's own, to be killed; reached by the environment, as the command line reads it."""
    server = Weed(tmp_path / "weed")
    server.start()
    values = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "us-east-1"}
    values |= {"AWS_ACCESS_KEY_ID": s3_server.KEY, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}
    with s3_server.environment(values):
        yield server
    server.kill()


def copy_of(run: StoredRun, folder: Path) -> Path:
    target = folder / f"copy-{secrets.token_hex(4)}"
    target.mkdir()
    run.pull(target)
    return target


def wait_until(is_so: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        if process.poll() is not None:
            pytest.fail(f"the command has ended with {process.returncode}:\n{process.communicate()[1]}")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slowly(place: Path) -> tuple[tuple[str, ...], Path]:
    """The main job, slow while the file is there: a busy machine comes to what it wants before the run's end."""
    hold = place / "hold"
    hold.touch()
    return ("broken_jobs:held", "--arg", f"place={place}", "--arg", "wait_s=0.1"), hold


def saving(cache: Path, step: int) -> Callable[[], bool]:
    """Whether a save of ``step`` or later has begun on this machine's disk."""
    folders = cache / "runs"
    return lambda: any(
        int(path.name[5:13]) >= step for path in folders.glob("digits-*/checkpoints/step-*") if path.is_dir()
    )


def retries_told(targets: Path) -> float:
    """Requests to storage that were tried again, as the hub whose address lies in ``targets`` tells them."""
    for path in targets.glob("hub-*.json"):
        (address,) = json.loads(path.read_text())[0]["targets"]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
            return sum(
                float(line.split()[-1]) for line in lines if line.startswith("orchestrator_storage_retries_total{")
            )
    return 0.0


def test_faults_for_a_whole_run_change_nothing(
    undisturbed: Ended, server: Weed, command: Start, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth request is answered with 503, and of a hundred three are dropped; its metrics tell of it."""
    if reason := s3_server.no_haproxy():
        pytest.skip(reason)
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    job, hold = slowly(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)  # where the job is, for what is made of the run below
    with s3_server.faulty(server.endpoint, tmp_path) as endpoint:
        options = ("--set", f"checkpoint.uri={uri}", "--set", "checkpoint.interval_steps=45")
        monkeypatch.setenv("ORCHESTRATOR_TARGETS", str(tmp_path / "targets"))
        seen = ("--profile", "3:4", "--set", "telemetry.trackers=tensorboard")
        process = command(*job, *options, *seen, "--set", f"storage.endpoint_url={endpoint}")
        wait_until(lambda: retries_told(tmp_path / "targets") > 0, process)
        hold.unlink()
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["folder"] == f"{uri}/digits"
    assert summary["metrics"] == undisturbed.summary["metrics"]
    stored = StoredRun(f"{uri}/digits", StorageConfig())
    copy = copy_of(stored, tmp_path)
    assert losses(copy) == losses(Path(undisturbed.summary["folder"]))
    assert [name[:13] for name in stored.checkpoints()] == ["step-00000225", "step-00000270"]
    assert summary["checkpoint"] == f"{uri}/digits/checkpoints/{stored.checkpoints()[-1]}"
    assert json.loads((copy / "summary.json").read_bytes()) == summary
    assert (copy / "report.html").read_text().count("<svg") >= 5
    assert {entry.key.split("/")[0] for entry in stored.store.list("logs/")} == {"logs"}
    assert [entry.key for entry in stored.store.list("traces/")] == ["traces/steps-3-4-rank-0.json.gz"]
    (events,) = stored.store.list("tensorboard/")
    assert events.size_bytes > 1000
    assert not (tmp_path / "runs").exists(), "nothing lies where the command was given"
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "elsewhere"))
    assert replay_run(find_run(f"{uri}/digits"), "fixed", ())[0].steps == 270
    (entry,) = export(f"{uri}/digits", ["torch"], tmp_path / "exported")
    assert entry.metrics["accuracy"] == pytest.approx(summary["metrics"]["accuracy"])
    written = export_weights(f"{uri}/digits", tmp_path / "exported" / "digits.safetensors")
    assert written.checkpoint == stored.checkpoints()[-1]
    again = run(*job, *options)
    assert again.code == 0
    assert "finished already" in again.err
    assert again.summary == summary


@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_in_every_way_is_the_run_left_alone(
    undisturbed: Ended, server: Weed, command: Start, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten workers, one during a save and one during an upload; the store; the driver; then on, on another machine."""
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    fields = (f"checkpoint.uri={uri}", "checkpoint.interval_steps=10", "failures.max_restarts=10")
    options = (*(word for field in (*fields, "storage.retry_budget_s=60") for word in ("--set", field)),)
    cache = tmp_path / "one"
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(cache))
    stored = StoredRun(f"{uri}/digits", StorageConfig())
    job, hold = slowly(tmp_path)
    process = command(*job, *options)

    wait_until(saving(cache, 10), process)
    second = command(*job, *options)
    wait_until(saving(cache, 20), process)
    seed = secrets.randbelow(2**32)
    chance = random.Random(seed)
    progress, group = Progress(cache), Group(process)
    assert progress.newest() >= 20
    group.kill_one(chance)  # during the save, or just after it

    for number in range(8):
        others = group.wait_for_others()
        if number == 1:  # the worst moment of a start: Ray would forget these workers, but not the place they have
            wait_until(partial(have_met, process), process)
        elif number % 2:  # it starts or restores
            time.sleep(chance.uniform(0.0, 3.0))
        else:  # it trains, saves or uploads
            step = progress.newest() + chance.randint(1, 10)
            wait_until(lambda: progress.goes_on(others) and progress.newest() >= step, process)  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.2))
        group.kill_one(chance)

    others = group.wait_for_others()
    wait_until(partial(progress.goes_on, others), process)
    wait_until(saving(cache, progress.newest() + 10), process)
    weed = psutil.Process(server._process.pid)  # type: ignore[union-attr]
    weed.suspend()  # what is not uploaded yet stays where it is
    group.kill_one(chance)
    weed.resume()

    group.wait_for_others()
    wait_until(saving(cache, progress.newest() + 10), process)
    server.kill()
    time.sleep(1.0)
    with frozen(group.both()):  # or they might be done before it is back
        server.start()

    here = progress.newest()
    wait_until(lambda: stored.checkpoints()[-1:] > [f"step-{here:08d}"], process)
    _, refusal = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 2, "of two writers one wins"
    assert f"the run in {uri}/digits is owned by process {process.pid} on" in refusal
    err = kill_driver(process)
    assert "workers were lost and replaced; going on from step" in err
    told = [line for line in err.splitlines() if " of 10 without progress" in line]
    failed = records(next(cache.glob("runs/*/driver")), "failures.jsonl")
    assert told == [record["reason"] for record in failed], "each is said"
    assert len(failed) >= 10, "each kill of a worker is one"
    assert "raylet" not in err

    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another"))
    hold.unlink()
    done = run(*job, *options)
    assert done.code == 0, done.err
    assert "going on from checkpoint step-" in done.err
    assert "lost and replaced" not in done.err, "the driver's own first start is no restart"
    copy = copy_of(stored, tmp_path)
    assert losses(copy) == losses(Path(undisturbed.summary["folder"])), seed
    assert done.summary["metrics"] == undisturbed.summary["metrics"]
    starts = [record for record in records(copy, "attempts.jsonl") if record["event"] == "started"]
    assert [record["attempt"] for record in starts] == list(range(1, len(starts) + 1))
    assert 8 <= len(starts) <= 12, "each that trained is on record; those killed at their start may be"
    steps = [record["step"] for record in starts]
    assert steps == sorted(steps), "none goes on from further back than the one before it"
    assert steps[-1] > 0
    left = {entry.key.split("/")[1] for entry in stored.store.list("checkpoints/")}
    assert left == set(stored.checkpoints()), "what the crashes left is gone"
    assert server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


class Progress:
    """The newest step that the run has ever recorded on this machine's disk: dead workers' folders are cleared away."""

    def __init__(self, cache: Path) -> None:
        self._cache, self._newest = cache, 0

    def newest(self) -> int:
        folders = (self._cache / "runs").glob("digits-*/workers/*/")
        found = (int(record["step"]) for folder in folders for record in records(folder))
        self._newest = max(self._newest, *found, 0)
        return self._newest

    def goes_on(self, since: float) -> bool:
        """Whether a step was taken since that moment."""
        folders = (self._cache / "runs").glob("digits-*/workers/*/")
        return any(record["time"] > since for folder in folders for record in records(folder)[-1:])


def have_met(process: subprocess.Popen[str]) -> bool:
    """Whether a worker is connected with another: they form their process group."""
    ports: dict[tuple[int, str], set[int]] = {}
    for worker in workers_of(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in worker.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    ports.setdefault((worker.pid, "own"), set()).add(each.laddr.port)
                elif each.status == psutil.CONN_ESTABLISHED:
                    ports.setdefault((worker.pid, "others"), set()).add(each.raddr.port)
    pids = {pid for pid, _ in ports}
    return any(
        ports.get((one, "own"), set()) & ports.get((other, "others"), set()) for one in pids for other in pids - {one}
    )


class Group:
    """The two workers there are, told by their ids from those before: a process's name is gone while it changes it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._before: set[int] = set()

    def kill_one(self, chance: random.Random) -> None:
        """Kill one of them; Ray ends the other, and starts as many anew."""
        workers = self.both()
        self._before |= {worker.pid for worker in workers}
        chance.choice(workers).send_signal(signal.SIGKILL)

    def wait_for_others(self) -> float:
        """Until both of the next are there; returns the moment, when the old have taken their last step."""
        self.both()
        return time.time()

    def both(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []

        def are_there() -> bool:
            found[:] = [worker for worker in workers_of(self._process) if worker.pid not in self._before]
            return len(found) == 2

        wait_until(are_there, self._process)
        return found


@contextlib.contextmanager
def frozen(workers: list[psutil.Process]) -> Iterator[None]:
    for worker in workers:
        worker.suspend()
    yield
    for worker in workers:
        worker.resume()


def kill_driver(process: subprocess.Popen[str]) -> str:
    """Kill it, and see that nothing of the embedded cluster stays; returns what it had said."""
    family = psutil.Process(process.pid).children(recursive=True)
    words = {}
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            words[child.pid] = " ".join(child.cmdline())
    for wanted in ("RayTrainWorker", "TrainController", "HubActor"):
        assert any(wanted in line for line in words.values())
    for spared in ("PlacementGroupCleaner", "PreemptionWatcher", "DatasetManager", "AutoscalingCoordinator"):
        assert not any(spared in line for line in words.values()), "what an embedded cluster has no use for"
    process.kill()
    _, err = process.communicate()
    writers = [child for child in family if "Agent" not in words.get(child.pid, "")]
    wait_for_end(writers, TIMEOUT_S)  # whatever could write to the run
    wait_for_end(family, TIMEOUT_S)  # Ray's idle agents take a little longer to notice
    return err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "the store refuses the credentials (SignatureDoesNotMatch)"),
        ({"AWS_ACCESS_KEY_ID": s3_server.READER, "AWS_SECRET_ACCESS_KEY": s3_server.READER_SECRET}, "no permission"),
        ({}, "there is no bucket 'no-such-bucket': create it, or correct the address"),
    ],
)
def test_a_store_that_cannot_be_used_is_said_before_anything_starts(
    s3: Weed, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, change: dict[str, str], told: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    bucket = BUCKET if change else "no-such-bucket"
    message = refuse("run", DIGITS, "--set", f"checkpoint.uri=s3://{bucket}/x")
    assert told in message
    assert message.startswith(f"s3://{bucket}/x/digits")
    assert "\n" not in message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message
