"""Runs that meet trouble and get over it by themselves: out of memory, a hang, a node that is taken away."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import TIMEOUT_S, Ended, end_family, environment, losses, records, wait_for, wait_for_step
from ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_out_of_memory_and_then_a_hang(run: Callable[..., Ended], tmp_path: Path) -> None:
    # Longer than a busy machine holds up a step.
    options = ("--set", "failures.hang_least_s=20", "--set", "checkpoint.interval_steps=10")
    ended = run("broken_jobs:unlucky", *options)
    assert ended.code == 0, ended.err
    told = "out of memory with a micro batch of 32: starting the workers anew, at most 16 samples in a micro batch"
    assert told in ended.err
    assert "workers were lost and replaced; going on from step 10" in ended.err
    folder = tmp_path / "runs" / "unlucky"
    memory, hang = records(folder, "failures.jsonl")
    assert (memory["cause"], memory["action"], memory["step"]) == ("memory", "change", 0)
    assert "can't allocate memory" in memory["message"]
    assert (hang["cause"], hang["action"], hang["step"]) == ("hang", "restart", 10)
    assert hang["message"].startswith("no step for ")
    steps = records(folder)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert {(step["global_batch"], step["micro_batch"], step["accumulation"]) for step in steps} == {(64, 16, 2)}
    for rank in (0, 1):
        (found,) = (folder / "logs").glob(f"stacks-{rank}-*.txt")
        assert ("broken_jobs.py" in found.read_text()) == (rank == 1), "where each rank stood"
    starts = started(folder)
    assert [start.get("cause", "") for start in starts] == ["", "memory", "hang"]
    assert all(len(start["nodes"]) == 2 for start in starts)


def started(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder, "attempts.jsonl") if record["event"] == "started"]


RAY = Path(sys.executable).with_name("ray")
GRACE_S = 20


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start nodes of one cluster on this machine, as a pod would: by ``ray start --block``."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> subprocess.Popen[bytes]:
        env = {**environment(tmp_path), "RAY_AUTH_MODE": "disabled"}
        env |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(GRACE_S)}
        log = tmp_path / f"node-{len(started)}.log"
        words = [RAY, "start", "--block", *options]
        with log.open("wb") as stream:
            started.append(subprocess.Popen(words, env=env, cwd=tmp_path, stdout=stream, stderr=stream))
        deadline = time.monotonic() + TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert started[-1].poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return started[-1]

    yield start
    end_family(*started)


def test_a_node_that_is_taken_away_is_left_in_time(
    undisturbed: Ended,
    node: Callable[..., subprocess.Popen[bytes]],
    command: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """All that the run keeps is what it saved on notice: it saves at no other time."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    node("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
    leaving = node(f"--address={address}", "--num-cpus=2")
    # So slowly that it is not at its end before it hears of it.
    slowly = ("broken_jobs:held", "--arg", f"place={tmp_path}", "--arg", "wait_s=0.2")
    (tmp_path / "hold").touch()
    process = command(*slowly, "--address", address, "--set", "checkpoint.interval_s=1000")
    folder = tmp_path / "runs" / "digits"
    wait_for_step(folder, 20, process)
    leaving.send_signal(signal.SIGTERM)
    node(f"--address={address}", "--num-cpus=2")
    wait_for(lambda: len(started(folder)) == 2, process)
    (tmp_path / "hold").unlink()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "nodes will be taken away (rank 0, 1 is there): saving now" in err
    starts = started(folder)
    assert len(starts) == 2
    assert (starts[1]["step"] >= 20, starts[1]["cause"]) == (True, "preempted")
    assert [record["cause"] for record in records(folder, "failures.jsonl")] == ["preempted"]
    assert set(starts[0]["nodes"]).isdisjoint(starts[1]["nodes"])
    assert losses(folder) == losses(Path(undisturbed.summary["folder"]))
