"""Weights as safetensors: the file holds what the run has learnt, to the bit, in every stage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from gloo_jobs import Toy, blocks, new_run, run_loop, tied, toy_config
from orchestrator import cli
from orchestrator.compression.weights import export_weights
from orchestrator.config import Stop
from orchestrator.errors import CheckpointError, RunFolderError
from orchestrator.storage.folder import write_json
from trained_runs import GROUPS

pytestmark = pytest.mark.slow


def trained(root: Path, build: Callable[[], nn.Module], stage: int) -> dict[str, torch.Tensor]:
    """Train a toy on two workers in the run folder ``root``; returns the loop's own weights and averaged buffers."""
    layout = {"zero_stage": stage, "precision": "fp32"}
    config = toy_config(2, recipe={"stop": Stop(steps=4)}, layout=layout)
    ends = GROUPS[2].run(run_loop, config, Toy(build), *new_run(root))
    write_json(root / "config.json", config.model_dump(mode="json"))
    means = {name: (ends[0].buffers[name] + ends[1].buffers[name]) / 2 for name in ends[0].buffers if "mean" in name}
    return {**ends[0].weights, **means}


@pytest.mark.parametrize("stage", [1, 3])
def test_the_file_holds_the_weights_to_the_bit(tmp_path: Path, stage: int) -> None:
    weights = trained(tmp_path / "run", blocks, stage)
    written = export_weights(str(tmp_path / "run"))
    found = load_file(written.file)
    assert set(found) == set(blocks().state_dict())
    assert written.num_tensors == len(found)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name
    blocks().load_state_dict(found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_weights_are_written_once_and_fill_a_model_that_ties_them(tmp_path: Path, stage: int) -> None:
    weights = trained(tmp_path / "run", tied, stage)
    written = export_weights(str(tmp_path / "run"), tmp_path / "w.safetensors")
    assert written.aliases == {"2.weight": "0.weight"}
    with safe_open(written.file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "2.weight": "0.weight"}
        assert set(opened.keys()) == set(tied().state_dict()) - {"2.weight"}
    model = tied()
    load_model(model, written.file)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_the_command_says_what_it_wrote_and_replaces_nothing_unasked(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def give(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["orchestrator", "export-weights", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    file = tmp_path / "new" / "digits.safetensors"
    assert give(str(digits_run), str(file), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == str(file)
    assert said["size_bytes"] == file.stat().st_size
    assert said["num_elements"] == sum(tensor.numel() for tensor in load_file(file).values())
    file.write_bytes(b"precious")
    assert give(str(digits_run), str(file)) == 2
    assert f"error: {file} exists: give another file, or --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == b"precious"
    assert give(str(digits_run), str(file), "--overwrite") == 0
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert len(load_file(file)) == said["num_tensors"]


def test_what_cannot_be_written_is_refused(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write: "):
        export_weights(str(digits_run), tmp_path / "file" / "w.safetensors")
    (tmp_path / "config.json").write_bytes((digits_run / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export_weights(str(tmp_path))
