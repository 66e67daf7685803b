"""A real Ray cluster of several hosts on one machine, each with its own network and processes: ``ray-hosts.sh``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from commands import REPOSITORY, TIMEOUT_S, Ended, environment

import kube
from orchestrator.telemetry.records import read

SCRIPT = (kube.test_data() or Path("/nonexistent")).parent / "tools" / "ray-hosts.sh"
ADDRESS = "http://10.77.0.1:8265"
ELSEWHERE = "s3"  # the host without Ray: Redis is there, and whoever submits
TOKEN = "three-hosts-0123456789"
# As the chart sets it: work waits for the head.
HEAD_MAY_GO = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}


def why_not() -> str | None:
    if not SCRIPT.is_file():
        return "no ray-hosts.sh: set ORCHESTRATOR_TEST_DATA to the folder beside tools/ that holds it"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "unshare", "redis-server") if shutil.which(name) is None]
    if absent:
        return f"not found: {', '.join(absent)} (Debian: iproute2, util-linux, redis-server)"
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return "the hosts are up already, for somebody else" if "rhsw" in listed.stdout else None


@dataclass(frozen=True)
class Hosts:
    """A head, hosts ``w1`` and ``w2``, and one for whatever has no Ray."""

    folder: Path
    password: str

    def __call__(self, verb: str, *words: str, **more: str) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), verb, str(self.folder), *words],
            env={**self.environment(), **more},
            cwd=self.folder,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, [path.read_text() for path in self.folder.glob("*.log")]

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        kept = {key: value for key, value in environment(self.folder).items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"RAY": f"{sys.executable} -m ray.scripts.scripts", "RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}
        return {**kept, **own, "PATH": path, "RAY_API_SERVER_ADDRESS": ADDRESS}

    def start_head(self) -> None:
        redis = {"RAY_REDIS_ADDRESS": "10.77.0.4:6380", "RAY_ARGS": f"--redis-password={self.password}"}
        self("start", "head", CPUS="0", **redis, **HEAD_MAY_GO)

    def workers_on(self, host: str) -> list[psutil.Process]:
        """The processes that train on ``host``, by the names that Ray gives them."""
        words = ["ip", "netns", "pids", f"rh{host}"]
        listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        found = []
        for pid in map(int, listed):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def start(self, *words: str, token: str = TOKEN) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", f"rh{ELSEWHERE}", *words],
            env=self.environment(token),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def orchestrator(self, *words: str, token: str = TOKEN) -> Ended:
        process = self.start(sys.executable, "-m", "orchestrator", *words, token=token)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return Ended(process.returncode, out, err)

    def run(self, name: str) -> Path:
        return self.folder / "orchestrator" / "runs" / name

    def step(self, name: str) -> int:
        """The last step that the run has recorded; its folder is on a disk that all hosts share."""
        records = self.run(name) / "metrics.jsonl"
        return max((int(record["step"]) for record in read(records)), default=0) if records.exists() else 0


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
