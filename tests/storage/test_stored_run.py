"""A run in a store: which checkpoints exist, what a crash leaves, and the folders of this machine."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config import StorageConfig
from orchestrator.errors import CheckpointError, ConfigError, StorageError
from orchestrator.storage.folder import find_run
from orchestrator.storage.stored_run import StoredRun, own_folder, working_folder
from s3_server import BUCKET, Weed

MakeRun = Callable[[], StoredRun]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> StoredRun:
    if request.param == "s3":
        request.getfixturevalue("s3")
    root = f"s3://{BUCKET}/{secrets.token_hex(4)}" if request.param == "s3" else str(tmp_path / "store")
    return StoredRun(f"{root}/digits", StorageConfig())


def checkpoint(run: StoredRun, name: str, *, whole: bool = True) -> None:
    data = f"weights of {name}".encode()
    run.store.write(f"checkpoints/{name}/state/weights.pt", data)
    if whole:
        files = {"state/weights.pt": [len(data), hashlib.sha256(data).hexdigest()]}
        run.store.write(f"checkpoints/{name}/manifest.json", json.dumps({"files": files}).encode())


OLD, NEW = "step-00000010-0001.0001", "step-00000020-0001.0002"


def test_a_checkpoint_exists_once_its_manifest_is_there(run: StoredRun) -> None:
    checkpoint(run, NEW)
    checkpoint(run, OLD)
    checkpoint(run, "step-00000030-0001.0002", whole=False)
    run.store.write("checkpoints/notes/manifest.json", b"{}")
    assert run.checkpoints() == [OLD, NEW]
    run.delete(NEW)
    assert run.checkpoints() == [OLD]
    assert [entry.key for entry in run.store.list(f"checkpoints/{NEW}")] == []


def test_what_a_crash_left_is_collected_and_nothing_else(run: StoredRun) -> None:
    checkpoint(run, OLD)
    checkpoint(run, NEW)
    checkpoint(run, "step-00000030-0001.0002", whole=False)
    where = run.set_aside(NEW)
    assert run.checkpoints() == [OLD]
    assert where == f"{run.uri}/checkpoints/{NEW}/set-aside.json"
    assert run.collect_orphans() == ["step-00000030-0001.0002"]
    left = {entry.key.split("/")[1] for entry in run.store.list("checkpoints/")}
    assert left == {OLD, NEW}, "what was set aside is kept for a person to look at"
    assert run.collect_orphans() == []


@pytest.mark.s3
def test_uploads_that_were_cut_off_are_aborted(s3: Weed) -> None:
    run = StoredRun(f"s3://{BUCKET}/{secrets.token_hex(4)}/digits", StorageConfig())
    client, prefix = s3.client(), run.uri.removeprefix(f"s3://{BUCKET}/")
    for key in (f"{prefix}/checkpoints/{OLD}/big.pt", f"{prefix}2/checkpoints/{OLD}/anothers.pt"):
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"part")
    run.collect_orphans()
    left = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    assert [upload["Key"] for upload in left] == [f"{prefix}2/checkpoints/{OLD}/anothers.pt"]


def test_a_download_takes_what_is_missing_or_damaged_here(run: StoredRun, tmp_path: Path) -> None:
    checkpoint(run, OLD)
    folder = tmp_path / OLD
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "stale.pt").write_bytes(b"of an earlier attempt")
    run.download(OLD, folder)
    file = folder / "state" / "weights.pt"
    assert file.read_bytes() == f"weights of {OLD}".encode()
    assert not (folder / "state" / "stale.pt").exists()
    assert (folder / "manifest.json").read_bytes() == run.manifest(OLD)
    seen = file.stat().st_mtime_ns
    run.download(OLD, folder)
    assert file.stat().st_mtime_ns == seen, "what is whole is not downloaded again"
    file.write_bytes(file.read_bytes()[::-1])
    run.download(OLD, folder)
    assert file.read_bytes() == f"weights of {OLD}".encode()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"files": {"a": 1}}', b'{"files": {"a": ["x", "y"]}}'])
def test_a_manifest_that_is_none(run: StoredRun, tmp_path: Path, content: bytes) -> None:
    run.store.write(f"checkpoints/{OLD}/manifest.json", content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        run.download(OLD, tmp_path / "to")


def test_a_manifest_that_points_outside(run: StoredRun, tmp_path: Path) -> None:
    manifest = json.dumps({"files": {"../../outside.pt": [1, "0"]}}).encode()
    run.store.write(f"checkpoints/{OLD}/manifest.json", manifest)
    with pytest.raises(CheckpointError, match="outside"):
        run.download(OLD, tmp_path / "to")
    assert not (tmp_path / "outside.pt").exists()


def test_an_earlier_run_is_moved_aside_but_for_who_owns_it(run: StoredRun) -> None:
    assert run.move_aside() is None
    checkpoint(run, OLD)
    run.store.write("config.json", b"{}")
    run.store.write(".control/drivers/00000001", b"mine")
    aside = run.move_aside()
    assert aside is not None
    assert [entry.key for entry in run.store.list()] == [".control/drivers/00000001"]
    moved = StoredRun(aside, StorageConfig())
    assert moved.checkpoints() == [OLD]
    assert moved.read("config.json") == b"{}"


def test_a_store_is_reached_or_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        StoredRun.reached(str(tmp_path / "file" / "digits"), StorageConfig())
    reached = StoredRun.reached(str(tmp_path / "store" / "digits"), StorageConfig())
    assert list(reached.store.list()) == []


@pytest.mark.s3
def test_a_run_in_s3_is_found(s3: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}/digits"
    with pytest.raises(ConfigError, match=f"no run at {uri}: give it as s3://BUCKET/PREFIX/NAME"):
        find_run(uri)
    run = StoredRun(uri, StorageConfig())
    run.store.write("config.json", b'{"name": "digits"}')
    run.store.write("metrics.jsonl", b'{"step": 1}\n')
    folder = find_run(uri)
    assert folder.config.read_bytes() == b'{"name": "digits"}'
    assert folder.metrics.read_bytes() == b'{"step": 1}\n'
    with pytest.raises(StorageError, match="there is no bucket"):
        find_run("s3://no-such-bucket/digits")


def test_each_process_has_a_folder_of_its_own_and_those_of_the_dead_go(tmp_path: Path) -> None:
    first, held = own_folder(tmp_path / "workers")
    second, other = own_folder(tmp_path / "workers")
    assert first != second
    assert first.is_dir()
    other.close()
    third, last = own_folder(tmp_path / "workers")
    assert not second.exists()
    assert first.is_dir()
    held.close()
    last.close()
    assert third.is_dir()


def test_runs_of_one_name_in_two_places_are_worked_on_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    places = {working_folder(uri) for uri in ("s3://a/digits", "s3://b/digits", "s3://a/digits/")}
    assert len(places) == 2
    assert all(place.is_relative_to(tmp_path) for place in places)
