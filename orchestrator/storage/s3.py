"""A store in S3 or a compatible service, on boto3 and s3transfer."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from orchestrator.config import StorageConfig
from orchestrator.errors import NotFoundError, StorageError, StorageUnavailableError
from orchestrator.storage.store import Entry, check_key
from orchestrator.storage.tally import REQUESTS, Operation

__all__ = ["S3Store", "endpoint_of", "split_uri"]

T = TypeVar("T")
Failed = (BotoCoreError, ClientError, Boto3Error)

CONNECT_S, READ_S = 5.0, 10.0
"""A connection that says nothing for so long is given up and made anew."""
ATTEMPTS = 4
"""Of botocore, for one request; the budget in seconds stands over them."""
PART_BYTES = 8 * 2**20
CONNECTIONS = 32
DELETED_AT_ONCE = 1000

# What the store means by its codes; a request that is answered by any other 4xx is not worth repeating.
WORTH_REPEATING = {"RequestTimeout", "SlowDown", "BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"}
WORTH_REPEATING |= {"ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "ThrottlingException"}
MEANINGS = (
    (
        {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"},
        (
            "the store refuses the credentials ({code}): correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the "
            "profile they come from"
        ),
    ),
    ({"ExpiredToken", "ExpiredTokenException"}, "the credentials have expired ({code}): renew them"),
    ({"NoSuchBucket"}, "there is no bucket {bucket!r}: create it, or correct the address"),
    (
        {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"},
        "the bucket is in another region ({code}): set storage.region or AWS_REGION",
    ),
    ({"RequestTimeTooSkewed"}, "the clock of this machine is wrong ({code}): set it"),
)
AGAIN = re.compile(rb"attempt=(?!1\b)")
SENT_FOR: dict[str, Operation] = {
    "GetObject": "read",
    "HeadObject": "read",
    "ListObjectsV2": "list",
    "DeleteObjects": "delete",
}
"""Operation by S3's name of a request; uploads have several more."""
NO_ANSWER = (ConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError)
"""Refused, dropped, timed out, cut off, or garbled on the way."""


class S3Store:
    """See ``Store``. Credentials come from boto3's usual chain, which refreshes those that expire."""

    def __init__(self, uri: str, config: StorageConfig) -> None:
        self._bucket, self._prefix = split_uri(uri)
        self._budget_s = config.retry_budget_s
        self._endpoint = endpoint_of(config)
        self._client = _client(config, self._endpoint)
        self._client.meta.events.register("before-send.s3", _count_again)
        REQUESTS.open()
        self._transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        """See ``Store``."""
        name = self._name(key)
        body: bytes = self._ask(key, lambda: self._client.get_object(**name)["Body"].read())
        return body

    def write(self, key: str, data: bytes) -> None:
        """See ``Store``."""
        name = self._name(key)
        self._ask(key, lambda: self._client.put_object(**name, Body=data), "write")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ``Store``: a conditional write (``If-None-Match: *``)."""
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._client.put_object(**self._name(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
                repeated = tries > 1 or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                # An earlier try may have written the object although its answer was lost: then it is our own.
                return repeated and bool(self._client.get_object(**self._name(key))["Body"].read() == data)
            return True

        return self._ask(key, put, "write")

    def list(self, prefix: str = "", *, deep: bool = True) -> Iterator[Entry]:
        """See ``Store``."""
        root = f"{self._prefix}/" if self._prefix else ""
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": f"{root}{prefix}"}
        if not deep:
            request["Delimiter"] = "/"
        while True:
            page = self._ask(prefix, lambda: self._client.list_objects_v2(**request), "list")
            for item in page.get("Contents", ()):
                if item["Key"].endswith("/"):
                    continue  # a marker, by which some clients make folders where there are none
                yield Entry(item["Key"].removeprefix(root), item["Size"], version=item.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, key: str) -> Entry | None:
        """See ``Store``."""
        name = self._name(key)
        try:
            head = self._ask(key, lambda: self._client.head_object(**name))
        except NotFoundError:
            return None
        return Entry(key, head["ContentLength"], head.get("Metadata", {}).get("sha256"))

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """See ``Store``: several parts at once, each with a checksum that the store compares."""
        extra = {"ChecksumAlgorithm": "CRC32", **({"Metadata": {"sha256": sha256}} if sha256 else {})}
        target = self._name(key)
        self._ask(
            key,
            lambda: self._client.upload_file(
                str(path), target["Bucket"], target["Key"], ExtraArgs=extra, Config=self._transfer
            ),
            "write",
        )

    def download(self, key: str, path: Path) -> None:
        """See ``Store``."""
        source = self._name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            self._ask(
                key,
                lambda: self._client.download_file(
                    source["Bucket"], source["Key"], str(temporary), Config=self._transfer
                ),
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def copy(self, key: str, to: str) -> None:
        """See ``Store``: the service copies, in parts where the object is large."""
        source, target = self._name(key), self._name(to)
        self._ask(key, lambda: self._client.copy(source, target["Bucket"], target["Key"], Config=self._transfer))

    def delete(self, *keys: str) -> None:
        """See ``Store``."""
        for start in range(0, len(keys), DELETED_AT_ONCE):
            some = keys[start : start + DELETED_AT_ONCE]
            wanted = {"Objects": [{"Key": self._name(key)["Key"]} for key in some], "Quiet": True}
            answer = self._ask(
                some[0],
                lambda: self._client.delete_objects(Bucket=self._bucket, Delete=wanted),  # noqa: B023
                "delete",
            )
            for refused in answer.get("Errors", ()):
                if refused["Code"] not in ("NoSuchKey", "404"):
                    raise StorageError(f"s3://{self._bucket}/{refused['Key']}: not deleted ({refused['Code']})")

    def collect(self, prefix: str = "") -> int:
        """See ``Store``: uploads in parts that nobody will complete take space, and money, until they are aborted."""
        root = f"{self._prefix}/" if self._prefix else ""
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": f"{root}{prefix}"}
        uploads: list[dict[str, Any]] = []
        while True:
            page = self._ask(prefix, functools.partial(self._client.list_multipart_uploads, **request), "list")
            uploads += page.get("Uploads", ())
            if not page.get("IsTruncated"):
                break
            request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for upload in uploads:
            self._ask(prefix, functools.partial(self._abort, upload), "delete")
        return len(uploads)

    def _abort(self, upload: dict[str, Any]) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        except ClientError as error:
            if _code(error) not in ("NoSuchUpload", "404"):  # gone since: what was wanted
                raise

    def _name(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{key}" if self._prefix else key}

    def _ask(self, key: str, request: Callable[[], T], operation: Operation = "read") -> T:
        """Make a request until it succeeds, until it is refused for good, or until the budget is spent."""
        deadline = time.monotonic() + self._budget_s
        pause_s = 0.2
        while True:
            try:
                return request()
            except Failed as error:
                cause = _cause(error)
                left_s = deadline - time.monotonic()
                if not _is_worth_repeating(cause) or left_s <= 0:
                    explained = self._explained(key, cause)
                    if not isinstance(explained, NotFoundError):  # an answer, and no trouble
                        REQUESTS.failed(operation)
                    raise explained from None
            REQUESTS.retried(operation)
            time.sleep(min(pause_s * random.uniform(0.5, 1.0), left_s))
            pause_s = min(2 * pause_s, 5.0)

    def _explained(self, key: str, error: BaseException) -> StorageError:
        """One sentence with the remedy. The store's own text is left out: it can repeat what it was sent."""
        where = f"{self.uri}/{key}".rstrip("/")
        if isinstance(error, ClientError):
            return self._refused(where, error)
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return StorageError(
                f"{where}: there are no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, or give this machine a role"
            )
        if _is_worth_repeating(error):
            return StorageUnavailableError(
                f"{where}: no answer from {self._endpoint or 'AWS'} in {self._budget_s:.0f} s "
                f"({type(error).__name__}): check that it runs, and storage.endpoint_url or AWS_ENDPOINT_URL"
            )
        return StorageError(f"{where}: {type(error).__name__}: {error}")

    def _refused(self, where: str, error: ClientError) -> StorageError:
        code, status = _code(error), _status(error)
        for codes, meaning in MEANINGS:
            if code in codes:
                return StorageError(f"{where}: {meaning.format(code=code, bucket=self._bucket)}")
        if status == 403:
            needed = f"allow {error.operation_name} to these credentials, or use others"
            return StorageError(f"{where}: no permission ({code}): {needed}")
        if status == 404:
            return NotFoundError(f"{where}: there is no such object")
        if _is_worth_repeating(error):
            return StorageUnavailableError(
                f"{where}: {self._endpoint or 'AWS'} failed for {self._budget_s:.0f} s ({code}): see whether the store "
                "is well, or raise storage.retry_budget_s"
            )
        return StorageError(f"{where}: {error.operation_name} is refused ({code}, HTTP status {status})")


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of ``s3://bucket/prefix``.

    Raises:
        StorageError: there is no bucket in it.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: write it as s3://BUCKET/PREFIX")
    return bucket, prefix.strip("/")


def endpoint_of(config: StorageConfig) -> str | None:
    """Address of the compatible store, or None for AWS."""
    return config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _client(config: StorageConfig, endpoint: str | None) -> Any:
    addressing = config.addressing if config.addressing != "auto" else ("path" if endpoint else "auto")
    settings = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "adaptive", "total_max_attempts": ATTEMPTS},
        s3={"addressing_style": addressing},
    )
    try:
        session = boto3.session.Session()
        region = config.region or session.region_name or "us-east-1"
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=settings)
    except ProfileNotFound as error:
        raise StorageError(f"S3: {error}: correct AWS_PROFILE, or add the profile") from None


def _count_again(request: Any, event_name: str, **_: Any) -> None:
    """Count what botocore itself sends again: the number of the attempt stands in a header of each request."""
    attempt = request.headers.get("amz-sdk-request", b"")
    if AGAIN.search(attempt if isinstance(attempt, bytes) else attempt.encode()):
        name = event_name.rpartition(".")[2]
        REQUESTS.retried(SENT_FOR.get(name, "write"))


def _cause(error: BaseException) -> BaseException:
    """The request's own error, out of what s3transfer wraps it in."""
    seen: Any = error
    while seen is not None:
        if isinstance(seen, (ClientError, NoCredentialsError, *NO_ANSWER)):
            break
        seen = seen.__cause__ or seen.__context__
    return seen or error


def _is_worth_repeating(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        return _status(error) >= 500 or _status(error) == 429 or _code(error) in WORTH_REPEATING
    return isinstance(error, NO_ANSWER)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _status(error: ClientError) -> int:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
    return 0
