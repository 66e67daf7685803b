"""The whole examination, on machines that are healthy or ill as told."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from orchestrator.config import AdamW, Recipe, RunConfig, ScaleConfig, Stop
from orchestrator.launching.doctor import examination
from orchestrator.launching.doctor.examination import DEADLINE_S, Check, Machine, _outcome, _start, examine
from orchestrator.launching.doctor.finding import Finding, breaks_a_run
from orchestrator.launching.doctor.probes import CLUSTER_S, FRAMEWORKS_S, Cluster, Frameworks, ask_frameworks
from orchestrator.planning.cluster import ClusterShape
from s3_server import Weed

GIB = 2**30

CPU_ONLY = Frameworks(torch="2.13.0+cpu", embedded=ClusterShape(nodes=1, cpus=2.0), deepspeed="0.19.8")

PYTHON = ".".join(map(str, sys.version_info[:3]))

HERE = Cluster(ray="2.60.0", python=PYTHON, nodes=("127.0.0.1",), cpus=4.0, address="127.0.0.1:6379")


CHECKS = [
    "python",
    "package.deepspeed",
    "package.pyarrow",
    "package.pydantic",
    "package.ray",
    "package.torch",
    "import.torch",
    "import.deepspeed",
    "accelerator",
    "cpu",
    "memory",
    "shared_memory",
    "open_files",
    "storage.temporary",
    "disk.temporary",
    "lock.extension",
    "network.hostname",
    "cluster",
    "storage.runs",
    "disk.runs",
    "lock.run",
    "checkpoint.draft",
]


def config(*, workers: int = 2, name: str = "digits") -> RunConfig:
    recipe = Recipe(batch=32, optimizer=AdamW(learning_rate=1e-3), stop=Stop(steps=1))
    return RunConfig(name=name, recipe=recipe, scale=ScaleConfig(workers=workers))


def healthy(**changes: object) -> Machine:
    machine = Machine(
        frameworks=lambda: CPU_ONLY,
        driver=lambda: None,
        cluster=lambda _where: HERE,
        disk_usage=lambda _: (100 * GIB, 50 * GIB, 50 * GIB),
    )
    return dataclasses.replace(machine, **changes)


def test_a_healthy_machine_has_one_finding_for_each_check_in_this_order(tmp_path: Path) -> None:
    findings = examine(folder=str(tmp_path), environment={"HOME": str(tmp_path)}, machine=healthy())
    assert [f.check for f in findings] == CHECKS
    assert not breaks_a_run(findings)
    assert list(tmp_path.iterdir()) == []


def test_an_ill_machine_gets_a_remedy_for_everything_that_is_not_ok(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "RAY_ADDRESS": "http://head:8265", "GLOO_SOCKET_IFNAME": "nowhere0"}
    ill = healthy(
        frameworks=lambda: Frameworks(failure="importing torch: it crashed (SIGSEGV)"),
        disk_usage=lambda _: (100 * GIB, 100 * GIB, 0),
    )
    findings = examine(folder="gs://bucket/runs", environment=environment, machine=ill)
    wrong = [f for f in findings if f.status != "ok"]
    assert {"import.torch", "cluster", "storage.runs", "disk.temporary", "network.hostname"} <= {f.check for f in wrong}
    assert all(f.remedy for f in wrong)
    assert breaks_a_run(findings)


def test_a_job_is_held_against_what_is_there(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    findings = examine(folder=str(tmp_path), config=config(workers=3), environment=environment, machine=healthy())
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
    assert _outcome(check, stuck, time.monotonic()) == [
        Finding("storage.runs", "problem", "the check did not end in 60 s", "umount -l /mnt/dead")
    ]


def test_a_check_that_the_system_refuses_is_a_finding() -> None:
    def check() -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/secret")

    assert _outcome(Check("disk.runs", check, "ls -ld /secret"), _start(check), time.monotonic() + 240) == [
        Finding("disk.runs", "problem", "the check failed: [Errno 13] Permission denied: '/secret'", "ls -ld /secret")
    ]


def test_no_check_waits_for_another(tmp_path: Path) -> None:
    """The frameworks answer only once the disk has been looked at, which comes after them."""
    looked = threading.Event()

    def frameworks() -> Frameworks:
        return CPU_ONLY if looked.wait(50) else Frameworks(failure="nobody looked meanwhile")

    def disk_usage(_: Path) -> tuple[int, int, int]:
        looked.set()
        return 100 * GIB, 50 * GIB, 50 * GIB

    machine = healthy(frameworks=frameworks, disk_usage=disk_usage)
    findings = examine(folder=str(tmp_path), environment={"HOME": str(tmp_path)}, machine=machine)
    assert not breaks_a_run(findings)


def test_a_child_that_hangs_is_given_up_before_its_check_is() -> None:
    assert max(FRAMEWORKS_S, CLUSTER_S) < DEADLINE_S


@pytest.mark.slow
def test_this_very_machine_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "DEADLINE_S", 400.0)  # it may be busy
    findings = examine(folder=str(tmp_path), machine=Machine(frameworks=lambda: ask_frameworks(timeout_s=300)))
    assert {f.check for f in findings} == {*CHECKS}
    assert {f.check: f.status for f in findings}["import.deepspeed"] == "ok"


def test_a_cluster_that_is_named_is_held_against_this_machine(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "RAY_ADDRESS": "auto"}
    findings = examine(folder=str(tmp_path), config=config(workers=5), environment=environment, machine=healthy())
    assert {f.check: f.status for f in findings if f.check.startswith("cluster")} == {
        "cluster": "ok",
        "cluster.versions": "ok",
        "cluster.node": "ok",
        "cluster.capacity": "problem",
    }


def test_a_url_is_no_folder() -> None:
    found = examine(folder="gs://bucket/runs", environment={"HOME": "/"}, machine=healthy())
    [runs] = [f for f in found if f.check == "storage.runs"]
    reason = (
        "gs://bucket/runs: only folders of this machine or a shared filesystem, and s3://BUCKET/PREFIX, can be used"
    )
    assert runs == Finding("storage.runs", "problem", reason, "--set checkpoint.uri=runs")
    assert not {"disk.runs", "lock.run", "checkpoint.draft"} & {f.check for f in found}


@pytest.mark.s3
def test_a_place_in_s3_is_written_to(s3: Weed) -> None:
    def found(uri: str) -> Finding:
        findings = examine(folder=uri, environment={"HOME": "/"}, machine=healthy())
        return next(each for each in findings if each.check == "storage.runs")

    assert found("s3://bucket/runs") == Finding("storage.runs", "ok", "s3://bucket/runs can be read and written", "")
    missing = found("s3://no-such-bucket/runs")
    assert missing.status == "problem"
    assert missing.remedy == "create it, or correct the address"
