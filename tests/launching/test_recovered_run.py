"""Runs that meet trouble and get over it by themselves: out of memory, a hang, a node that is taken away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended, records

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_out_of_memory_and_then_a_hang(run: Callable[..., Ended], tmp_path: Path) -> None:
    options = ("--set", "failures.hang_least_s=4", "--set", "checkpoint.interval_steps=10")
    ended = run("broken_jobs:unlucky", *options)
    assert ended.code == 0, ended.err
    told = "out of memory with a micro batch of 32: starting the workers anew, at most 16 samples in a micro batch"
    assert told in ended.err
    assert "workers were lost and replaced; going on from step 20" in ended.err
    folder = tmp_path / "runs" / "unlucky"
    memory, hang = records(folder, "failures.jsonl")
    assert (memory["cause"], memory["action"], memory["step"]) == ("memory", "change", 0)
    assert "can't allocate memory" in memory["message"]
    assert (hang["cause"], hang["action"], hang["step"]) == ("hang", "restart", 20)
    assert hang["message"].startswith("no step for ")
    steps = records(folder)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert {(step["global_batch"], step["micro_batch"], step["accumulation"]) for step in steps} == {(64, 16, 2)}
    for rank in (0, 1):
        (found,) = (folder / "logs").glob(f"stacks-{rank}-*.txt")
        assert ("broken_jobs.py" in found.read_text()) == (rank == 1), "where each rank stood"
    starts = [record for record in records(folder, "attempts.jsonl") if record["event"] == "started"]
    assert [start.get("cause", "") for start in starts] == ["", "memory", "hang"]
    assert all(len(start["nodes"]) == 2 for start in starts)
