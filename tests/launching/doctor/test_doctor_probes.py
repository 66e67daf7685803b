"""What children say: fake frameworks, a fake nvidia-smi, a real cluster."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import end_family
from ports import free_port

from orchestrator.launching.cluster import embedded_shape
from orchestrator.launching.doctor.child import last_line
from orchestrator.launching.doctor.cluster import member
from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.probes import (
    Cluster,
    Device,
    Driver,
    Frameworks,
    ask_cluster,
    ask_driver,
    ask_frameworks,
)
from orchestrator.launching.doctor.software import installed_version

GIB = 2**30

PYTHON = ".".join(map(str, sys.version_info[:3]))

PATIENT_S = 240
"""Time that a child is given which ends by itself."""

DRIVER = Driver(gpus=("NVIDIA H100", "NVIDIA H100"), version="590.1")

FAKE_TORCH = """
from types import SimpleNamespace
__version__ = "9.9"
version = SimpleNamespace(cuda=None, hip=None)
cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
yes, no = lambda: True, lambda: False
distributed = SimpleNamespace(is_available=yes, is_gloo_available=yes, is_nccl_available=no)
print("noise that must not be taken for an answer")
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that child processes import from first, with a torch that imports at once."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return tmp_path


def asked(failure: str = "", version: str = "") -> Frameworks:
    shape = embedded_shape()
    return Frameworks(torch="9.9", embedded=shape, deepspeed=version, failure=failure)


# What comes before it may take long on a busy machine: the alarm that was set is brought forward once it hangs.
HANGS = """
import signal, time
if signal.alarm(0):
    signal.alarm(1)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("deepspeed", "found"),
    [
        ("print('hello'); __version__ = '1.2.3'", asked(version="1.2.3")),
        ("import os; os.abort()", asked("importing DeepSpeed: it crashed (SIGABRT)")),
        ("import a.b", asked("importing DeepSpeed: ModuleNotFoundError: No module named 'a'")),
        ("raise SystemExit(3)", asked("importing DeepSpeed: exit code 3: noise that must not be taken for an answer")),
        (HANGS, asked("importing DeepSpeed: no end in sight, so it was stopped")),
    ],
    ids=["works", "crashes", "lacks a module", "exits", "hangs"],
)
def test_importing_deepspeed_is_tried_where_it_can_do_no_harm(modules: Path, deepspeed: str, found: Frameworks) -> None:
    (modules / "deepspeed.py").write_text(deepspeed)
    assert ask_frameworks(timeout_s=PATIENT_S) == found


def test_a_torch_that_cannot_be_imported_is_named(modules: Path) -> None:
    (modules / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    assert ask_frameworks(timeout_s=PATIENT_S) == Frameworks(
        failure="importing torch: OSError: libcudart.so.13: cannot open shared object file"
    )


FAKE_CUDA = """
version.cuda = "13.0"
def properties(index):
    return SimpleNamespace(name=f"NVIDIA H100 {index}", total_memory=80 * 2**30, major=9 if index == 0 else 7)
def ones(size, device):
    import numpy
    if device == "cuda:1":
        raise RuntimeError("CUDA error: no kernel image is available\\nCompile with TORCH_USE_CUDA_DSA")
    return numpy.ones(size)
cuda = SimpleNamespace(is_available=yes, device_count=lambda: 2, get_device_properties=properties,
                       get_device_name=lambda index: "NVIDIA H100 80GB", mem_get_info=lambda index: (70 * 2**30, 0))
"""


def test_every_device_is_computed_on(modules: Path) -> None:
    (modules / "torch.py").write_text(FAKE_TORCH + FAKE_CUDA)
    (modules / "deepspeed.py").write_text("import os; __version__ = os.environ.get('DS_ACCELERATOR', 'not told')")
    error = "CUDA error: no kernel image is available"
    assert ask_frameworks(timeout_s=PATIENT_S) == Frameworks(
        torch="9.9",
        built_for="CUDA 13.0",
        devices=(
            Device("NVIDIA H100 0", memory_bytes=80 * GIB, free_bytes=70 * GIB, bf16=True),
            Device("NVIDIA H100 1", memory_bytes=80 * GIB, free_bytes=70 * GIB, bf16=False, error=error),
        ),
        embedded=dataclasses.replace(
            embedded_shape(), accelerators=2, accelerator="H100", device_memory_bytes=80 * GIB
        ),
        deepspeed="not told",
    )


def test_without_a_gpu_deepspeed_is_imported_for_the_cpu(modules: Path) -> None:
    (modules / "deepspeed.py").write_text("import os; __version__ = os.environ['DS_ACCELERATOR']")
    assert ask_frameworks(timeout_s=PATIENT_S).deepspeed == "cpu"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("printf 'NVIDIA H100, 590.1\\nNVIDIA H100, 590.1\\n'", DRIVER),
        ("echo 'No devices were found'; exit 6", Driver(failure="No devices were found")),
        ("exit 9", Driver(failure="exit code 9")),
        ("exec sleep 600", Driver(failure="it did not end in 0.5 s")),
    ],
)
def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: Driver) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert ask_driver(timeout_s=0.5 if "sleep" in script else PATIENT_S) == found


def test_without_nvidia_smi_there_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_driver() is None


def test_what_a_child_says_last_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2hunter2")
    assert last_line("Traceback\n  frame\nError: token hunter2hunter2 refused\n\n") == "Error: token *** refused"


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.ray
@pytest.mark.slow
def test_an_open_port_that_never_answers_is_given_up(port: int) -> None:
    assert ask_cluster(f"127.0.0.1:{port}") == Cluster(
        address=f"127.0.0.1:{port}", failure="no end in sight, so it was stopped"
    )


@pytest.fixture
def real_cluster(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a Ray cluster of one node with one CPU, closed with that token."""
    port = free_port()
    folder = Path("/tmp") / f"doctor-{os.getpid()}"  # a socket's path must be short, and tmp_path is not
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"),
        *(f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"),
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "open-sesame"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as ray:
        try:
            yield f"127.0.0.1:{port}", "open-sesame"
        finally:
            end_family(ray)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_cluster_is_asked_with_its_token_and_refuses_another(
    real_cluster: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, secret = real_cluster
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secret)
    found = answered(address, lambda answer: bool(answer.nodes))
    ray = installed_version("ray") or ""
    assert found == Cluster(address=address, ray=ray, python=PYTHON, nodes=found.nodes, cpus=1.0)
    assert member(found) == [Finding("cluster.node", "ok", "this machine is one of its nodes")]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abracadabra")
    refused = answered(address, lambda answer: not answer.failure)
    assert refused == Cluster(address=address, refused=True)


def answered(address: str, enough: Callable[[Cluster], bool]) -> Cluster:
    """What the cluster says once it says enough: it may have just started, and not answer in time."""
    deadline = time.monotonic() + PATIENT_S
    while not enough(found := ask_cluster(address)):
        assert time.monotonic() < deadline, found
    return found
