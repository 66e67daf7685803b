"""Whole runs of the main job, on Ray, through the command line: to the end, killed, stopped and broken."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import (
    DIGITS,
    FIXED,
    TIMEOUT_S,
    Ended,
    end_family,
    environment,
    losses,
    records,
    wait_for_step,
)
from ports import free_port

from orchestrator.planning.probe import Probe

pytestmark = pytest.mark.ray

MLP = "jobs.vision:mlp"
RAY = Path(sys.executable).with_name("ray")
Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., Ended]


def test_main_job_reaches_its_accuracy(undisturbed: Ended) -> None:
    summary = undisturbed.summary
    assert summary["state"] == "finished"
    assert summary["metrics"]["accuracy"] >= 0.97
    assert summary["step"] == 270
    assert summary["samples"] == 270 * 64
    folder = Path(summary["folder"])
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "plan.json", "metrics.jsonl", "attempts.jsonl", "report.html", "checkpoints"}
    assert (Path(summary["checkpoint"]) / "manifest.json").is_file()
    report = (folder / "report.html").read_text()
    assert report.count("<svg") >= 5
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_main_job_chooses_its_batch_and_explains_itself(run: Run, tmp_path: Path) -> None:
    """As `make run` starts it, but from a smaller reference batch, so that there is something to gain."""
    done = run(DIGITS, "--arg", "batch=16", "--set", "policy.name=goodput")
    assert done.code == 0, done.err
    summary, folder = done.summary, tmp_path / "runs" / "digits"
    assert summary["metrics"]["accuracy"] >= 0.97
    assert summary["progress"] >= 12 * 1437
    steps = records(folder)
    assert max(step["global_batch"] for step in steps) > 16
    decided = [d for d in records(folder, "decisions.jsonl") if d["event"] == "decided"]
    assert decided
    assert f"step {decided[0]['step']}: {decided[0]['kind']}: batch 16" in done.err
    words = [sys.executable, "-m", "orchestrator", "explain", "digits"]
    told = subprocess.run(words, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("because") == len(decided)
    report = (folder / "report.html").read_text()
    assert "Noise scale" in report
    assert "Decisions" in report
    words = [sys.executable, "-m", "orchestrator", "replay", "digits", "--policy", "fixed", "--json"]
    asked = subprocess.run(words, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["steps"] == pytest.approx(12 * 1437 / 16, rel=0.02)


def test_output_is_the_run_and_not_rays_noise(undisturbed: Ended) -> None:
    assert undisturbed.out.count("\n") == 1, "one JSON object and nothing else"
    for wanted in ("plan for digits", "64 = 2 workers x 32 micro batch", "samples/s", "evaluation at step", "left"):
        assert wanted in undisturbed.err
    for noise in ("raylet", "INFO", "WARNING", "Warning", "gcs", "ray::"):
        assert noise not in undisturbed.err


def test_evaluation_counts_the_held_out_fifth_once(undisturbed: Ended) -> None:
    accuracies = [e["metrics"]["accuracy"] for e in records(Path(undisturbed.summary["folder"]), "evaluations.jsonl")]
    assert len(accuracies) >= 6
    for accuracy in accuracies:  # 360 samples: any other count would give other fractions
        assert accuracy * 360 == pytest.approx(round(accuracy * 360), abs=1e-6)


def test_finished_run_says_so_at_once(undisturbed: Ended) -> None:
    folder = Path(undisturbed.summary["folder"]).parents[1]
    words = [sys.executable, "-m", "orchestrator", "run", DIGITS, "--json", *FIXED]
    again = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert json.loads(again.stdout) == undisturbed.summary


def test_signals_save_and_say_how_to_go_on_and_a_corrupt_checkpoint_is_set_aside(
    undisturbed: Ended, command: Start, run: Run, tmp_path: Path
) -> None:
    """Stopped by Ctrl-C, gone on; stopped by TERM, and what that saved is damaged, gone on from the one before."""
    held = ("broken_jobs:held", "--arg", f"place={tmp_path}")
    options = ("--set", "checkpoint.interval_steps=40", "--set", "checkpoint.keep=3")
    folder, hold = tmp_path / "runs" / "digits", tmp_path / "hold"
    hold.touch()
    process = command(*held, *options)
    wait_for_step(folder, 50, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    interrupted = stopped(process, folder)

    process = command(*held, *options)
    wait_for_step(folder, interrupted + 50, process)
    process.send_signal(signal.SIGTERM)  # a supervisor sends it to the process it knows
    terminated = stopped(process, folder)
    *_, before, newest = sorted((folder / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{terminated:08d}"
    shard = next(newest.rglob("zero_pp_rank_1*.pt"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)

    hold.unlink()
    done = run(*held, *options)
    assert done.code == 0, done.err
    assert f"{newest} is corrupt: state/{shard.name} has other bytes" in done.err
    assert f"set aside as set-aside-{newest.name}" in done.err
    assert f"going on from checkpoint {before.name}" in done.err
    assert (folder / "checkpoints" / f"set-aside-{newest.name}").is_dir()
    starts = [record["step"] for record in records(folder, "attempts.jsonl") if record["event"] == "started"]
    assert starts == [0, interrupted, int(before.name[5:])]
    assert losses(folder) == losses(Path(undisturbed.summary["folder"]))


def stopped(process: subprocess.Popen[str], folder: Path) -> int:
    """The step at which a run that has got a signal says it has stopped."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, err
    assert "run the same command again" in err
    said = json.loads(out)
    assert said["state"] == "stopped"
    assert said["checkpoint"].endswith(f"step-{said['step']:08d}")
    assert len(losses(folder)) == said["step"] < 270
    return int(said["step"])


def test_a_probe_survives_a_rank_that_runs_out_of_memory_and_the_plan_goes_by_it(run: Run, tmp_path: Path) -> None:
    """Rank 1 alone fails above 16 samples, while rank 0 waits for it."""
    words = ("broken_jobs:small_memory", *FIXED, "--set", "recipe.stop.epochs=1")
    ended = run(*words, "--probe", "--json")
    assert ended.code == 0, ended.err
    said = ended.err.splitlines()
    assert [line.split(":")[0].strip() for line in said if line.startswith("  micro batch")] == [
        "micro batch 8",
        "micro batch 32",
        "micro batch 16",
    ]
    assert any(line.endswith("micro batch 32: out of memory") for line in said)
    folder = tmp_path / "runs" / "small-memory"
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["micro_batch"], plan["accumulation"]) == (16, 2)
    assert plan["timed"]
    assert "micro batches timed on cpu" in plan["confidence"]
    trials = json.loads((folder / "probe.json").read_text())["trials"]
    timed = {trial["micro_batch"]: trial["step_time_s"] for trial in trials if trial["peak_bytes"]}
    assert set(timed) == {8, 16}
    model = Probe.from_dict(json.loads((folder / "probe.json").read_text())).model
    assert model is not None
    by_times = model.step_time_s(nodes=1, workers=2, micro_batch=16, accumulation=2)
    assert plan["step_time_s"] == pytest.approx(by_times, rel=1e-3), "a step of 16 x 2, by what was timed"
    # On a busy machine the smaller one may have taken longer.
    assert 0.7 * min(timed.values()) < plan["step_time_s"] < 1.3 * max(timed.values())
    # Another run of the same job plans by what was found.
    words = [sys.executable, "-m", "orchestrator", "plan", *words, "--set", "name=other", "--json"]
    again = subprocess.run(
        words, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert json.loads(again.stdout)["micro_batch"] == 16, again.stderr


def test_changed_config_is_refused_with_the_fields_that_differ(run: Run, undisturbed: Ended) -> None:
    uri = str(Path(undisturbed.summary["folder"]).parent)
    changed = run(DIGITS, "--set", f"checkpoint.uri={uri}", "--set", "recipe.optimizer.learning_rate=0.5")
    assert changed.code == 2
    assert "recipe.optimizer.learning_rate: 0.006 -> 0.5" in changed.err
    assert "--force-config" in changed.err
    assert "checkpoint.uri:" not in changed.err, "where checkpoints lie does not change what is computed"


def test_existing_cluster_is_used_and_left_alone(whole: Ended, run: Run, head: Head) -> None:
    assert whole.summary["metrics"]["accuracy"] >= 0.9
    too_many = run(MLP, "--address", head.address, "--set", "scale.workers=9")
    assert too_many.code == 2
    assert "scale.workers=9" in too_many.err
    assert head.process.poll() is None


def test_bug_in_the_job_is_shown_once_with_rank_step_and_the_users_line(run: Run, head: Head, tmp_path: Path) -> None:
    ended = run("broken_jobs:buggy", "--address", head.address)
    assert ended.code == 1
    lines = ended.err.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first] == "error: ZeroDivisionError on rank 1, step 30: division by zero"
    assert "broken_jobs.py" in lines[first + 1]
    assert lines[first + 2].strip() == "return super().loss(model, batch) * (1 / 0)  # the bug"
    assert "Traceback" in ended.err
    starts = [r for r in records(tmp_path / "runs" / "buggy", "attempts.jsonl") if r["event"] == "started"]
    assert len(starts) == 1, "a bug is not retried"
    summary = json.loads((tmp_path / "runs" / "buggy" / "summary.json").read_bytes())
    assert (summary["state"], summary["step"], summary["samples"]) == ("failed", 29, 29 * 64)
    assert summary["loss"] == records(tmp_path / "runs" / "buggy")[-1]["loss"]


def test_a_run_waits_for_room_and_says_so_and_nan_stops_it_and_names_the_last_good_checkpoint(
    command: Start, head: Head
) -> None:
    with occupied(head, cpus=3) as other:
        process = command("broken_jobs:nan", "--set", "checkpoint.interval_steps=20", "--address", head.address)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "waiting for room" in line:
                other.kill()
    err = "".join(lines)
    assert "waiting for room for 2 workers with 1 CPU each: free are 1 of 4 CPU; others use the rest" in err
    assert process.wait(TIMEOUT_S) == 1
    assert "step 30: loss nan" in err
    assert "checkpoints/step-00000020" in err
    assert "failures.skip_nonfinite_steps" in err
    assert "Traceback" not in err


OCCUPY = """
import sys, ray
from ray.util import placement_group
ray.init(address=sys.argv[1], log_to_driver=False)
group = placement_group([{"CPU": float(sys.argv[2])}])
print("there" if group.wait(200) else "no room", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def occupied(head: Head, *, cpus: int) -> Iterator[subprocess.Popen[str]]:
    """Somebody else's program that holds so many CPUs of the cluster until it ends."""
    words = [sys.executable, "-c", OCCUPY, head.address, str(cpus)]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, env=env, text=True, **pipes) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "there\n"
            yield other
        finally:
            other.kill()


def test_a_run_goes_on_with_another_number_of_workers(
    whole: Ended, head: Head, command: Start, run: Run, tmp_path: Path
) -> None:
    """The MLP computes the same step in every layout; 2 -> 1 workers also takes the plan from ZeRO stage 1 to 0."""
    there = ("--address", head.address)
    held = ("broken_jobs:held_mlp", "--arg", f"place={tmp_path}", *there)
    folder, hold = tmp_path / "runs" / "digits-mlp", tmp_path / "hold"
    hold.touch()
    process = command(*held)
    wait_for_step(folder, 40, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    stopped = len(losses(folder))
    hold.unlink()
    done = run(*held, "--set", "scale.workers=1")
    assert done.code == 0, done.err
    assert f"step {stopped}: refactor: batch 64 (2x32x1) -> 64 (1x32x2): 2 -> 1 workers: global batch kept" in done.err
    assert losses(folder) == pytest.approx(losses(Path(whole.summary["folder"])), rel=1e-4)
    assert {record["workers"] for record in records(folder)[stopped:]} == {1}
    assert [one["workers"] for one in records(folder, "attempts.jsonl") if one["event"] == "started"] == [2, 1]


def test_a_run_with_a_range_of_workers_follows_the_cluster(
    whole: Ended, head: Head, command: Start, tmp_path: Path
) -> None:
    """Room for one worker on the head and for one on another node, which is lost and replaced; each step once.

    It may begin with one worker: Ray starts with what it has seen of the cluster by then.
    """
    slowly = ("broken_jobs:held_mlp", "--arg", f"place={tmp_path}", "--arg", "wait_s=0.3", "--address", head.address)
    fields = (
        "scale.workers=1,2",
        "scale.cpus_per_worker=3",
        "scale.resize_interval_s=2",
        "checkpoint.interval_steps=15",
    )
    folder, hold = tmp_path / "runs" / "digits-mlp", tmp_path / "hold"
    hold.touch()

    def at_work() -> int:
        return records(folder)[-1]["workers"] if records(folder) else 0

    def started() -> list[dict[str, Any]]:
        return [record for record in records(folder, "attempts.jsonl") if record["event"] == "started"]

    with node_of(head, tmp_path / "first"):
        process = command(*slowly, *(word for field in fields for word in ("--set", field)))
        wait_until(lambda: sum(step["workers"] == 2 for step in records(folder)) > 20, process)  # it has saved
    wait_until(lambda: at_work() == 1, process)
    with node_of(head, tmp_path / "second"):
        wait_until(lambda: started()[-1]["cause"] == "resized", process)
        hold.unlink()
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    before, fewer, more = started()[-3:]
    assert [start["workers"] for start in (before, fewer, more)] == [2, 1, 2]
    assert (fewer["cause"], more["cause"]) == ("worker_lost", "resized")
    assert f"now 2 workers; going on from step {more['step']}" in err
    assert "refactor: batch 64 (2x32x1) -> 64 (1x32x2): 2 -> 1 workers: global batch kept" in err
    assert "refactor: batch 64 (1x32x2) -> 64 (2x32x1): 1 -> 2 workers: global batch kept" in err
    steps = records(folder)
    assert {step["workers"] for step in steps if fewer["step"] < step["step"] <= more["step"]} == {1}
    assert (more["step"] % 15, more["step"] > fewer["step"]) == (0, True), "it grew when it had saved"
    assert losses(folder) == pytest.approx(losses(Path(whole.summary["folder"])), rel=1e-4)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one machine that is there before the run and stays after it."""

    process: subprocess.Popen[bytes]
    address: str


@pytest.fixture(scope="module")
def whole(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The MLP at a fixed batch, left alone, on a cluster that exists."""
    folder = tmp_path_factory.mktemp("whole")
    words = [sys.executable, "-m", "orchestrator", "run", MLP, "--json", *FIXED, "--address", head.address]
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    port = free_port()
    words = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=4", "--include-dashboard=false"]
    env = {**environment(folder), "RAY_AUTH_MODE": "disabled"}
    with pytest.MonkeyPatch.context() as patch, (folder / "head.log").open("w") as log:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        process = subprocess.Popen(words, env=env, cwd=folder, stdout=log, stderr=log)
        try:
            wait_until_started(process, folder / "head.log")
            yield Head(process, f"127.0.0.1:{port}")
        finally:
            end_family(process)  # asked politely, a head takes over half a minute


@contextlib.contextmanager
def node_of(head: Head, folder: Path) -> Iterator[None]:
    """Another node of the head's cluster, with three CPUs; killed at the end, as a lost machine would be."""
    folder.mkdir()
    words = [RAY, "start", "--block", f"--address={head.address}", "--num-cpus=3"]
    env = {**environment(folder), "RAY_AUTH_MODE": "disabled"}
    log = folder / "node.log"
    with log.open("w") as stream:
        process = subprocess.Popen(words, env=env, cwd=folder, stdout=stream, stderr=stream)
    try:
        wait_until_started(process, log)
        yield
    finally:
        end_family(process)


def wait_until_started(node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
