"""Which probe a run goes by: its own, an earlier one of the same, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.launching.probe_cache import keep, known_probe
from orchestrator.planning.probe import Probe, Trial
from orchestrator.storage.folder import RunFolder, write_json

KEY = "0" * 32


def probe(device: str) -> Probe:
    return Probe(device, 2, 1, "fp32", 1, "none", False, (Trial(8, 1000, 0.1, 0.04),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def test_a_new_run_takes_an_earlier_probe_and_one_that_goes_on_does_not(folder: RunFolder) -> None:
    keep(KEY, probe("elsewhere"))
    assert known_probe(folder, KEY, resumes=False) == probe("elsewhere")
    assert known_probe(folder, KEY, resumes=True) is None, "it was planned without"
    assert known_probe(folder, "1" * 32, resumes=False) is None


@pytest.mark.parametrize("resumes", [False, True])
def test_its_own_probe_comes_first(folder: RunFolder, resumes: bool) -> None:
    keep(KEY, probe("elsewhere"))
    write_json(folder.probe, probe("here").to_dict())
    assert known_probe(folder, KEY, resumes=resumes) == probe("here")


def test_a_damaged_one_is_as_good_as_none(folder: RunFolder, tmp_path: Path) -> None:
    keep(KEY, probe("elsewhere"))
    (tmp_path / "cache" / "orchestrator" / "probes" / f"{KEY}.json").write_text('{"device": 1}')
    assert known_probe(folder, KEY, resumes=False) is None
