"""Who may write a run in a store: of many drivers one, and only the workers of its newest attempt."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import FencedError, RunBusyError
from orchestrator.storage import claim
from orchestrator.storage.claim import Claim, StoreFence
from orchestrator.storage.store import Store, open_store
from s3_server import BUCKET

MakeStore = Callable[[], Store]
LEASE_S = 0.5
DRIVER = """
import sys, time
from orchestrator.storage.claim import Claim
from orchestrator.storage.store import open_store

Claim.take(open_store(sys.argv[1]), waiting=print)
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    if request.param == "s3":
        request.getfixturevalue("s3")
    root = f"s3://{BUCKET}/{secrets.token_hex(4)}" if request.param == "s3" else str(tmp_path / "run")
    return lambda: open_store(root)


def take(store: Store, heard: list[str] | None = None, *, lease_s: float = LEASE_S) -> Claim:
    return Claim.take(store, waiting=([] if heard is None else heard).append, lease_s=lease_s)


def from_elsewhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> Claim:
    """A claim of a process that cannot be seen from here."""
    with monkeypatch.context() as patch:
        patch.setattr(claim, "_place", lambda: "another machine")
        return take(store)


def test_the_second_driver_is_told_who_is_the_first(make: MakeStore) -> None:
    first = take(make())
    with pytest.raises(RunBusyError, match=rf"is owned by process {os.getpid()} on .*: wait for it, stop it, or give"):
        take(make())
    first.beat()
    first.release()
    second = take(make())
    assert second.number == first.number + 1
    with pytest.raises(FencedError, match="a newer driver owns"):
        first.beat()
    second.beat()


def test_of_many_drivers_one_wins(make: MakeStore) -> None:
    stores = [make() for _ in range(8)]
    start = threading.Barrier(len(stores))

    def run(store: Store) -> Claim | RunBusyError:
        start.wait()
        try:
            return take(store)
        except RunBusyError as error:
            return error

    with ThreadPoolExecutor(len(stores)) as pool:
        ends = list(pool.map(run, stores))
    (winner,) = [end for end in ends if isinstance(end, Claim)]
    winner.beat()
    assert all("is owned by" in str(end) for end in ends if isinstance(end, RunBusyError))


def test_a_driver_that_was_killed_here_is_succeeded_at_once(make: MakeStore, tmp_path: Path) -> None:
    store = make()
    words = [sys.executable, "-c", DRIVER, store.uri]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(RunBusyError, match=f"process {process.pid} on"):
            take(store)
        process.send_signal(signal.SIGKILL)
        process.wait()
    heard: list[str] = []
    assert take(store, heard).number == 2
    assert heard == [], "nobody has to wait for what this machine knows"


def test_a_driver_elsewhere_is_given_a_lease(make: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    silent = from_elsewhere(store, monkeypatch)
    heard: list[str] = []
    assert take(store, heard).number == 2
    assert len(heard) == 1
    assert "watching for" in heard[0]
    with pytest.raises(FencedError):
        silent.beat()


def test_a_driver_elsewhere_that_lives_keeps_its_run(make: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen long before the lease is over, however seldom it gets to beat."""
    store, over = make(), threading.Event()
    living = from_elsewhere(store, monkeypatch)

    def live() -> None:
        while not over.wait(0.05):
            living.beat()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(RunBusyError):
            take(store, lease_s=240.0)
    finally:
        over.set()
        thread.join()
    living.beat()


def test_who_was_held_up_itself_looks_once_more_before_it_takes_over(
    make: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher that is stopped for a lease after a look, as by a suspended machine, has not watched for one."""
    store = make()
    living, now, read = from_elsewhere(store, monkeypatch), [0.0], claim._read
    looks: list[int] = []

    def look(*where: Any) -> Any:
        found = read(*where)
        looks.append(1)
        if len(looks) == 2:
            now[0] = 1000.0
            living.beat()
        return found

    monkeypatch.setattr(claim, "_read", look)
    monkeypatch.setattr(claim, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None))
    with pytest.raises(RunBusyError):
        take(store)


def test_an_unreadable_claim_is_none(make: MakeStore) -> None:
    store = make()
    store.write("drivers", b"")
    store.write(".control/drivers/00000004", b"torn")
    assert take(store).number == 5


# -- workers -----------------------------------------------------------------------------------


def test_a_new_attempt_fences_off_the_one_before(make: MakeStore) -> None:
    store = make()
    driver = take(store)
    tokens = [StoreFence.begin(store, driver=driver.number) for _ in range(2)]
    assert tokens == ["0001.0001", "0001.0002"]
    old, new = (StoreFence(make(), token) for token in tokens)
    new.refresh()
    old.check()  # it has not asked yet
    with pytest.raises(FencedError, match="a newer attempt owns"):
        old.refresh()
    with pytest.raises(FencedError):
        old.check()
    new.check()


def test_workers_of_a_driver_that_was_replaced_do_not_begin(make: MakeStore) -> None:
    store = make()
    first = take(store)
    first.release()
    second = take(store)
    with pytest.raises(FencedError, match=r"a newer driver owns .*: this worker does not begin"):
        StoreFence.begin(store, driver=first.number)
    token = StoreFence.begin(store, driver=second.number)
    assert token == "0002.0001"
    # Had the old one's worker looked just before, its number would still be the lower one.
    store.write(".control/fences/0001.0009", b"")
    StoreFence(store, token).refresh()


def test_a_run_that_was_removed_is_nobodys(make: MakeStore) -> None:
    store = make()
    fence = StoreFence(store, StoreFence.begin(store, driver=take(store).number))
    store.delete(*[entry.key for entry in store.list()])
    with pytest.raises(FencedError):
        fence.refresh()


def test_a_claim_holds_no_secret(make: MakeStore) -> None:
    store = make()
    take(store)
    content = json.loads(store.read(".control/drivers/00000001"))
    assert set(content) == {"who", "place", "process", "beat", "released"}
