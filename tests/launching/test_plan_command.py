"""`orchestrator plan` as it is typed: clusters that do not exist, stable JSON keys, DeepSpeed's own JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import environment

from orchestrator.telemetry import human

KEYS = {
    *("fits", "zero_stage", "offload", "activation_checkpointing", "precision", "micro_batch", "accumulation"),
    *("global_batch", "memory_bytes", "device_memory_bytes", "step_time_s", "samples_per_s", "mfu", "reasons"),
    "alternatives",
}
SMALL = ("--arg", "layers=2", "--arg", "width=64", "--arg", "heads=4", "--arg", "sequence=32", "--arg")
GPT = ("plan", "jobs.language:gpt", *SMALL, "vocabulary=512")
Say = Callable[..., str]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Say:
    """Give a command that succeeds, in a folder of its own, and return what it prints."""
    from orchestrator import cli

    def said(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["orchestrator", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code in (0, None), err
        return out

    return said


def as_json(say: Say, *words: str) -> dict[str, Any]:
    return json.loads(say(*GPT, *words, "--json"))


def test_a_cluster_that_does_not_exist(say: Say, tmp_path: Path) -> None:
    """Nothing is written: not even the data, since the task says what a sample looks like."""
    made = as_json(say, "--workers", "16", "--accelerator", "H100", "--set", "layout.micro_batch=4")
    assert made.keys() >= KEYS
    assert made["fits"]
    assert (made["global_batch"], made["micro_batch"], made["nodes"]) == (64, 4, 2)
    assert made["memory_bytes"]["total"] == sum(
        size for name, size in made["memory_bytes"]["breakdown"].items() if name != "host"
    )
    assert {other["zero_stage"] for other in made["alternatives"]} == {0, 1, 2, 3}
    assert list(tmp_path.iterdir()) == []


def test_pins_are_kept_and_what_cannot_fit_is_said(say: Say) -> None:
    pins = ("--set", "layout.zero_stage=3", "--set", "layout.activation_checkpointing=true", "--set")
    made = as_json(say, "--workers", "4", "--accelerator", "t4", *pins, "layout.offload=none")
    assert (made["zero_stage"], made["activation_checkpointing"], made["offload"]) == (3, True, "none")
    assert made["precision"] == "fp16"
    small = as_json(say, "--workers", "4", "--accelerator", "t4", "--set", "planning.memory_share=0.1")
    assert (small["fits"], small["tight"]) == (True, True)
    small = as_json(say, "--workers", "4", "--accelerator", "t4", "--set", "planning.memory_share=0.03")
    assert (small["fits"], small["tight"]) == (False, False)


def test_a_shorter_sequence_is_a_remedy(say: Say) -> None:
    """On an accelerator whose memory lies between what this sequence and half of it need."""
    pins = ["zero_stage=0", "micro_batch=1", "activation_checkpointing=false", "offload=none"]
    words = ["--workers", "1", "--accelerator", "t4"]
    for pin in pins:
        words += ["--set", f"layout.{pin}"]
    whole, half = (as_json(say, *words, "--arg", f"sequence={length}") for length in (8192, 4096))
    between = (whole["memory_bytes"]["needed"] + half["memory_bytes"]["needed"]) / 2
    made = as_json(
        say,
        *words,
        "--arg",
        "sequence=8192",
        "--set",
        f"planning.memory_share={between / whole['device_memory_bytes']}",
    )
    assert not made["fits"]
    assert "--arg sequence=4096" in made["changes"]


def test_a_slower_network_makes_a_slower_step(say: Say) -> None:
    wide = ("--workers", "8", "--nodes", "8", "--accelerator", "l4", "--network")
    assert as_json(say, *wide, "1")["step_time_s"] > as_json(say, *wide, "1000")["step_time_s"]


def test_the_text_holds_the_breakdown_and_the_stages(say: Say) -> None:
    said = say(*GPT, "--workers", "8", "--accelerator", "a100-40gb", "--explain")
    for words in ("plan for gpt", "memory", "gradients at the end of the backward pass", "chosen", "MFU "):
        assert words in said


def test_the_formulas_hold_numbers_that_add_up(say: Say) -> None:
    words = ("--workers", "16", "--accelerator", "l4", "--set", "layout.zero_stage=3", "--set", "layout.offload=none")
    lines = say(*GPT, *words, "--explain").splitlines()
    made = as_json(say, *words)
    rows = [line.split(None, 1) for line in lines[lines.index(next(x for x in lines if x.startswith("P, N"))) :]]
    said = [" ".join(row) for row in rows]
    traffic = made["terms"]["step"]["traffic"]
    assert {name.split()[0] for name in traffic["bytes_by_operation"]} == {"all-gather", "reduce-scatter"}
    assert sum(line.startswith("volume") for line in said) == 2
    volumes = re.findall(r"volume .*? / (.*)/s = ", "\n".join(said))
    assert set(volumes) == {human.size(traffic["bytes_per_s"])}
    assert any(line.startswith("matmul") and "121 TFLOP/s" in line for line in said)
    assert any(line.startswith("masters 4 bytes x P / 16 = 4 x ") for line in said)
    assert any(line.endswith(f"= {1000 * made['step_time_s']:.4g} ms") for line in said if line.startswith("step"))


def test_deepspeeds_own_json(say: Say) -> None:
    rendered = json.loads(say(*GPT, "--workers", "8", "--accelerator", "a100-40gb", "--deepspeed-config"))
    assert rendered["train_batch_size"] == 8
    assert rendered["bf16"] == {"enabled": True}


def test_the_machine_at_hand(say: Say) -> None:
    """No accelerator: the data are written and opened, and host memory is what a worker has."""
    made = json.loads(say("plan", "jobs.vision:mlp", "--set", "scale.workers=1", "--json"))
    assert made["fits"]
    assert (made["device"], made["micro_batch"], made["accumulation"], made["zero_stage"]) == ("cpu", 64, 1, 1)
    assert made["train_samples"] == 1437


def test_an_unknown_accelerator(refuse: Say) -> None:
    assert "valid: a100-40gb" in refuse(*GPT, "--workers", "8", "--accelerator", "k9000")


def test_more_nodes_than_workers(refuse: Say) -> None:
    assert "there are only 2 workers" in refuse(*GPT, "--workers", "2", "--nodes", "3", "--accelerator", "t4")


def test_where_nothing_is_costed_the_keys_are_there_and_the_reason_is_given(say: Say) -> None:
    own = [f"planning.accelerator.{each}" for each in ("name=mine", "memory_gib=32", "fp32_tflops=10")]
    own += ["planning.accelerator.memory_gb_per_s=500", "layout.precision=bf16"]
    words = [word for each in own for word in ("--set", each)]
    made = as_json(say, "--workers", "4", "--accelerator", "mine", *words)
    assert made.keys() >= KEYS | {"tight", "changes", "run_time_s", "cost"}
    unknown = {"fits", "memory_bytes", "device_memory_bytes", "step_time_s", "samples_per_s", "mfu", "alternatives"}
    assert {key for key in KEYS if made[key] is None} == unknown
    assert any("mine has no known rate in bf16" in reason for reason in made["reasons"])


def test_an_accelerator_of_ones_own_from_the_command_line(say: Say, refuse: Say) -> None:
    own = ["name=mine", "memory_gib=32", "fp32_tflops=10", "bf16_tflops=100", "memory_gb_per_s=500"]
    words = [word for each in own for word in ("--set", f"planning.accelerator.{each}")]
    made = as_json(say, "--workers", "4", "--accelerator", "mine", *words)
    assert made["fits"]
    assert (made["accelerator"], made["device_memory_bytes"]) == ("mine", 32 * 2**30)
    assert "planning.accelerator.fp32_tflops: is required; add it" in refuse(*GPT, *words[:4])
    said = refuse(*GPT, "--set", "planning.accelerator={}")
    assert "'planning.accelerator' is a section: set one of its fields: name, memory_gib" in said


def test_the_remedy_for_a_pinned_accumulation_is_no_contradiction(say: Say) -> None:
    pins = ["accumulation=1", "global_batch=128", "zero_stage=3", "offload=none", "activation_checkpointing=false"]
    words = ["--workers", "2", "--accelerator", "t4"]
    for pin in pins:
        words += ["--set", f"layout.{pin}"]
    whole = as_json(say, *words)["memory_bytes"]
    share = (whole["needed"] - whole["breakdown"]["activations"] // 2) / (15 * 2**30)
    words += ["--set", f"planning.memory_share={share}"]
    made = as_json(say, *words)
    assert not made["fits"]
    said = made["changes"][0]
    assert said.startswith("layout.accumulation=")
    for change in said.split(" and "):
        words += ["--set", change]
    assert as_json(say, *words)["fits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "width", "heads", "cluster", "most_s"),
    [(32, 4096, 32, ("8", "a100-40gb"), 20.0), (80, 8192, 64, ("64", "h100-80gb"), 40.0)],
    ids=["7B", "70B"],
)
def test_the_largest_models_are_planned_on_a_laptop(
    tmp_path: Path, layers: int, width: int, heads: int, cluster: tuple[str, str], most_s: float
) -> None:
    """In 4 GiB at most; in so much processor time, which does not hang on what else the machine does."""
    sizes = [f"layers={layers}", f"width={width}", f"heads={heads}", "sequence=2048", "vocabulary=50368"]
    words = ["jobs.language:gpt", *(word for size in sizes for word in ("--arg", size)), "--workers", cluster[0]]
    with (tmp_path / "plan.json").open("wb") as out:
        command = [sys.executable, "-m", "orchestrator", "plan", *words, "--accelerator", cluster[1], "--json"]
        process = subprocess.Popen(command, stdout=out, env=environment(tmp_path), cwd=tmp_path)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]
    assert used.ru_maxrss * 1024 < 4 * 2**30
    assert used.ru_utime + used.ru_stime < most_s
