"""Folders that can be written or not, and disks as full as told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.hardware import MIB
from orchestrator.launching.doctor.storage import disk, runs_folder, temporary_is_usable

GIB = 2**30

ELSEWHERE = "--set checkpoint.uri=/another/folder"


def test_a_folder_for_runs_is_probed_but_neither_created_nor_littered(tmp_path: Path) -> None:
    new = tmp_path / "deep" / "runs"
    assert runs_folder(tmp_path) == [Finding("storage.runs", "ok", f"{tmp_path} can be written")]
    assert runs_folder(new) == [Finding("storage.runs", "ok", f"{new} can be written, once created")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["runs", "runs/deeper"])
def test_a_file_in_the_place_of_a_folder_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "runs").write_text("not a folder")
    folder = tmp_path / below
    assert runs_folder(folder) == [
        Finding("storage.runs", "problem", f"cannot be written: {folder}: Not a directory", ELSEWHERE)
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_folder_without_permission_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert runs_folder(tmp_path) == [
        Finding("storage.runs", "problem", f"cannot be written: {tmp_path}: Permission denied", ELSEWHERE)
    ]


@pytest.mark.parametrize(
    ("free", "status"), [(GIB - 1, "problem"), (GIB, "warning"), (5 * GIB - 1, "warning"), (5 * GIB, "ok")]
)
def test_disk(tmp_path: Path, free: int, status: str) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return 10 * GIB, 10 * GIB - free, free

    [found] = disk("disk.runs", tmp_path / "new", ELSEWHERE, disk_usage=usage)
    assert (found.check, found.status) == ("disk.runs", status)
    assert found.remedy == ("" if status == "ok" else f"make room (du -xh {tmp_path}/new | sort -h), or {ELSEWHERE}")
    assert asked == [tmp_path]


def test_a_small_disk_says_how_small(tmp_path: Path) -> None:
    [found] = disk("disk.runs", tmp_path, ELSEWHERE, disk_usage=lambda _: (10 * GIB, 9 * GIB, 512 * MIB))
    assert found.detail == f"512 MiB of 10 GiB free for {tmp_path}"


def test_a_temporary_folder_too_deep_for_sockets() -> None:
    folder = Path("/scratch") / ("x" * 60)
    assert temporary_is_usable(folder) == [
        Finding(
            "storage.temporary",
            "problem",
            f"{folder} is 26 characters too long for Ray's sockets",
            "export RAY_TMPDIR=/tmp/ray",
        )
    ]


def test_a_temporary_folder_that_is_a_file() -> None:
    assert temporary_is_usable(Path("/dev/null/ray")) == [
        Finding(
            "storage.temporary",
            "problem",
            "cannot be written: /dev/null/ray: Not a directory",
            "export RAY_TMPDIR=/tmp/ray",
        )
    ]
