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
from commands import DIGITS, TIMEOUT_S, Ended, losses, records, workers_of

import s3_server
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


def others(process: subprocess.Popen[str], past: set[int]) -> list[psutil.Process]:
    """The run's workers that are not in ``past``."""
    return [worker for worker in workers_of(process) if worker.pid not in past]


def wait_until(is_so: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    with s3_server.faulty(server.endpoint, tmp_path) as endpoint:
        options = ("--set", f"checkpoint.uri={uri}", "--set", "checkpoint.interval_steps=45")
        monkeypatch.setenv("ORCHESTRATOR_TARGETS", str(tmp_path / "targets"))
        seen = ("--profile", "3:4", "--set", "telemetry.trackers=tensorboard")
        process = command(DIGITS, *options, *seen, "--set", f"storage.endpoint_url={endpoint}")
        wait_until(lambda: retries_told(tmp_path / "targets") > 0, process)
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
    again = run(DIGITS, *options)
    assert again.code == 0
    assert "finished already" in again.err
    assert again.summary == summary


def test_a_run_that_is_killed_in_every_way_is_the_run_left_alone(
    undisturbed: Ended, server: Weed, command: Start, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker during a save, a worker during an upload, the store itself, the driver; then on, on another machine."""
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    options = (
        "--set",
        f"checkpoint.uri={uri}",
        "--set",
        "checkpoint.interval_steps=20",
        "--set",
        "storage.retry_budget_s=60",
    )
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "one"))
    stored = StoredRun(f"{uri}/digits", StorageConfig())
    process = command(DIGITS, *options)

    wait_until(saving(tmp_path / "one", 20), process)
    second = command(DIGITS, *options)
    wait_until(saving(tmp_path / "one", 40), process)
    workers_of(process)[-1].send_signal(signal.SIGKILL)  # during the save, or just after it

    wait_until(saving(tmp_path / "one", 100), process)
    weed = psutil.Process(server._process.pid)  # type: ignore[union-attr]
    weed.suspend()  # what is not uploaded yet stays where it is
    killed = workers_of(process)[0]
    killed.send_signal(signal.SIGKILL)  # during the upload
    weed.resume()

    wait_until(saving(tmp_path / "one", 160), process)
    server.kill()
    time.sleep(1.0)
    server.start()

    wait_until(lambda: stored.checkpoints()[-1:] > ["step-00000160"], process)
    _, refusal = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 2, "of two writers one wins"
    assert f"the run in {uri}/digits is owned by process {process.pid} on" in refusal
    assert process.poll() is None
    process.kill()
    process.wait()

    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another"))
    done = run(DIGITS, *options)
    assert done.code == 0, done.err
    assert "going on from checkpoint step-" in done.err
    copy = copy_of(stored, tmp_path)
    assert losses(copy) == losses(Path(undisturbed.summary["folder"]))
    assert done.summary["metrics"] == undisturbed.summary["metrics"]
    starts = [record for record in records(copy, "attempts.jsonl") if record["event"] == "started"]
    assert len(starts) == 4
    assert [record["attempt"] for record in starts] == [1, 2, 3, 4]
    assert all(record["step"] > 0 for record in starts[1:])
    left = {entry.key.split("/")[1] for entry in stored.store.list("checkpoints/")}
    assert left == set(stored.checkpoints()), "what the crashes left is gone"
    assert server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    "ORCHESTRATOR_LONG_TESTS" not in os.environ,
    reason="about four minutes on two CPUs: set ORCHESTRATOR_LONG_TESTS=1 to run it",
)
def test_ten_workers_killed_at_random_moments_change_nothing(
    server: Weed, command: Start, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they start, restore, train, save (every tenth step) and upload: whatever the moment happens to be."""
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    fields = (f"checkpoint.uri={uri}", "checkpoint.interval_steps=10", "failures.max_restarts=10")
    long = (DIGITS, "--arg", "epochs=40")  # or it would end before the tenth
    left_alone = run(*long)
    process = command(*long, *(word for field in fields for word in ("--set", field)))
    seed = secrets.randbelow(2**32)
    chance = random.Random(seed)
    kills, past = 0, set[int]()
    while kills < 10:
        wait_until(partial(others, process, past), process)
        time.sleep(chance.uniform(0.0, 10.0))
        assert process.poll() is None, f"it ended before the tenth kill, seed {seed}"
        workers = others(process, past)
        past |= {worker.pid for worker in workers}
        if workers:  # they may have been replaced just now, after the kill before
            chance.choice(workers).send_signal(signal.SIGKILL)
            kills += 1
    out, err = process.communicate(timeout=2 * TIMEOUT_S)
    assert process.returncode == 0, (seed, err)
    stored = StoredRun(f"{uri}/digits", StorageConfig())
    copy = copy_of(stored, tmp_path)
    assert losses(copy) == losses(Path(left_alone.summary["folder"])), seed
    assert json.loads(out)["metrics"] == left_alone.summary["metrics"]
    left = {entry.key.split("/")[1] for entry in stored.store.list("checkpoints/")}
    assert left == set(stored.checkpoints()), "what the crashes left is gone"


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
