"""Accelerators, processors, memory and limits that a machine may have."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.hardware import MIB, accelerators, cpus, memory, open_files, shared_memory
from orchestrator.launching.doctor.probes import Device, Driver, Frameworks
from orchestrator.launching.limits import Limits
from orchestrator.planning.cluster import ClusterShape

GIB = 2**30

CPU_ONLY = Frameworks(torch="2.13.0+cpu", embedded=ClusterShape(nodes=1, cpus=2.0), deepspeed="0.19.8")

H100 = Device("NVIDIA H100", memory_bytes=80 * GIB, free_bytes=79 * GIB, bf16=True)

TWO_GPUS = Frameworks(
    torch="2.13.0", built_for="CUDA 13.0", devices=(H100, H100), embedded=ClusterShape(1, 16, 2, "H100")
)

DRIVER = Driver(gpus=("NVIDIA H100", "NVIDIA H100"), version="590.1")


@pytest.mark.parametrize(
    ("frameworks", "driver", "environment", "found"),
    [
        pytest.param(CPU_ONLY, None, {}, Finding("accelerator", "ok", "none: runs train on CPU"), id="none"),
        pytest.param(
            TWO_GPUS,
            DRIVER,
            {},
            Finding("accelerator", "ok", "2 x NVIDIA H100 (80 GiB, bf16); torch for CUDA 13.0, driver 590.1"),
            id="two",
        ),
        pytest.param(
            CPU_ONLY,
            DRIVER,
            {},
            Finding(
                "accelerator",
                "problem",
                "nvidia-smi reports 2 x NVIDIA H100, and torch 2.13.0+cpu is a build for CPU",
                "pip install --force-reinstall --index-url https://pypi.org/simple torch==2.13.0",
            ),
            id="torch for CPU",
        ),
        pytest.param(
            CPU_ONLY,
            DRIVER,
            {"CUDA_VISIBLE_DEVICES": ""},
            Finding(
                "accelerator",
                "warning",
                "2 x NVIDIA H100 hidden by CUDA_VISIBLE_DEVICES='': runs train on CPU",
                "unset CUDA_VISIBLE_DEVICES",
            ),
            id="hidden",
        ),
        pytest.param(
            Frameworks(torch="2.13.0", built_for="CUDA 13.0", why_no_device="The NVIDIA driver is too old"),
            Driver(gpus=("Tesla T4",), version="470.1"),
            {},
            Finding(
                "accelerator",
                "problem",
                "nvidia-smi reports 1 x Tesla T4 with driver 470.1, and torch 2.13.0, built for CUDA 13.0, "
                "cannot use them: The NVIDIA driver is too old",
                "update the NVIDIA driver to one for CUDA 13.0; to train on CPU: CUDA_VISIBLE_DEVICES=''",
            ),
            id="driver too old",
        ),
        pytest.param(
            Frameworks(torch="2.13.0", built_for="CUDA 13.0", why_no_device="Found no NVIDIA driver"),
            None,
            {},
            Finding("accelerator", "ok", "none (Found no NVIDIA driver): runs train on CPU"),
            id="torch for CUDA without a driver",
        ),
        pytest.param(
            CPU_ONLY,
            Driver(failure="No devices were found"),
            {},
            Finding(
                "accelerator",
                "warning",
                "nvidia-smi is installed and fails: No devices were found: runs train on CPU",
                "modprobe nvidia; in a container: docker run --gpus all",
            ),
            id="nvidia-smi fails",
        ),
    ],
)
def test_accelerators(
    frameworks: Frameworks, driver: Driver | None, environment: Mapping[str, str], found: Finding
) -> None:
    assert accelerators(frameworks, driver, environment) == [found]


def test_faulty_and_busy_devices_are_named_one_by_one() -> None:
    broken = dataclasses.replace(H100, error="CUDA error: uncorrectable ECC error encountered")
    busy = dataclasses.replace(H100, free_bytes=4 * GIB)
    frameworks = dataclasses.replace(TWO_GPUS, devices=(broken, busy, H100))
    assert accelerators(frameworks, DRIVER, {}) == [
        Finding(
            "accelerator",
            "problem",
            "device 0, NVIDIA H100, cannot compute: CUDA error: uncorrectable ECC error encountered",
            "leave it out of CUDA_VISIBLE_DEVICES; nvidia-smi -q tells its errors",
        ),
        Finding(
            "accelerator",
            "warning",
            "device 1, NVIDIA H100, has 4 GiB of 80 GiB free: other processes hold the rest",
            "nvidia-smi --query-compute-apps=pid,name --format=csv",
        ),
    ]


def test_nothing_is_said_of_accelerators_when_torch_cannot_be_asked() -> None:
    assert accelerators(Frameworks(failure="importing torch: it crashed (SIGSEGV)"), DRIVER, {}) == []


def test_cpus_within_the_quota_of_a_container() -> None:
    total = os.cpu_count() or 1
    assert cpus(Limits(cpus=float(total) / 2)) == [Finding("cpu", "ok", f"{max(1, total // 2)} of {total} may be used")]


@pytest.mark.parametrize(
    ("limits", "host", "found"),
    [
        (Limits(), (64 * GIB, 60 * GIB), Finding("memory", "ok", "60 GiB of 64 GiB available")),
        (
            Limits(memory_bytes=4 * GIB, memory_used_bytes=GIB),
            (64 * GIB, 60 * GIB),
            Finding("memory", "ok", "3 GiB of 4 GiB available, the container's limit"),
        ),
        (
            Limits(),
            (4 * GIB, GIB),
            Finding(
                "memory",
                "warning",
                "1 GiB of 4 GiB available; Ray and each worker take about 0.5 GiB before the model",
                "--set scale.workers=1",
            ),
        ),
        (
            Limits(memory_bytes=4 * GIB, memory_used_bytes=4 * GIB - 100 * MIB),
            (64 * GIB, 60 * GIB),
            Finding(
                "memory",
                "problem",
                "100 MiB of 4 GiB available, the container's limit; Ray kills workers where more than 95% is in use",
                "end what takes it: ps aux --sort=-rss | head",
            ),
        ),
    ],
)
def test_memory(limits: Limits, host: tuple[int, int], found: Finding) -> None:
    assert memory(limits, host) == [found]


LARGER = "docker run --shm-size=2g; elsewhere: mount -o remount,size=2G /dev/shm"


@pytest.mark.parametrize(
    ("free", "accelerators", "found"),
    [
        (2 * GIB, 0, Finding("shared_memory", "ok", "2 GiB of 4 GiB free in /dev/shm")),
        (
            32 * MIB,
            1,
            Finding(
                "shared_memory",
                "warning",
                "32 MiB of 4 GiB free in /dev/shm: Ray keeps objects on disk instead, slowly",
                LARGER,
            ),
        ),
        (
            32 * MIB,
            8,
            Finding(
                "shared_memory",
                "problem",
                "32 MiB of 4 GiB free in /dev/shm: too little for NCCL between 8 devices",
                LARGER,
            ),
        ),
    ],
)
def test_shared_memory(free: int, accelerators: int, found: Finding) -> None:
    usage = (4 * GIB, 4 * GIB - free, free)
    assert shared_memory(accelerators=accelerators, disk_usage=lambda _: usage) == [found]


def test_without_shared_memory_ray_does_not_start(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    assert shared_memory(folder, accelerators=0) == [
        Finding(
            "shared_memory",
            "problem",
            f"{folder}: No such file or directory: Ray does not start",
            f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}",
        )
    ]


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ((20_000, 20_000), Finding("open_files", "ok", "20,000 per process")),
        ((1_024, 1_048_576), Finding("open_files", "ok", "65,536 per process")),
        ((-1, -1), Finding("open_files", "ok", "65,536 per process")),
        (
            (1_024, 2_048),
            Finding(
                "open_files",
                "warning",
                "2,048 per process: Ray's connections and files need more",
                "ulimit -n 65536, as root or in /etc/security/limits.conf",
            ),
        ),
    ],
)
def test_open_files(limits: tuple[int, int], found: Finding) -> None:
    assert open_files(limits) == [found]
