"""A folder comes back as it was, and what has been transferred is not transferred again."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.storage.store import Store, open_store
from orchestrator.storage.tree import TreeFile, download_tree, file_sha256, upload_tree
from s3_server import BUCKET

FILES = {"a": b"one", "b/c": b"", "b/d/e": secrets.token_bytes(9 * 2**20), "f": b"four"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue("s3")
    return open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_goes_there_and_back(folder: Path, store: Store, tmp_path: Path) -> None:
    files = upload_tree(store, folder, "tree")
    assert files == tuple(TreeFile(name, len(data), file_sha256(folder / name)) for name, data in FILES.items())
    assert {entry.key for entry in store.list()} == {f"tree/{name}" for name in FILES}
    download_tree(store, "tree", tmp_path / "back", files)
    assert contents(tmp_path / "back") == FILES


def test_a_download_goes_on_where_it_was_cut_off(folder: Path, store: Store, tmp_path: Path) -> None:
    files = upload_tree(store, folder, "tree")
    download_tree(store, "tree", tmp_path / "back", files)
    (tmp_path / "back" / "a").write_bytes(b"two")  # of the same size
    (tmp_path / "back" / "f").unlink()
    kept = (tmp_path / "back" / "b/d/e").stat().st_mtime_ns
    download_tree(store, "tree", tmp_path / "back", files)
    assert contents(tmp_path / "back") == FILES
    assert (tmp_path / "back" / "b/d/e").stat().st_mtime_ns == kept


def test_an_object_that_is_not_what_it_was_is_named(folder: Path, store: Store, tmp_path: Path) -> None:
    files = upload_tree(store, folder, "tree")
    store.write("tree/f", b"five")
    with pytest.raises(StorageError, match=r"tree/f: is not the file that was written \(size or SHA-256 differ\)"):
        download_tree(store, "tree", tmp_path / "back", files)
    assert not (tmp_path / "back" / "f").exists()


def test_a_manifest_cannot_write_elsewhere(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="use names with / between them"):
        download_tree(store, "tree", tmp_path / "back", [TreeFile("../out", 1, "0")])
    assert not (tmp_path / "out").exists()


@pytest.mark.s3
def test_an_upload_goes_on_where_it_was_cut_off(folder: Path, s3: Any) -> None:
    store = open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}")
    upload_tree(store, folder, "tree")
    store.delete("tree/b/c")
    (folder / "a").write_bytes(b"two")  # of the same size
    sent: list[str] = []
    store._client.meta.events.register(  # type: ignore[attr-defined]
        "before-send.s3", lambda request, **_: sent.append(request.url) if request.method == "PUT" else None
    )
    files = upload_tree(store, folder, "tree")
    assert sorted(url.rpartition("tree/")[2] for url in sent) == ["a", "b/c"]
    assert [file.path for file in files] == list(FILES)
    assert store.read("tree/a") == b"two"
