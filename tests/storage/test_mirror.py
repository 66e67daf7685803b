"""Growing files in a store: what is pulled is always a beginning of what was written."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import FencedError, StorageUnavailableError
from orchestrator.storage import mirror
from orchestrator.storage.local import LocalStore
from orchestrator.storage.mirror import Mirror, Pushing, Replica
from orchestrator.storage.store import open_store
from s3_server import BUCKET

NAME = "metrics.jsonl"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "BLOCK_BYTES", 16)


# What happens to a file between two pushes: lines are added, the last are cut off, or another process takes over.
STEPS = st.lists(
    st.one_of(st.tuples(st.just("add"), st.integers(1, 60)), st.tuples(st.just("cut"), st.integers(0, 60)))
    | st.sampled_from(["push", "pull", "other writer", "other reader"]),
    max_size=30,
)


@given(STEPS)
@example([("add", 1), "push", "pull", "other reader", ("cut", 0)])
def test_a_replica_holds_a_beginning_of_the_file(steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "BLOCK_BYTES", 16)
        store, folder, copies = LocalStore(Path(place) / "store"), Path(place) / "a", Path(place) / "b"
        folder.mkdir()
        copies.mkdir()
        path, copy = folder / NAME, copies / NAME
        path.touch()
        writer, reader = Mirror(store, folder), Replica(store, copies)
        fresh = (bytes([65 + n % 26]) for n in itertools.count())
        for step in [*steps, "push", "pull"]:
            if step == "push":
                writer.push([NAME, "not there"])
                pushed = path.read_bytes()
            elif step == "pull":
                reader.pull()
            elif step == "other writer":
                writer = Mirror(store, folder)
            elif step == "other reader":
                reader = Replica(store, copies)
            elif step[0] == "add":
                with path.open("ab") as file:
                    file.write(next(fresh) * step[1])
            else:  # as ``truncate_after`` does it: another file takes the name
                whole = path.read_bytes()
                path.unlink()
                path.write_bytes(whole[: step[1]])
        assert (copy.read_bytes() if copy.exists() else b"") == pushed


@pytest.mark.usefixtures("small_blocks")
def test_only_what_has_changed_travels(tmp_path: Path) -> None:
    store, path = LocalStore(tmp_path / "store"), tmp_path / NAME
    writer = Mirror(store, tmp_path)
    path.write_bytes(b"a" * 40)
    writer.push([NAME])
    before = {entry.key: entry.version for entry in store.list()}
    assert list(before) == [NAME, f"{NAME}.00001", f"{NAME}.00002"]
    with path.open("ab") as file:
        file.write(b"b" * 10)
    writer.push([NAME])
    after = {entry.key: entry.version for entry in store.list()}
    changed = [key for key, version in after.items() if before.get(key) != version]
    assert changed == [f"{NAME}.00002", f"{NAME}.00003"]


@pytest.mark.usefixtures("small_blocks")
def test_a_reader_sees_a_file_that_grows_as_one_that_grows(tmp_path: Path) -> None:
    """A follower of the copy need not begin anew: it is the same file."""
    store = LocalStore(tmp_path / "store")
    (tmp_path / "copies").mkdir()
    writer, reader = Mirror(store, tmp_path), Replica(store, tmp_path / "copies")
    copy = tmp_path / "copies" / NAME
    inodes = set()
    for size in (10, 20, 70):
        (tmp_path / NAME).write_bytes(b"x" * size)
        writer.push([NAME])
        reader.pull()
        inodes.add(copy.stat().st_ino)
        assert copy.stat().st_size == size
    assert len(inodes) == 1


def test_what_is_gone_from_the_store_goes_from_the_copies(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.write("summary.json", b"{}")
    store.write("checkpoints/step/manifest.json", b"{}")
    reader = Replica(store, tmp_path)
    reader.pull()
    assert (tmp_path / "summary.json").read_bytes() == b"{}"
    assert not (tmp_path / "checkpoints").exists(), "what lies deeper is no record"
    store.delete("summary.json")
    reader.pull()
    assert not (tmp_path / "summary.json").exists()


def test_pushing_waits_for_a_store_and_ends_where_it_is_fenced(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (tmp_path / NAME).write_bytes(b"line\n")
    troubles: list[Exception] = [StorageUnavailableError("no answer"), StorageUnavailableError("no answer")]

    def before() -> None:
        if troubles:
            raise troubles.pop()

    pushing = Pushing(Mirror(store, tmp_path), [NAME], every_s=0.01, before=before)
    while store.stat(NAME) is None:
        pass
    troubles.append(FencedError("a newer attempt"))
    pushing._thread.join(240)
    assert not pushing._thread.is_alive()
    pushing.close()


@pytest.mark.s3
@pytest.mark.usefixtures("small_blocks")
def test_a_file_grows_in_s3(s3: Any, tmp_path: Path) -> None:
    store = open_store(f"s3://{BUCKET}/mirror-{random.randrange(10**9)}")
    (tmp_path / "copies").mkdir()
    writer, reader = Mirror(store, tmp_path), Replica(open_store(store.uri), tmp_path / "copies")
    for content in (b"a" * 40, b"a" * 40 + b"b" * 40, b"a" * 20, b"a" * 20 + b"c" * 90):
        (tmp_path / NAME).unlink(missing_ok=True)
        (tmp_path / NAME).write_bytes(content)
        writer.push([NAME])
        reader.pull()
        assert (tmp_path / "copies" / NAME).read_bytes() == content
