"""Bad input never starts anything: one clear message with the remedy, exit code 2, no run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder

Refuse = Callable[..., str]
MLP = "jobs.vision:mlp"


@pytest.fixture(autouse=True)
def _nothing_started(tmp_path: Path) -> Iterator[None]:
    yield
    assert not (tmp_path / "runs").is_dir() or not any((tmp_path / "runs").rglob("config.json"))
    if "ray" in sys.modules:
        import ray

        assert not ray.is_initialized()


def test_unknown_module(refuse: Refuse) -> None:
    assert "no_such_jobs" in refuse("run", "no_such_jobs:digits")


def test_unknown_function_offers_the_real_ones(refuse: Refuse) -> None:
    message = refuse("run", "jobs.vision:digitz")
    assert "digitz" in message
    assert "digits" in message.replace("digitz", "")


def test_unknown_argument_offers_the_real_ones(refuse: Refuse) -> None:
    message = refuse("run", MLP, "--arg", "epoch=3")
    assert "epoch" in message
    assert "epochs" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scale.worker=2", ["scale.worker", "did you mean 'workers'"]),
        ("layout.micro_batch=many", ["layout.micro_batch", "'many'", "auto"]),
        ("layout.zero_stage=7", ["layout.zero_stage=7", "0, 1, 2, 3"]),
        ("layout.micro_batch=7", ["layout.micro_batch=7", "2 workers", "32 samples"]),
        ("layout.global_batch=63", ["layout.global_batch=63", "62 or 64"]),
        ("recipe.batch=100000", ["recipe.batch=100000", "larger than the training set of 1437"]),
        ("scale.workers=4096", ["scale.workers=4096", "CPUs", "set scale.workers="]),
        ("recipe.stop.metric=accuracy", ["recipe.stop", "at_least"]),
        ("layout.offload=all", ["layout.offload='all'", "no accelerator"]),
        ("recipe.optimizer.name=lamb", ["lamb", "adamw"]),
        ("checkpoint.uri=gs://bucket/runs", ["checkpoint.uri='gs://bucket/runs'"]),
    ],
)
def test_impossible_values(refuse: Refuse, override: str, words: list[str]) -> None:
    message = refuse("run", MLP, "--set", override)
    for word in words:
        assert word in message


def test_fp16_where_the_cpu_has_none(refuse: Refuse) -> None:
    import torch

    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU computes in fp16")
    message = refuse("run", MLP, "--set", "layout.precision=fp16", "--set", "scale.accelerators_per_worker=0")
    assert message == "layout.precision='fp16': this CPU has no fp16 arithmetic; use bf16, fp32 or auto"


def test_folder_that_cannot_be_written(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    message = refuse("run", MLP, "--set", "checkpoint.uri=taken")
    assert str(tmp_path / "taken" / "digits-mlp") in message
    assert "--set checkpoint.uri=" in message


def test_data_folder_that_cannot_be_written(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    assert "prepare step failed" in refuse("run", MLP, "--arg", "data=taken")


def test_corrupt_parquet(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "digits-data"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1 this is no Parquet file")
    (folder / "test.parquet").write_bytes(b"PAR1 this is no Parquet file")
    message = refuse("run", MLP, "--arg", "data=digits-data")
    assert "train.parquet: cannot be read as Parquet" in message


def test_empty_data(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "digits-data"
    folder.mkdir()
    empty = pa.table({"image": pa.array([], pa.list_(pa.uint8(), 64)), "label": pa.array([], pa.int64())})
    for name in ("train", "test"):
        pq.write_table(empty, folder / f"{name}.parquet")
    assert "holds no rows" in refuse("run", MLP, "--arg", "data=digits-data")


def test_no_cluster_at_the_address(refuse: Refuse) -> None:
    message = refuse("run", MLP, "--address", "127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in message


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1"])
def test_addresses_that_are_none(refuse: Refuse, address: str) -> None:
    assert address in refuse("run", MLP, "--address", address)


def test_a_run_that_another_process_owns(refuse: Refuse, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "digits-mlp")
    folder.create()
    lock = DriverLock(folder.control)
    try:
        message = refuse("run", MLP)
    finally:
        lock.release()
    assert "is owned by process" in message
    assert "--set name=" in message


@pytest.mark.parametrize("steps", ["20", "0:3", "a:b", "20,25"])
def test_steps_to_profile_are_a_range(refuse: Refuse, steps: str) -> None:
    assert refuse("run", MLP, "--profile", steps) == (
        f"--profile {steps}: write it as FIRST:LAST, steps counted from 1, as in 20:25"
    )


def test_steps_to_profile_rise(refuse: Refuse) -> None:
    assert "the range falls: write 20,25" in refuse("run", MLP, "--profile", "25:20")
