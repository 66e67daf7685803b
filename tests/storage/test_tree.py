"""A folder is there as it was, and what has been transferred is not transferred again."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage.store import Store, open_store
from orchestrator.storage.tree import TreeFile, file_sha256, upload_tree
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


def test_a_folder_is_there_as_it_was(folder: Path, store: Store) -> None:
    files = upload_tree(store, folder, "tree")
    assert files == tuple(TreeFile(name, len(data), file_sha256(folder / name)) for name, data in FILES.items())
    assert {entry.key: store.read(entry.key) for entry in store.list()} == {
        f"tree/{name}": data for name, data in FILES.items()
    }
    assert all(file.is_at(folder / file.path) for file in files)
    (folder / "a").write_bytes(b"two")  # of the same size
    assert not files[0].is_at(folder / "a")


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
