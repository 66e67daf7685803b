"""The working directory as one zip."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.launching.packing import files_to_pack, pack

TREE = {
    ".gitignore": "*.bin\n/data/\n!keep.bin\nnested/*.log\n",
    "jobs/mine.py": "x = 1",
    "keep.bin": "kept",
    "big.bin": "left out",
    "data/images.npy": "left out",
    "jobs/data/table.csv": "kept: the rule is for the root",
    "nested/.gitignore": "!important.log\nsecret.txt\n",
    "nested/a.log": "left out",
    "nested/important.log": "kept",
    "nested/secret.txt": "left out",
    "secret.txt": "kept: the rule is for nested",
    "with space/é.txt": "kept",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in files_to_pack(root)}


def test_it_packs_what_git_would_add(tree: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    words = ["git", "-c", "core.quotepath=off", "ls-files", "-z", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=True).stdout
    assert names(tree) == set(listed.strip("\0").split("\0"))
    assert "nested/important.log" in names(tree)


def test_environments_and_what_rayignore_names_stay_here(tree: Path) -> None:
    (tree / ".rayignore").write_text("with space/\n")
    for name in (".venv/bin/python", ".git/config", "jobs/__pycache__/x.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    assert not any(name.startswith((".venv", ".git/", "with", "jobs/__py")) for name in names(tree))


def test_the_same_files_are_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    first = pack(tree, tmp_path / "a.zip")
    for path in files_to_pack(tree):
        os.utime(path, (1, 1_600_000_000))
    second = pack(tree, tmp_path / "b.zip")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert (first.files, first.size_bytes) == (len(names(tree)), first.path.stat().st_size)
    with zipfile.ZipFile(first.path) as archive:
        assert archive.read("jobs/mine.py") == b"x = 1"
        assert set(archive.namelist()) == names(tree)


def test_too_large_a_folder_is_refused_with_what_is_large_in_it(tree: Path, tmp_path: Path) -> None:
    (tree / "weights").mkdir()
    (tree / "weights" / "model.pt").write_bytes(os.urandom(300_000))
    with pytest.raises(RequestError, match=r"weights \(.*shared storage"):
        pack(tree, tmp_path / "a.zip", limit_bytes=200_000)
    assert pack(tree, tmp_path / "a.zip", limit_bytes=400_000).files == len(names(tree))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no files to send"):
        pack(tmp_path / "empty", tmp_path / "a.zip")
