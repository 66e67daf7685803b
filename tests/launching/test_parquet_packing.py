"""Packing through Ray Data, from the command line to what a run reads."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import REPOSITORY, TIMEOUT_S

from orchestrator.errors import DataError
from orchestrator.job import Parquet
from orchestrator.launching.parquet_packing import _claim
from orchestrator.storage.store import open_store
from orchestrator.training.data import open_dataset
from s3_server import BUCKET


def orchestrator(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_of_two_packers_one_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    _claim(store, overwrite=False)
    with pytest.raises(DataError, match="is being packed by another process"):
        _claim(store, overwrite=False)
    _claim(store, overwrite=True)


def test_foreign_data_is_never_removed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("mine/a.parquet", b"")
    with pytest.raises(DataError, match=r"holds Parquet already \(mine/a.parquet\): choose another destination$"):
        _claim(store, overwrite=True)
    assert [entry.key for entry in store.list()] == ["mine/a.parquet"]


def test_bad_input_is_refused_before_a_cluster_is_started(tmp_path: Path) -> None:
    for arguments, problem in (
        (["data", "check", str(tmp_path / "none")], "no such file or folder"),
        (["data", "pack", str(tmp_path), str(tmp_path / "out")], "no file of a known kind"),
        (["data", "pack", str(tmp_path), str(tmp_path / "out"), "--as", "x"], "valid: arrays, csv, images, text"),
        (["data", "check", "s3://b/x", "--endpoint-url", "b"], "endpoint_url='b': write it as http://HOST:PORT"),
    ):
        done = orchestrator(*arguments)
        assert done.returncode == 2
        assert problem in done.stderr
        assert done.stderr.count("\n") == 1, "one clear message"
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_what_is_packed_is_what_a_run_reads(tmp_path: Path) -> None:
    """Every sample once, shuffled, the same by the same seed; and a second time only where it is asked for."""
    np.savez(tmp_path / "a.npz", x=np.arange(3000).reshape(1000, 3), y=np.arange(1000))
    source, out = str(tmp_path / "a.npz"), tmp_path / "out"
    command = ["data", "pack", source, str(out), "--row-group-mib", "0.004", "--json"]
    done = orchestrator(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["columns"]) == (1000, {"x": "int64[3]", "y": "int64"})
    assert found["row_groups"] > 4
    first = taken(str(out))
    assert sorted(first["y"].tolist()) == list(range(1000))
    assert first["y"].tolist() != list(range(1000))
    assert (first["x"][:, 0] == 3 * first["y"]).all()
    again = orchestrator(*command)
    assert again.returncode == 2
    assert "holds Parquet already" in again.stderr
    assert orchestrator(*command, "--overwrite").returncode == 0
    assert taken(str(out))["y"].tolist() == first["y"].tolist()
    checked = orchestrator("data", "check", str(out))
    assert checked.returncode == 0
    assert "verified every row group was read" in checked.stdout


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_images_are_packed_into_s3_and_a_bad_one_leaves_nothing(tmp_path: Path, s3: Any) -> None:
    for number in range(6):
        path = tmp_path / "in" / ("crow" if number % 2 else "owl") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([number]))
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    done = orchestrator("data", "pack", str(tmp_path / "in"), uri, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == ["crow", "owl"]
    store = open_store(uri)
    assert json.loads(store.read("classes.json")) == ["crow", "owl"]
    rows = open_dataset(Parquet(uri, columns={"image": "bytes", "label": "int64"}, decode=last_bytes)).take(
        np.arange(6)
    )
    assert sorted(zip(rows["number"], rows["label"], strict=True)) == [(n, int(n % 2 == 0)) for n in range(6)]
    bad = tmp_path / "in" / "owl" / "bad.png"
    bad.write_bytes(b"no image")
    done = orchestrator("data", "pack", str(tmp_path / "in"), f"{uri}-2")
    assert done.returncode == 2
    assert done.stderr == f"error: {bad}: does not begin as an image does; remove it from the source\n"
    assert list(open_store(f"{uri}-2").list()) == []


def last_bytes(columns: Any) -> dict[str, Any]:
    return {"number": np.array([image[-1] for image in columns["image"]]), "label": columns["label"]}


def taken(uri: str) -> Any:
    dataset = open_dataset(Parquet(uri))
    return dataset.take(np.arange(len(dataset)))
