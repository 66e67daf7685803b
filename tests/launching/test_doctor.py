"""Each check against real conditions in a temporary folder; what a machine may lack is passed in as a value."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from orchestrator.config import AdamW, Recipe, RunConfig, ScaleConfig, Stop
from orchestrator.launching import doctor
from orchestrator.launching.doctor import (
    CHECKS,
    GIB,
    MIB,
    SUBMIT,
    Check,
    Cluster,
    Device,
    Driver,
    Finding,
    Frameworks,
    Limits,
    Machine,
    breaks_a_run,
    examine,
    rows,
)
from orchestrator.planning.cluster import ClusterShape
from orchestrator.storage.fence import DriverLock
from orchestrator.storage.folder import RunFolder

CPU_ONLY = Frameworks(torch="2.13.0+cpu", embedded=ClusterShape(nodes=1, cpus=2.0), deepspeed="0.19.8")
H100 = Device("NVIDIA H100", memory_bytes=80 * GIB, free_bytes=79 * GIB, bf16=True)
TWO_GPUS = Frameworks(
    torch="2.13.0", built_for="CUDA 13.0", devices=(H100, H100), nccl=True, embedded=ClusterShape(1, 16, 2, "H100")
)
DRIVER = Driver(gpus=("NVIDIA H100", "NVIDIA H100"), version="590.1")
PYTHON = ".".join(map(str, sys.version_info[:3]))
HERE = Cluster(ray="2.60.0", python=PYTHON, nodes=("127.0.0.1",), cpus=4.0, address="127.0.0.1:6379")
ELSEWHERE = "--set checkpoint.uri=/another/folder"


def config(*, workers: int = 2, name: str = "digits") -> RunConfig:
    recipe = Recipe(batch=32, optimizer=AdamW(learning_rate=1e-3), stop=Stop(steps=1))
    return RunConfig(name=name, recipe=recipe, scale=ScaleConfig(workers=workers))


# -- the whole examination ---------------------------------------------------------------------


def healthy(**changes: object) -> Machine:
    machine = Machine(
        frameworks=lambda: CPU_ONLY,
        driver=lambda: None,
        cluster=lambda _where, _mode: HERE,
        disk_usage=lambda _: (100 * GIB, 50 * GIB, 50 * GIB),
    )
    return dataclasses.replace(machine, **changes)


def test_a_healthy_machine_has_one_finding_for_each_check_in_the_order_of_the_list(tmp_path: Path) -> None:
    findings = examine(folder=tmp_path, environment={"HOME": str(tmp_path)}, machine=healthy())
    only_for_clusters = {"cluster.versions", "cluster.node", "cluster.capacity", "storage.shared"}
    assert [f.check for f in findings] == [name for name in CHECKS if name not in only_for_clusters]
    assert not breaks_a_run(findings)
    assert list(tmp_path.iterdir()) == []


def test_an_ill_machine_gets_a_remedy_for_everything_that_is_not_ok(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "RAY_ADDRESS": "http://head:8265", "GLOO_SOCKET_IFNAME": "nowhere0"}
    ill = healthy(
        frameworks=lambda: Frameworks(failure="importing torch: it crashed (SIGSEGV)"),
        disk_usage=lambda _: (100 * GIB, 100 * GIB, 0),
    )
    findings = examine(folder="s3://bucket/runs", environment=environment, machine=ill)
    wrong = [f for f in findings if f.status != "ok"]
    assert {"import.torch", "cluster", "storage.runs", "disk.temporary", "network.hostname"} <= {f.check for f in wrong}
    assert all(f.remedy for f in wrong)
    assert breaks_a_run(findings)


def test_a_job_is_held_against_what_is_there(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    findings = examine(folder=tmp_path, config=config(workers=3), environment=environment, machine=healthy())
    assert [f for f in findings if f.check == "cluster.capacity"] == [
        Finding(
            "cluster.capacity",
            "problem",
            "scale.workers=3 needs 1 CPU and 0 accelerators each, and the cluster has 2 CPUs and 0 accelerators "
            "on 1 node(s)",
            "set scale.workers=2, or a smaller scale.cpus_per_worker (now 1)",
        )
    ]


def test_the_folder_of_the_job_is_the_one_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = examine(config=config(), environment={"HOME": str(tmp_path)}, machine=healthy())
    assert Finding("storage.runs", "ok", f"{tmp_path}/runs can be written, once created") in findings


def test_a_check_that_never_ends_is_a_finding() -> None:
    stuck: Future[list[Finding]] = Future()
    check = Check("storage.runs", list, "umount -l /mnt/dead")
    assert doctor._outcome(check, stuck, time.monotonic()) == [
        Finding("storage.runs", "problem", "the check did not end in 60 s", "umount -l /mnt/dead")
    ]


def test_a_check_that_the_system_refuses_is_a_finding() -> None:
    def check() -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/secret")

    assert doctor._outcome(Check("disk.runs", check, "ls -ld /secret"), doctor._start(check), time.monotonic() + 9) == [
        Finding("disk.runs", "problem", "the check failed: [Errno 13] Permission denied: '/secret'", "ls -ld /secret")
    ]


def test_only_a_problem_breaks_a_run() -> None:
    assert not breaks_a_run([])
    assert not breaks_a_run([Finding("cpu", "ok", "2"), Finding("open_files", "warning", "1,024", "ulimit -n 65536")])
    assert breaks_a_run([Finding("cpu", "ok", "2"), Finding("storage.runs", "problem", "full", "rm")])


def test_rows_cannot_steer_a_terminal() -> None:
    assert rows([Finding("lock.run", "ok", "run\x1b[2J is owned\nby me")]) == [
        ("lock.run", "ok", "run?[2J is owned?by me", "")
    ]


@pytest.mark.slow
def test_this_very_machine_is_examined_in_seconds(tmp_path: Path) -> None:
    start_s = time.monotonic()
    findings = examine(folder=tmp_path)
    assert time.monotonic() - start_s < 30
    assert {f.check for f in findings} <= {*CHECKS}
    assert {f.check: f.status for f in findings}["import.deepspeed"] == "ok"


# -- Python and packages -----------------------------------------------------------------------


def test_python_is_new_enough_or_not() -> None:
    assert doctor.python((3, 12, 1)) == [Finding("python", "ok", "3.12.1")]
    assert doctor.python((3, 10, 9)) == [
        Finding("python", "problem", "3.10.9: 3.11 or newer is needed", "make install PYTHON=python3.11")
    ]


def test_packages_are_held_against_the_declared_ranges() -> None:
    declared = [
        "torch>=2.13,<2.15",
        "ray[train,tune]>=2.60,<2.61",
        "pyarrow>=26",
        "numpy>=2",
        "typer>=0.20",
        'pywin32>=300; sys_platform == "win32"',
        'pytest>=8; extra == "dev"',
    ]
    installed = {"torch": "2.13.0+cpu", "ray": "2.59.1", "numpy": "2.4.0", "typer": "0.19"}
    assert doctor.packages(declared, installed.get) == [
        Finding("package.torch", "ok", "2.13.0+cpu (<2.15,>=2.13)"),
        Finding(
            "package.ray",
            "problem",
            "2.59.1: <2.61,>=2.60 is needed",
            "pip install 'ray[train,tune]<2.61,>=2.60'",
        ),
        Finding("package.pyarrow", "problem", "not installed: >=26 is needed", "pip install 'pyarrow>=26'"),
        Finding("package.typer", "problem", "0.19: >=0.20 is needed", "pip install 'typer>=0.20'"),
    ]


def test_without_a_declaration_the_versions_are_unknown() -> None:
    assert doctor.packages([]) == [
        Finding(
            "package.orchestrator",
            "warning",
            "orchestrator is not installed here, so the versions it needs are unknown",
            "pip install --editable .",
        )
    ]


def test_the_declaration_names_the_core_wherever_this_runs() -> None:
    assert {doctor.Requirement(text).name for text in doctor.declared_requirements()} >= {*doctor.CORE}


def test_imports_that_work() -> None:
    assert doctor.imports(CPU_ONLY) == [
        Finding("import.torch", "ok", "torch 2.13.0+cpu imports"),
        Finding("import.deepspeed", "ok", "DeepSpeed 0.19.8 imports"),
    ]


def test_an_import_that_fails_says_what_to_install() -> None:
    failed = dataclasses.replace(CPU_ONLY, deepspeed="", failure="ModuleNotFoundError: No module named 'hjson'")
    assert doctor.imports(failed) == [
        Finding("import.torch", "ok", "torch 2.13.0+cpu imports"),
        Finding("import.deepspeed", "problem", "ModuleNotFoundError: No module named 'hjson'", "pip install hjson"),
    ]


def test_torch_without_gloo_cannot_train_on_cpu() -> None:
    found = doctor.imports(dataclasses.replace(CPU_ONLY, gloo=False))[0]
    assert (found.check, found.status) == ("import.torch", "problem")
    assert found.detail == "torch 2.13.0+cpu is built without gloo, by which workers on CPU talk to each other"


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
    shape = ClusterShape(nodes=1, cpus=float(len(os.sched_getaffinity(0))))
    return Frameworks(torch="9.9", embedded=shape, deepspeed=version, failure=failure)


@pytest.mark.parametrize(
    ("deepspeed", "found"),
    [
        ("print('hello'); __version__ = '1.2.3'", asked(version="1.2.3")),
        ("import os; os.abort()", asked("importing DeepSpeed: it crashed (SIGABRT)")),
        ("import a.b", asked("importing DeepSpeed: ModuleNotFoundError: No module named 'a'")),
        ("raise SystemExit(3)", asked("importing DeepSpeed: exit code 3: noise that must not be taken for an answer")),
        ("import time; time.sleep(60)", asked("importing DeepSpeed: no end in sight, so it was stopped")),
    ],
    ids=["works", "crashes", "lacks a module", "exits", "hangs"],
)
def test_importing_deepspeed_is_tried_where_it_can_do_no_harm(modules: Path, deepspeed: str, found: Frameworks) -> None:
    (modules / "deepspeed.py").write_text(deepspeed)
    assert doctor.ask_frameworks(timeout_s=3) == found


def test_a_torch_that_cannot_be_imported_is_named(modules: Path) -> None:
    (modules / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    assert doctor.ask_frameworks(timeout_s=20) == Frameworks(
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
    assert doctor.ask_frameworks(timeout_s=20) == Frameworks(
        torch="9.9",
        built_for="CUDA 13.0",
        devices=(
            Device("NVIDIA H100 0", memory_bytes=80 * GIB, free_bytes=70 * GIB, bf16=True),
            Device("NVIDIA H100 1", memory_bytes=80 * GIB, free_bytes=70 * GIB, bf16=False, error=error),
        ),
        embedded=ClusterShape(1, float(len(os.sched_getaffinity(0))), 2, "H100"),
        deepspeed="not told",
    )


def test_without_a_gpu_deepspeed_is_imported_for_the_cpu(modules: Path) -> None:
    (modules / "deepspeed.py").write_text("import os; __version__ = os.environ['DS_ACCELERATOR']")
    assert doctor.ask_frameworks(timeout_s=20).deepspeed == "cpu"


# -- accelerators ------------------------------------------------------------------------------


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
            Finding(
                "accelerator",
                "warning",
                "torch 2.13.0 is built for CUDA 13.0 and finds no device (Found no NVIDIA driver): runs train on CPU",
                "install the device's driver; without a device: pip install --force-reinstall "
                "--index-url https://download.pytorch.org/whl/cpu torch==2.13.0",
            ),
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
    assert doctor.accelerators(frameworks, driver, environment) == [found]


def test_faulty_and_busy_devices_are_named_one_by_one() -> None:
    broken = dataclasses.replace(H100, error="CUDA error: uncorrectable ECC error encountered")
    busy = dataclasses.replace(H100, free_bytes=4 * GIB)
    frameworks = dataclasses.replace(TWO_GPUS, devices=(broken, busy, H100), nccl=False)
    assert doctor.accelerators(frameworks, DRIVER, {"CUDA_VISIBLE_DEVICES": "4,5,6"}) == [
        Finding(
            "accelerator",
            "problem",
            "device 0, NVIDIA H100, cannot compute: CUDA error: uncorrectable ECC error encountered",
            "export CUDA_VISIBLE_DEVICES=5,6",
        ),
        Finding(
            "accelerator",
            "problem",
            "torch 2.13.0 is built without NCCL, by which 2 devices talk to each other",
            doctor._reinstall("torch"),
        ),
        Finding(
            "accelerator",
            "warning",
            "device 1, NVIDIA H100, has 4 GiB of 80 GiB free: other processes hold the rest",
            "nvidia-smi --query-compute-apps=pid,name --format=csv",
        ),
    ]


def test_nothing_is_said_of_accelerators_when_torch_cannot_be_asked() -> None:
    assert doctor.accelerators(Frameworks(failure="importing torch: it crashed (SIGSEGV)"), DRIVER, {}) == []


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("printf 'NVIDIA H100, 590.1\\nNVIDIA H100, 590.1\\n'", DRIVER),
        ("echo 'No devices were found'; exit 6", Driver(failure="No devices were found")),
        ("exit 9", Driver(failure="exit code 9")),
        ("exec sleep 60", Driver(failure="it did not end in 0.5 s")),
    ],
)
def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: Driver) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.ask_driver(timeout_s=0.5) == found


def test_without_nvidia_smi_there_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.ask_driver() is None


# -- processors, memory, limits ----------------------------------------------------------------


def written(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_control_groups_version_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = written(
        tmp_path / "cgroup",
        {
            "cgroup.controllers": "cpu memory\n",
            "pod/cpu.max": "150000 100000\n",
            "pod/memory.max": f"{4 * GIB}\n",
            "pod/memory.current": f"{3 * GIB}\n",
            "pod/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 5\n",
            "pod/container/cpu.max": "max 100000\n",
            "pod/container/memory.max": "max\n",
        },
    )
    (tmp_path / "self").write_text("0::/pod/container\n")
    limits = Limits(cpus=1.5, memory_bytes=4 * GIB, memory_used_bytes=2 * GIB)
    assert doctor.container_limits(root, tmp_path / "self") == limits


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    root = written(
        tmp_path / "cgroup",
        {
            "cpu/docker/1/cpu.cfs_quota_us": "200000\n",
            "cpu/docker/1/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/docker/1/memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory/docker/1/memory.usage_in_bytes": f"{GIB}\n",
            "memory/docker/1/memory.stat": "cache 7\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    (tmp_path / "self").write_text("4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n")
    limits = Limits(cpus=2.0, memory_bytes=2 * GIB, memory_used_bytes=GIB)
    assert doctor.container_limits(root, tmp_path / "self") == limits


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert doctor.container_limits(tmp_path / "cgroup", tmp_path / "self") == Limits()
    (tmp_path / "self").write_text("0::/../../outside\n")
    assert doctor.container_limits(tmp_path, tmp_path / "self") == Limits()


def test_a_container_that_may_use_less_than_a_cluster_would_hand_out_is_warned() -> None:
    first = min(os.sched_getaffinity(0))
    assert doctor.cpus(ClusterShape(1, cpus=64), Limits(cpus=1.5)) == [
        Finding(
            "cpu",
            "warning",
            "the container may use 1.5, and a run's own cluster would hand out 64",
            f"taskset -c {first} orchestrator run JOB",
        )
    ]
    assert [f.status for f in doctor.cpus(ClusterShape(1, cpus=2), Limits(cpus=2.0))] == ["ok"]


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
    assert doctor.memory(limits, host) == [found]


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
    assert doctor.shared_memory(accelerators=accelerators, disk_usage=lambda _: usage) == [found]


def test_without_shared_memory_ray_does_not_start(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    assert doctor.shared_memory(folder, accelerators=0) == [
        Finding(
            "shared_memory",
            "problem",
            f"{folder}: No such file or directory: Ray does not start",
            f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}",
        )
    ]


def test_semaphores() -> None:
    def full() -> object:
        raise OSError(28, "No space left on device")

    assert doctor.semaphores() == [Finding("semaphores", "ok", "processes can share locks")]
    assert doctor.semaphores(full) == [
        Finding(
            "semaphores",
            "warning",
            "processes cannot share a lock (No space left on device): data loaders with workers fail",
            "mount -o remount,size=2G,mode=1777 /dev/shm",
        )
    ]


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ((20_000, 20_000), Finding("open_files", "ok", "20,000")),
        ((1_024, 1_048_576), Finding("open_files", "ok", "1,024, which Ray raises to 65,536")),
        ((-1, -1), Finding("open_files", "ok", "unlimited")),
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
    assert doctor.open_files(limits) == [found]


# -- cluster -----------------------------------------------------------------------------------


def never(where: str, mode: str) -> Cluster:
    raise AssertionError(f"{where} was asked")


def existing(
    text: str, *, answer: Cluster | None = None, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    return doctor.existing_cluster(
        text,
        "--address",
        environment or {"HOME": "/nonexistent"},
        config=None,
        home="runs",
        ask=never if answer is None else lambda _where, _mode: answer,
    )


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_without_an_address_a_run_starts_its_own_cluster() -> None:
    assert doctor.embedded_cluster(TWO_GPUS, config()) == [
        Finding("cluster", "ok", "none named: a run starts its own here, with 16 CPUs and 2 accelerators"),
        Finding("cluster.capacity", "ok", "2 workers of digits can be placed"),
    ]


def test_a_closed_port_is_reported_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    start_s = time.monotonic()
    assert existing(f"127.0.0.1:{closed}") == [
        Finding(
            "cluster",
            "problem",
            f"--address=127.0.0.1:{closed} cannot be reached: Connection refused",
            "start it with ray start --head --port=6379, or leave --address out to train here",
        )
    ]
    assert time.monotonic() - start_s < 1


@pytest.mark.parametrize(
    ("text", "detail", "remedy"),
    [
        ("head", "--address=head is no address", "--address HOST:6379"),
        ("head:x", "--address=head:x is no address", "--address HOST:6379"),
        (":6379", "--address=:6379 is no address", "--address HOST:6379"),
        ("ray://head:10001", "--address=ray://head:10001 is a Ray Client server, and a run takes HOST:6379", SUBMIT),
        ("https://me:secret@head", "--address=https://head is a server for jobs, and a run takes HOST:6379", SUBMIT),
    ],
)
def test_what_is_no_address_for_a_run(text: str, detail: str, remedy: str) -> None:
    assert existing(text) == [Finding("cluster", "problem", detail, remedy)]


def test_auto_where_no_cluster_was_started() -> None:
    assert existing("auto", answer=Cluster()) == [
        Finding("cluster", "problem", "auto: no cluster was started on this machine", "ray start --head --port=6379")
    ]


def test_a_cluster_that_answers_and_fits(port: int) -> None:
    assert existing(f"127.0.0.1:{port}", answer=HERE) == [
        Finding("cluster", "ok", f"127.0.0.1:{port}: 1 node, 4 CPUs, 0 accelerators"),
        Finding("cluster.versions", "ok", f"Ray 2.60.0 and Python {PYTHON}, as here"),
        Finding("cluster.node", "ok", "this machine is one of its nodes"),
    ]


def test_an_open_port_without_ray_behind_it(port: int) -> None:
    assert existing(f"127.0.0.1:{port}", answer=Cluster(failure="no end in sight, so it was stopped")) == [
        Finding(
            "cluster",
            "problem",
            f"127.0.0.1:{port} is open, but does not answer as a Ray cluster: no end in sight, so it was stopped",
            "--address HOST:PORT as ray start --head has printed it",
        )
    ]


@pytest.mark.parametrize(
    ("environment", "detail", "remedy"),
    [
        (
            {"HOME": "/nonexistent"},
            "wants a token, and there is none here",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(ssh HEAD ray get-auth-token)",
        ),
        (
            {"RAY_AUTH_TOKEN": "secret"},
            "wants a token; there is one here, which Ray does not send while RAY_AUTH_MODE is not token",
            "export RAY_AUTH_MODE=token",
        ),
        (
            {"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_MODE": "token"},
            "wants a token, and the one here is another cluster's",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(ssh HEAD ray get-auth-token)",
        ),
    ],
)
def test_a_cluster_that_wants_another_token(
    port: int, environment: Mapping[str, str], detail: str, remedy: str
) -> None:
    where = f"127.0.0.1:{port}"
    assert existing(where, answer=Cluster(refused=True), environment=environment) == [
        Finding("cluster", "problem", f"{where} {detail}", remedy)
    ]


@pytest.mark.parametrize(
    ("cluster", "environment", "found"),
    [
        (
            Cluster(ray="2.60.0", python="3.11.7"),
            {},
            Finding("cluster.versions", "ok", "Ray 2.60.0 and Python 3.11.7, as here"),
        ),
        (
            Cluster(ray="2.59.0", python="3.11.7"),
            {},
            Finding(
                "cluster.versions",
                "problem",
                "the cluster runs Ray 2.59.0, and this machine 2.60.0",
                "pip install 'ray[train,tune]==2.59.0'",
            ),
        ),
        (
            Cluster(ray="2.60.0", python="3.12.3"),
            {},
            Finding(
                "cluster.versions",
                "problem",
                "the cluster runs Python 3.12.3, and this machine 3.11.7",
                "make clean install PYTHON=python3.12",
            ),
        ),
        (
            Cluster(ray="2.60.0", python="3.11.9"),
            {},
            Finding(
                "cluster.versions",
                "problem",
                "the cluster runs Python 3.11.9, and this machine 3.11.7: Ray refuses the difference",
                "export RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor",
            ),
        ),
        (
            Cluster(ray="2.60.0", python="3.11.9"),
            {"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor"},
            Finding("cluster.versions", "ok", "Ray 2.60.0 and Python 3.11.9 there, 3.11.7 here"),
        ),
    ],
)
def test_versions_on_both_sides(cluster: Cluster, environment: Mapping[str, str], found: Finding) -> None:
    assert doctor.versions(cluster, environment, ray="2.60.0", python="3.11.7") == [found]


def test_a_driver_outside_the_cluster_is_told_how_to_join() -> None:
    assert doctor.member(Cluster(nodes=("10.0.0.1",)), "10.0.0.1:6379", own=["127.0.0.1", "10.0.0.9"]) == [
        Finding(
            "cluster.node",
            "problem",
            "this machine is none of the nodes of 10.0.0.1:6379, and a run is driven from one",
            f"ray start --address=10.0.0.1:6379; or from anywhere: {SUBMIT}",
        )
    ]


def test_workers_on_several_machines_need_a_folder_they_share() -> None:
    two = Cluster(nodes=("10.0.0.1", "10.0.0.2"))
    assert doctor.shared_folder(Cluster(nodes=("10.0.0.1",)), "/runs", "ext4") == []
    assert doctor.shared_folder(two, "/runs", "nfs4") == [Finding("storage.shared", "ok", "/runs is on nfs4")]
    assert doctor.shared_folder(two, "/runs", "ext4") == [
        Finding(
            "storage.shared",
            "warning",
            "/runs is on ext4, which the cluster's other nodes do not see",
            "--set checkpoint.uri=/folder/mounted/on/every/node",
        )
    ]


def test_the_token_is_told_of_but_never_told(tmp_path: Path) -> None:
    home, place = {"HOME": str(tmp_path)}, tmp_path / ".ray" / "auth_token"
    token = {**home, "RAY_AUTH_MODE": "token"}
    missing = f"RAY_AUTH_MODE=token, and there is none in RAY_AUTH_TOKEN or {place}"
    lacking = Finding("cluster.token", "problem", missing, "export RAY_AUTH_TOKEN_PATH=FILE, or unset RAY_AUTH_MODE")
    before = {
        "": doctor.token(home, ""),
        "named": doctor.token(home, "head:6379"),
        "token": doctor.token(token, ""),
        "named, token": doctor.token(token, "head:6379"),
        "in the environment": doctor.token({**token, "RAY_AUTH_TOKEN": "secret"}, "head:6379"),
    }
    assert before == {
        "": [Finding("cluster.token", "ok", "a fresh one for each cluster that a run starts")],
        "named": [Finding("cluster.token", "ok", "none is sent: RAY_AUTH_MODE is not set")],
        "token": [Finding("cluster.token", "ok", f"Ray will write one to {place}")],
        "named, token": [lacking],
        "in the environment": [Finding("cluster.token", "ok", "read from RAY_AUTH_TOKEN")],
    }
    written(tmp_path, {".ray/auth_token": "secret"})
    assert doctor.token(token, "head:6379") == [Finding("cluster.token", "ok", f"read from {place}")]
    assert doctor.token(home, "auto") == [Finding("cluster.token", "ok", f"read from {place}")]
    lost = {**token, "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}
    assert doctor.token(lost, "head:6379") == [
        Finding(
            "cluster.token",
            "problem",
            "RAY_AUTH_TOKEN_PATH=/nowhere/token cannot be read, or is empty",
            "unset RAY_AUTH_TOKEN_PATH",
        )
    ]


def test_what_a_child_says_last_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2hunter2")
    assert doctor._brief("Traceback\n  frame\nError: token hunter2hunter2 refused\n\n") == "Error: token *** refused"


@pytest.mark.ray
@pytest.mark.slow
def test_an_open_port_that_never_answers_is_given_up(port: int) -> None:
    assert doctor.ask_cluster(f"127.0.0.1:{port}", "") == Cluster(
        address=f"127.0.0.1:{port}", failure="no end in sight, so it was stopped"
    )


@pytest.fixture
def real_cluster(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a Ray cluster of one node with one CPU, closed with that token."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
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
            family = [*psutil.Process(ray.pid).children(recursive=True), psutil.Process(ray.pid)]
            for process in family:
                process.kill()
            psutil.wait_procs(family, timeout=10)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_cluster_is_asked_with_its_token_and_refuses_another(
    real_cluster: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, secret = real_cluster
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secret)
    deadline = time.monotonic() + 60
    found = Cluster()
    while not found.nodes and time.monotonic() < deadline:
        found = doctor.ask_cluster(address, "")
    ray = doctor.installed_version("ray") or ""
    assert found == Cluster(address=address, ray=ray, python=PYTHON, nodes=found.nodes, cpus=1.0)
    assert doctor.member(found, address) == [Finding("cluster.node", "ok", "this machine is one of its nodes")]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abracadabra")
    assert doctor.ask_cluster(address, "") == Cluster(address=address, refused=True)


# -- storage -----------------------------------------------------------------------------------


def test_a_folder_for_runs_is_probed_but_neither_created_nor_littered(tmp_path: Path) -> None:
    new = tmp_path / "deep" / "runs"
    assert doctor.runs_folder(tmp_path) == [Finding("storage.runs", "ok", f"{tmp_path} can be written")]
    assert doctor.runs_folder(new) == [Finding("storage.runs", "ok", f"{new} can be written, once created")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["runs", "runs/deeper"])
def test_a_file_in_the_place_of_a_folder_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "runs").write_text("not a folder")
    folder = tmp_path / below
    assert doctor.runs_folder(folder) == [
        Finding("storage.runs", "problem", f"cannot be written: {folder}: Not a directory", ELSEWHERE)
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_folder_without_permission_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor.runs_folder(tmp_path) == [
        Finding("storage.runs", "problem", f"cannot be written: {tmp_path}: Permission denied", ELSEWHERE)
    ]


@pytest.mark.parametrize("folder", ["s3://bucket/runs", Path("s3://bucket/runs"), "file:///runs"])
def test_a_url_is_not_supported(folder: str | Path) -> None:
    assert doctor.runs_folder(folder) == [
        Finding(
            "storage.runs",
            "problem",
            f"{folder}: only folders of this machine or a shared filesystem can be used",
            "--set checkpoint.uri=runs",
        )
    ]


@pytest.mark.parametrize(
    ("free", "status"), [(GIB - 1, "problem"), (GIB, "warning"), (5 * GIB - 1, "warning"), (5 * GIB, "ok")]
)
def test_disk(tmp_path: Path, free: int, status: str) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return 10 * GIB, 10 * GIB - free, free

    [found] = doctor.disk("disk.runs", tmp_path / "new", ELSEWHERE, disk_usage=usage)
    assert (found.check, found.status) == ("disk.runs", status)
    assert found.remedy == ("" if status == "ok" else f"make room (du -xh {tmp_path}/new | sort -h), or {ELSEWHERE}")
    assert asked == [tmp_path]


def test_a_small_disk_says_how_small(tmp_path: Path) -> None:
    [found] = doctor.disk("disk.runs", tmp_path, ELSEWHERE, disk_usage=lambda _: (10 * GIB, 9 * GIB, 512 * MIB))
    assert found.detail == f"512 MiB of 10 GiB free for {tmp_path}"


def test_a_temporary_folder_too_deep_for_sockets() -> None:
    folder = Path("/scratch") / ("x" * 60)
    assert doctor.temporary_is_usable(folder) == [
        Finding(
            "storage.temporary",
            "problem",
            f"{folder} is 26 characters too long for Ray's sockets",
            "export RAY_TMPDIR=/tmp/ray",
        )
    ]


def test_a_temporary_folder_that_is_a_file() -> None:
    assert doctor.temporary_is_usable(Path("/dev/null/ray")) == [
        Finding(
            "storage.temporary",
            "problem",
            "cannot be written: /dev/null/ray: Not a directory",
            "export RAY_TMPDIR=/tmp/ray",
        )
    ]


# -- what dead processes leave behind ----------------------------------------------------------


def test_no_lock_of_an_extension_is_fine(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "torch_extensions"
    assert doctor.extension_locks({"HOME": str(tmp_path)}) == [Finding("lock.extension", "ok", f"none in {root}")]


def test_a_lock_whose_builder_is_dead_is_stale_and_one_that_is_open_is_not(tmp_path: Path) -> None:
    written(tmp_path, {"py311_cpu/shm comm/lock": "", "fused_adam/lock": ""})
    stale, live = tmp_path / "py311_cpu" / "shm comm" / "lock", tmp_path / "fused_adam" / "lock"
    with live.open():
        found = doctor.extension_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert found == [
        Finding("lock.extension", "ok", f"process {os.getpid()} is building fused_adam"),
        Finding(
            "lock.extension",
            "problem",
            f"{stale}: its builder is dead, and every start that needs shm comm waits for ever",
            f"rm '{stale}'",
        ),
    ]


def a_run(folder: Path, name: str) -> RunFolder:
    run = RunFolder(folder / name)
    run.create()
    return run


def test_a_run_that_is_being_driven_is_a_problem_only_for_itself(tmp_path: Path) -> None:
    lock = DriverLock(a_run(tmp_path, "digits").control)
    detail = f"digits is owned by process {os.getpid()} on {socket.gethostname()}"
    remedy = "wait for it, stop it, or --set name=another-name"
    try:
        assert doctor.run_locks(tmp_path) == [Finding("lock.run", "ok", detail)]
        assert doctor.run_locks(tmp_path, name="other") == [Finding("lock.run", "ok", detail)]
        assert doctor.run_locks(tmp_path, name="digits") == [Finding("lock.run", "problem", detail, remedy)]
    finally:
        lock.release()
    assert doctor.run_locks(tmp_path, name="digits") == [Finding("lock.run", "ok", "no run is being driven")]


def test_the_lock_of_a_dead_driver_is_not_even_tried(tmp_path: Path) -> None:
    run = a_run(tmp_path, "digits")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    written(run.control, {"driver.lock": f"process {gone.pid} on {socket.gethostname()}"})
    assert not doctor.is_held(run)


def test_drafts_are_left_over_only_where_no_driver_lives(tmp_path: Path) -> None:
    run = a_run(tmp_path, "digits")
    written(run.checkpoints, {".draft-step-00000120/rank-00000.pt": "x" * 2048, "step-00000060/manifest.json": "{}"})
    assert doctor.drafts(tmp_path) == [
        Finding(
            "checkpoint.draft",
            "warning",
            "digits left 1 unfinished, 2 KiB in all",
            f"rm -r {run.checkpoints}/.draft-*",
        )
    ]
    lock = DriverLock(run.control)
    try:
        assert doctor.drafts(tmp_path) == [Finding("checkpoint.draft", "ok", "none left unfinished")]
    finally:
        lock.release()


# -- network -----------------------------------------------------------------------------------


def test_a_host_name_that_leads_home() -> None:
    name = socket.gethostname()
    assert doctor.hostname({}, resolve=lambda _: "127.0.0.1") == [
        Finding("network.hostname", "ok", f"{name} is 127.0.0.1")
    ]


def test_a_host_name_that_leads_nowhere_or_elsewhere() -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    name, use = socket.gethostname(), "export GLOO_SOCKET_IFNAME=eth1"
    reasons = {"Name or service not known": unknown, "Cannot assign requested address": lambda _: "198.51.100.7"}
    for reason, resolve in reasons.items():
        assert doctor.hostname({}, resolve=resolve, interfaces=["lo", "eth1"]) == [
            Finding(
                "network.hostname",
                "warning",
                f"{name} leads to no address of this machine ({reason}): workers on CPU use loopback, or do not meet",
                use,
            )
        ]


def test_an_interface_that_does_not_exist() -> None:
    interfaces = ["lo", "eth1"]
    assert doctor.hostname({"GLOO_SOCKET_IFNAME": "eth1"}, interfaces=interfaces) == [
        Finding("network.hostname", "ok", "workers use eth1 (GLOO_SOCKET_IFNAME)")
    ]
    assert doctor.hostname({"GLOO_SOCKET_IFNAME": "eth0"}, interfaces=interfaces) == [
        Finding(
            "network.hostname",
            "problem",
            "GLOO_SOCKET_IFNAME=eth0: there is no interface eth0, only lo, eth1",
            "export GLOO_SOCKET_IFNAME=eth1",
        )
    ]
