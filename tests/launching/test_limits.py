"""Control groups as files in a temporary folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.launching.cluster import embedded_shape
from orchestrator.launching.limits import Limits, container_limits, usable_cpus

GIB = 2**30


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
    assert container_limits(root, tmp_path / "self") == limits


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
    assert container_limits(root, tmp_path / "self") == limits


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert container_limits(tmp_path / "cgroup", tmp_path / "self") == Limits()
    (tmp_path / "self").write_text("0::/../../outside\n")
    assert container_limits(tmp_path, tmp_path / "self") == Limits()


@pytest.mark.parametrize(("quota", "usable"), [(None, 4), (0.5, 1), (1.5, 1), (3.0, 3), (64.0, 4)])
def test_cpus_are_those_of_the_affinity_and_whole_ones_of_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 6, 7})
    assert usable_cpus(Limits(cpus=quota)) == usable


def test_an_embedded_cluster_offers_no_more_than_the_quota() -> None:
    assert embedded_shape(Limits(cpus=1.5)).cpus == 1.0
    assert embedded_shape(Limits()).cpus == len(os.sched_getaffinity(0))
