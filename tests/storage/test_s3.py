"""S3 by itself: what it says when it refuses, and what it survives."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

import s3_server
from orchestrator.config import StorageConfig
from orchestrator.errors import StorageError, StorageUnavailableError
from orchestrator.storage.filesystem import storage_filesystem
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.store import open_store
from orchestrator.storage.tally import REQUESTS, Operation, Trouble
from s3_server import BUCKET, KEY, READER, READER_SECRET, Weed

pytestmark = pytest.mark.s3

MIB = 2**20
WRONG = "wrong-secret-0123456789"


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(StorageError) as caught:
        act()
    message = str(caught.value)
    assert WRONG not in message
    assert s3_server.SECRET not in message
    assert "\n" not in message
    return message


def listed(uri: str, **settings: Any) -> Callable[[], Any]:
    return lambda: list(open_store(uri, StorageConfig(**settings)).list())


def place() -> str:
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


# -- refusals ----------------------------------------------------------------------------------


def test_a_wrong_secret(s3: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRONG)
    assert refusal(listed("s3://bucket/x")) == (
        "s3://bucket/x: the store refuses the credentials (SignatureDoesNotMatch): correct AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or the profile they come from"
    )


def test_an_unknown_key(s3: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "the store refuses the credentials (InvalidAccessKeyId)" in refusal(listed("s3://bucket/x"))


def test_no_credentials(s3: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert refusal(listed("s3://bucket/x")).startswith("s3://bucket/x: there are no credentials for S3: set AWS_ACCESS")


def test_no_permission(s3: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    store = open_store("s3://bucket/x")
    assert refusal(lambda: store.write("a", b"")) == (
        "s3://bucket/x/a: no permission (AccessDenied): allow PutObject to these credentials, or use others"
    )


def test_a_missing_bucket(s3: Weed) -> None:
    assert refusal(listed("s3://no-such-bucket/x")) == (
        "s3://no-such-bucket/x: there is no bucket 'no-such-bucket': create it, or correct the address"
    )


def test_nobody_answers(s3: Weed) -> None:
    port = free_port()
    message = refusal(listed("s3://bucket/x", endpoint_url=f"http://127.0.0.1:{port}", retry_budget_s=0.1))
    assert message.startswith(f"s3://bucket/x: no answer from http://127.0.0.1:{port} in 0 s (EndpointConnectionError)")
    assert message.endswith("check that it runs, and storage.endpoint_url or AWS_ENDPOINT_URL")


def test_an_unknown_profile(s3: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert refusal(listed("s3://bucket/x")).endswith("correct AWS_PROFILE, or add the profile")


# -- what is counted ---------------------------------------------------------------------------


def trouble(operation: Operation, act: Callable[[], Any]) -> Trouble:
    """Requests of ``operation`` that were tried again, and that failed, while ``act`` ran."""
    before = REQUESTS.troubles().get(operation, Trouble(0, 0))
    act()
    after = REQUESTS.troubles()[operation]
    return Trouble(after.retries - before.retries, after.errors - before.errors)


def test_a_refusal_is_an_error_and_an_object_that_is_not_there_is_none(
    s3: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trouble("read", lambda: open_store(place()).stat("missing")) == Trouble(0, 0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    assert trouble("write", lambda: refusal(lambda: open_store(place()).write("a", b""))) == Trouble(0, 1)


def test_a_store_that_does_not_answer_costs_retries_and_then_an_error(s3: Weed) -> None:
    port = free_port()
    dead = listed("s3://bucket/x", endpoint_url=f"http://127.0.0.1:{port}", retry_budget_s=0.1)
    found = trouble("list", lambda: refusal(dead))
    assert found.errors == 1
    assert found.retries >= 3, "botocore's own, and ours"


def test_markers_of_folders_are_no_objects(s3: Weed) -> None:
    store = open_store(place())
    prefix = store.uri.removeprefix(f"s3://{BUCKET}/")
    for key in (f"{prefix}/", f"{prefix}/logs/", f"{prefix}/logs/file"):
        s3.client().put_object(Bucket=BUCKET, Key=key, Body=b"")
    assert [entry.key for entry in store.list()] == ["logs/file"]
    assert list(store.list(deep=False)) == []


# -- checksums ---------------------------------------------------------------------------------


def corrupting(store: S3Store, parts: set[str]) -> list[str]:
    """Change one byte of the first try of each part on its way; returns the list of those changed."""
    changed: list[str] = []

    def spoil(request: Any, **_: Any) -> None:
        part = request.url.rpartition("partNumber=")[2].partition("&")[0]
        if part in parts and part not in changed:
            changed.append(part)
            body = bytearray(request.body.read())
            at = len(body) // 2
            body[at] ^= 1
            request.body = bytes(body)
            request.headers["Content-Length"] = str(len(body))

    store._client.meta.events.register("before-send.s3.UploadPart", spoil)
    return changed


def test_a_part_that_is_garbled_on_its_way_is_sent_again(s3: Weed, tmp_path: Path) -> None:
    data = secrets.token_bytes(20 * MIB)
    (tmp_path / "file").write_bytes(data)
    store = S3Store(place(), StorageConfig(retry_budget_s=30))
    changed = corrupting(store, {"2"})
    store.upload(tmp_path / "file", "file")
    assert changed == ["2"]
    assert hashlib.sha256(store.read("file")).digest() == hashlib.sha256(data).digest()


def test_an_upload_is_not_there_before_its_last_part(s3: Weed, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(20 * MIB))
    store = S3Store(place(), StorageConfig())
    seen: list[Any] = []
    store._client.meta.events.register(
        "before-send.s3.CompleteMultipartUpload", lambda **_: seen.append(store.stat("file"))
    )
    store.upload(tmp_path / "file", "file")
    assert seen == [None]
    assert store.stat("file") is not None


# -- faults ------------------------------------------------------------------------------------


@pytest.fixture
def faults(s3: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """20 % of all requests are answered with 503 and 3 % are dropped without a word."""
    if reason := s3_server.no_haproxy():
        pytest.skip(reason)
    with s3_server.faulty(s3.endpoint, tmp_path) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield endpoint


@pytest.mark.slow
def test_nothing_is_lost_under_faults(faults: str, tmp_path: Path) -> None:
    store, data = open_store(place()), {f"{n:03d}": secrets.token_bytes(1000) for n in range(60)}
    with ThreadPoolExecutor(16) as pool:
        found = trouble("write", lambda: list(pool.map(lambda key: store.write(key, data[key]), data)))
        assert found.errors == 0
        assert found.retries >= 1, "of sixty requests twelve are refused: none in one run of 600,000"
        assert dict(zip(data, pool.map(store.read, data), strict=True)) == data
    assert [entry.key for entry in store.list()] == sorted(data)
    large = secrets.token_bytes(20 * MIB)
    (tmp_path / "file").write_bytes(large)
    store.upload(tmp_path / "file", "large")
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large


@pytest.mark.slow
def test_of_many_writers_one_wins_under_faults(faults: str) -> None:
    """An answer that is lost on the way makes neither two winners nor none."""
    where = place()
    for round_ in range(2):
        stores = [open_store(where) for _ in range(8)]
        won: list[int] = []

        def write(number: int, key: str = f"claim-{round_}") -> None:
            if stores[number].put_if_absent(key, f"writer {number}".encode()):  # noqa: B023
                won.append(number)  # noqa: B023

        threads = [threading.Thread(target=write, args=(number,)) for number in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert stores[0].read(f"claim-{round_}") == f"writer {won[0]}".encode()


@pytest.mark.slow
def test_rays_filesystem_loses_nothing_while_requests_are_refused(
    s3: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of them with 503: pyarrow's own retries lose uploads by that, and those that share a quota lose more."""
    if reason := s3_server.no_haproxy():
        pytest.skip(reason)
    with s3_server.faulty(s3.endpoint, tmp_path, refused_percent=33, dropped_percent=0) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        there_and_back()


def there_and_back() -> None:
    filesystem, path = storage_filesystem(place())

    def written_and_read(number: int) -> bytes:
        with filesystem.open_output_stream(f"{path}/{number}") as stream:
            stream.write(f"{number}".encode())
        with filesystem.open_input_file(f"{path}/{number}") as stream:
            return bytes(stream.read())

    with ThreadPoolExecutor(30) as pool:
        assert list(pool.map(written_and_read, range(120))) == [f"{number}".encode() for number in range(120)]


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(tmp_path: Path) -> None:
    server = Weed(tmp_path / "weed")
    server.start()
    values = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": KEY}
    with s3_server.environment({**values, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}):
        try:
            store = open_store(place(), StorageConfig(retry_budget_s=120))
            store.write("before", b"1")
            server.kill()
            impatient = open_store(store.uri, StorageConfig(retry_budget_s=0.5))
            with pytest.raises(StorageUnavailableError):
                impatient.read("before")
            again = threading.Thread(target=server.start)
            again.start()
            store.write("after", b"2")
            again.join()
            assert (store.read("before"), store.read("after")) == (b"1", b"2")
        finally:
            server.kill()
