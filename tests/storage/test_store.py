"""Both stores answer the same protocol in the same way."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import NotFoundError, StorageError
from orchestrator.storage.store import Entry, Store, check_key, open_store
from s3_server import BUCKET

MakeStore = Callable[[], Store]
MIB = 2**20


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """Opens one store, again for each call, as each process does."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    root = f"s3://{BUCKET}/{secrets.token_hex(4)}" if request.param == "s3" else str(tmp_path / "store")
    return lambda: open_store(root)


def test_what_is_written_is_read(make: MakeStore) -> None:
    store = make()
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    assert make().read("a/b") == b"two"
    assert store.stat("a/b") == Entry("a/b", 3)


def test_what_is_not_there(make: MakeStore) -> None:
    store = make()
    assert store.stat("none") is None
    assert list(store.list()) == []
    store.delete("none")
    with pytest.raises(NotFoundError, match="none: "):
        store.read("none")


def test_a_download_of_what_is_not_there_leaves_nothing(make: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        make().download("none", tmp_path / "to" / "file")
    assert list((tmp_path / "to").iterdir()) == []


def test_listing_is_by_prefix_and_in_order(make: MakeStore) -> None:
    store = make()
    for key in ("b/2", "b/10", "a", "b2", "b/c/d"):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == ["a", "b/10", "b/2", "b/c/d", "b2"]
    assert [(entry.key, entry.size_bytes) for entry in store.list("b/")] == [("b/10", 4), ("b/2", 3), ("b/c/d", 5)]
    assert [entry.key for entry in store.list("b/c")] == ["b/c/d"]
    assert [entry.key for entry in store.list(deep=False)] == ["a", "b2"]
    assert [entry.key for entry in store.list("b/", deep=False)] == ["b/10", "b/2"]
    store.delete("b/10", "b/c/d", "none")
    assert [entry.key for entry in store.list()] == ["a", "b/2", "b2"]


def test_a_large_file_goes_there_and_back(make: MakeStore, tmp_path: Path) -> None:
    """In three parts where the store has parts."""
    data = secrets.token_bytes(20 * MIB)
    (tmp_path / "here").write_bytes(data)
    store = make()
    store.upload(tmp_path / "here", "large", sha256="0" * 64)
    entry = store.stat("large")
    assert entry is not None
    assert entry.size_bytes == len(data)
    store.download("large", tmp_path / "there" / "again")
    assert (tmp_path / "there" / "again").read_bytes() == data
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["again"]


def test_of_sixteen_writers_one_wins(make: MakeStore) -> None:
    make().write("other", b"")  # the folder is there
    stores = [make() for _ in range(16)]
    start = threading.Barrier(len(stores))
    won: list[int] = []

    def write(number: int) -> None:
        start.wait()
        if stores[number].put_if_absent("claim", f"writer {number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert stores[0].read("claim") == f"writer {won[0]}".encode()
    assert not stores[0].put_if_absent("claim", b"late")
    assert [entry.key for entry in stores[0].list()] == ["claim", "other"]


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/.", "a\\b", "a/"])
def test_a_key_stays_below_its_root(key: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="use names with / between them"):
        check_key(key)
    with pytest.raises(StorageError):
        open_store(str(tmp_path)).write(key, b"")
    assert list(tmp_path.iterdir()) == []


def test_other_addresses_are_refused() -> None:
    with pytest.raises(StorageError, match=r"^gs://a/b: stores are folders and s3://BUCKET/PREFIX$"):
        open_store("gs://a/b")
    with pytest.raises(StorageError, match=r"^s3://: write it as s3://BUCKET/PREFIX$"):
        open_store("s3://")


def test_a_folder_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        open_store(str(tmp_path / "file")).write("a", b"")


def test_a_copy_has_the_same_bytes(make: MakeStore) -> None:
    store = make()
    store.write("a/b", b"one")
    store.copy("a/b", "c/d")
    store.write("a/b", b"two")
    assert store.read("c/d") == b"one"
    with pytest.raises(NotFoundError):
        store.copy("none", "e")


def test_a_version_differs_once_the_object_was_written_again(make: MakeStore) -> None:
    store = make()
    store.write("a", b"one")
    (before,) = store.list()
    assert list(store.list()) == [before]
    store.write("a", b"two")
    (after,) = store.list()
    assert (before.version, before.size_bytes) != (after.version, after.size_bytes)


def test_what_was_left_half_written_is_collected(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b", b"one")
    (tmp_path / "a" / ".writing-0123").write_bytes(b"tw")
    assert store.collect("a/") == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert store.collect() == 0
