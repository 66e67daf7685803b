"""Checkpoints: a run goes on bit for bit, and nothing that was changed behind our back is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo import GlooGroup
from gloo_jobs import (
    Ended,
    Noisy,
    Rows,
    Steep,
    Toy,
    dropped_blocks,
    mlp,
    new_run,
    optimizer_after_restore,
    run_loop,
    toy_config,
)
from orchestrator.config import SGD, AdamW, CheckpointConfig, Penalties, RunConfig, Stop
from orchestrator.errors import CheckpointError
from orchestrator.telemetry.records import read
from orchestrator.training.checkpoint import TRUSTED, _seal, list_checkpoints, set_aside_after, verify

STAGES = [0, 1, 2, 3]
ADAMW = {"optimizer": AdamW(learning_rate=0.01), "penalties": Penalties(weight_decay=0.1, l1=1e-4), "clip_norm": 0.3}
NESTEROV = {"optimizer": SGD(learning_rate=0.05, momentum=0.9, nesterov=True)}


def config_of(recipe: dict[str, Any], stage: int, precision: str = "fp32", **checkpoint: Any) -> RunConfig:
    return toy_config(
        recipe={**recipe, "stop": Stop(steps=10)},
        layout={"zero_stage": stage, "precision": precision, "micro_batch": 4},
        checkpoint=CheckpointConfig(**checkpoint),
    )


def losses(root: Path) -> list[float]:
    return [record["loss"] for record in read(root / "metrics.jsonl")]


def same(ours: Ended, theirs: Ended) -> bool:
    pairs = [(ours.weights, theirs.weights), (ours.buffers, theirs.buffers)]
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


# -- going on ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("recipe", "precision"),
    [(ADAMW, "fp32"), (NESTEROV, "fp32"), (ADAMW, "bf16"), (ADAMW, "fp16")],
    ids=["adamw-fp32", "nesterov-fp32", "adamw-bf16", "adamw-fp16"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    two: GlooGroup, tmp_path: Path, recipe: dict[str, Any], precision: str, stage: int
) -> None:
    """With dropout, noise from all three generators, batch norm of each rank's own, and an evaluation on the way."""
    task = Noisy(dropped_blocks, evaluation=Rows.made_up(21, seed=1))
    config = config_of(recipe, stage, precision)
    whole = two.run(run_loop, config, task, *new_run(tmp_path / "whole"))
    root, driver = new_run(tmp_path / "parts")
    first = two.run(run_loop, config, task, root, driver, 5)
    second = two.run(run_loop, config, task, root, driver)
    assert [first[0].state.step, second[0].state.step] == [5, 10]
    assert losses(root) == losses(tmp_path / "whole")
    assert len(set(losses(root))) == 10
    for ours, theirs in zip(second, whole, strict=True):
        assert same(ours, theirs)
        assert ours.state.evaluation == theirs.state.evaluation
    assert not same(whole[0], whole[1]), "each rank has batch-norm statistics of its own"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_the_loss_scale_of_fp16_goes_on_too(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    """A loss so large that the scale had to be searched for: it is not searched for again."""
    config = config_of({"optimizer": SGD(learning_rate=1e-4)}, stage, "fp16")
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"stop": Stop(steps=18)})})
    two.run(run_loop, config, Steep(mlp), *new_run(tmp_path / "whole"))
    root, driver = new_run(tmp_path / "parts")
    two.run(run_loop, config, Steep(mlp), root, driver, 14)
    two.run(run_loop, config, Steep(mlp), root, driver)
    assert losses(root) == losses(tmp_path / "whole")
    skipped = [record["skipped"] for record in read(root / "metrics.jsonl")]
    assert (skipped[0], skipped[14]) == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_saving_and_evaluating_change_nothing(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    rows = Rows.made_up(21, seed=1)
    left_alone = two.run(run_loop, config_of(ADAMW, stage), Noisy(dropped_blocks), *new_run(tmp_path / "alone"))
    config = config_of(ADAMW, stage, interval_steps=2)
    watched = two.run(run_loop, config, Noisy(dropped_blocks, evaluation=rows), *new_run(tmp_path / "watched"))
    assert losses(tmp_path / "watched") == losses(tmp_path / "alone")
    assert [same(*pair) for pair in zip(watched, left_alone, strict=True)] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_decides_the_settings_and_not_the_file(two: GlooGroup, tmp_path: Path, stage: int) -> None:
    """They differ where a run goes on with ``--force-config``; what the optimizer remembers is the file's."""
    root, driver = new_run(tmp_path / "run")
    two.run(run_loop, config_of(ADAMW, stage), Toy(mlp), root, driver, 2)
    changed = {
        "optimizer": AdamW(learning_rate=0.01, beta1=0.5, beta2=0.6, eps=1e-4),
        "penalties": Penalties(weight_decay=0.7, l2=0.3),
    }
    wanted = {"betas": (0.5, 0.6), "eps": 1e-4, "decay": 0.7, "l2": 0.3, "l1": 0.0}
    for groups in two.run(optimizer_after_restore, config_of(changed, stage), Toy(mlp), root, driver):
        assert {name: groups[0][name] for name in wanted} == wanted
        assert [group["decay"] for group in groups] == [0.7, 0.0]


@pytest.mark.slow
def test_the_models_own_file_holds_the_averaged_buffers(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    ends = two.run(run_loop, config_of(ADAMW, 1), Toy(dropped_blocks), root, driver)
    file = root / "checkpoints" / "step-00000010" / "state" / "mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=True)["module"]
    for name in ("1.0.norm.running_mean", "1.2.norm.running_var"):
        mean = (ends[0].buffers[name].double() + ends[1].buffers[name].double()) / 2
        assert torch.allclose(saved[name].double(), mean, rtol=1e-6, atol=1e-7)
        assert not torch.equal(saved[name], ends[0].buffers[name])


@pytest.mark.slow
def test_what_is_trusted_is_what_deepspeed_names(two: GlooGroup, tmp_path: Path) -> None:
    """No more than that. No less either: every restored checkpoint of the tests above has passed ``verify``."""
    named: set[str] = set()
    for stage, precision in ((1, "fp32"), (2, "fp16")):
        root, driver = new_run(tmp_path / f"{stage}-{precision}")
        two.run(run_loop, config_of(ADAMW, stage, precision), Toy(mlp), root, driver, 1)
        for file in (root / "checkpoints").rglob("*.pt"):
            named |= set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    assert named == TRUSTED


# -- which there are ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(two: GlooGroup, tmp_path: Path, keep: int) -> None:
    root, driver = new_run(tmp_path / "run")
    (root / "checkpoints" / ".draft-step-00000099").mkdir()
    (root / "checkpoints" / "step-00000098").mkdir()
    two.run(run_loop, config_of(ADAMW, 1, keep=keep, interval_steps=2), Toy(mlp), root, driver)
    kept = [path.name for path in list_checkpoints(root / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (2, 4, 6, 8, 10)][-keep:]
    names = {path.name for path in (root / "checkpoints").iterdir()}
    assert names == {*kept, "step-00000098"}, "leftovers of earlier attempts are cleared away"


@pytest.mark.slow
def test_a_time_interval_saves_too(two: GlooGroup, tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    two.run(run_loop, config_of(ADAMW, 1, keep=20, interval_s=1e-6), Toy(mlp), root, driver)
    assert len(list_checkpoints(root / "checkpoints")) == 10


def test_a_folder_counts_once_its_manifest_is_there(tmp_path: Path) -> None:
    for name in ("step-00000020", "step-00000003", ".draft-step-00000030", "set-aside-step-00000040", "step-00000050"):
        (tmp_path / name).mkdir()
        if name != "step-00000050":
            (tmp_path / name / "manifest.json").write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]
    assert list_checkpoints(tmp_path / "none") == []


def test_setting_aside_what_came_after(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(str(step))
    stale = tmp_path / "set-aside-step-00000003"
    stale.mkdir()
    (stale / "from-before").touch()
    moved = set_aside_after(tmp_path, tmp_path / "step-00000001")
    assert [path.name for path in moved] == ["set-aside-step-00000002", "set-aside-step-00000003"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert [(path / "manifest.json").read_text() for path in moved] == ["2", "3"]
    assert not (moved[1] / "from-before").exists()


# -- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def written(two: GlooGroup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder stopped at step 2, saved by two workers in stage 1."""
    root, driver = new_run(tmp_path_factory.mktemp("written") / "run")
    two.run(run_loop, config_of(ADAMW, 1), Toy(mlp), root, driver, 2)
    return root


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint, to be damaged."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-00000002"


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(checkpoint)
    return str(caught.value)


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change the manifest as someone would who knows how it is sealed, or does not."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    before = manifest.pop("seal")
    change(manifest)
    path.write_text(json.dumps({**manifest, "seal": _seal(manifest) if seal else before}))


def admit(checkpoint: Path, name: str) -> None:
    """Write the right size and hash of a changed or new file into the manifest."""
    data = (checkpoint / name).read_bytes()
    edit_manifest(checkpoint, lambda m: m["files"].update({name: [len(data), hashlib.sha256(data).hexdigest()]}))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


OPTIMIZER = "state/zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.slow
def test_an_intact_one_passes(checkpoint: Path) -> None:
    manifest = verify(checkpoint)
    assert manifest["layout_key"] == {"workers": 2, "zero_stage": 1, "precision": "fp32"}
    assert manifest["state"]["step"] == 2
    assert [verify(checkpoint, part=part, parts=3) for part in range(3)] == [manifest] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank-00000.pt", OPTIMIZER, "state/mp_rank_00_model_states.pt", "zero_to_fp32.py"])
def test_a_changed_file(checkpoint: Path, name: str) -> None:
    changed = f"checkpoint {checkpoint} is corrupt: {name} has other bytes than were written"
    whole = (checkpoint / name).read_bytes()
    flip_a_bit(checkpoint / name)
    assert refusal(checkpoint) == changed
    (checkpoint / name).write_bytes(whole[:-1])
    assert refusal(checkpoint) == changed
    (checkpoint / name).unlink()
    assert refusal(checkpoint) == f"checkpoint {checkpoint} is corrupt: {name} is missing"


@pytest.mark.slow
def test_a_changed_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    whole = path.read_text()
    edit_manifest(checkpoint, lambda m: m["state"].update(samples=33), seal=False)
    assert refusal(checkpoint) == (
        f"checkpoint {checkpoint} is corrupt: manifest.json says something else than was written"
    )
    path.write_text(whole[:-10])
    assert refusal(checkpoint) == f"checkpoint {checkpoint} is corrupt: manifest.json cannot be read as JSON"
    path.write_bytes(b"\xff\xfe")
    assert refusal(checkpoint) == f"checkpoint {checkpoint} is corrupt: manifest.json cannot be read as JSON"
    path.write_text(json.dumps({**json.loads(whole), "format": 1}))
    assert refusal(checkpoint) == f"checkpoint {checkpoint}: no manifest of format 3"
    path.unlink()
    assert refusal(checkpoint) == f"checkpoint {checkpoint}: no manifest of format 3"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../config.json", "state/../../../secret.pt", "/etc/hostname"])
def test_a_manifest_that_points_outside(checkpoint: Path, name: str) -> None:
    edit_manifest(checkpoint, lambda m: m["files"].update({name: [1, "0"]}))
    assert refusal(checkpoint) == f"checkpoint {checkpoint}: the manifest names {name!r}, outside of its folder"


@pytest.mark.slow
def test_a_file_that_the_manifest_does_not_know(checkpoint: Path) -> None:
    """DeepSpeed would unpickle it, unverified, wherever it expects one of that name."""
    (checkpoint / "state" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(b"")
    (checkpoint / "notes.txt").write_text("my own")
    name = "state/zero_pp_rank_2_mp_rank_00_optim_states.pt"
    assert refusal(checkpoint) == f"checkpoint {checkpoint}: {name} is not in its manifest: move it elsewhere"
    edit_manifest(checkpoint, lambda m: m["files"].pop(OPTIMIZER))
    (checkpoint / name).unlink()
    assert refusal(checkpoint) == f"checkpoint {checkpoint}: {OPTIMIZER} is not in its manifest: move it elsewhere"


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", [OPTIMIZER, "rank-00000.pt"])
def test_a_pickle_that_would_run_code(two: GlooGroup, checkpoint: Path, protocol: int, name: str) -> None:
    """It is refused by its content, with the right hash in a sealed manifest, and never executed."""
    marker = checkpoint.parents[2] / "executed"
    torch.save({"optimizer_state_dict": Evil(marker)}, checkpoint / name, pickle_protocol=protocol)
    admit(checkpoint, name)
    message = refusal(checkpoint)
    if protocol == 2:
        assert message == (
            f"{checkpoint / name} names posix.system, which a checkpoint has no use for: it is not loaded"
        )
    else:  # its way of naming is none that torch itself writes
        assert message.startswith(f"checkpoint {(checkpoint / name).parent} is corrupt: {Path(name).name}: ")
    ends = two.run(run_loop, config_of(ADAMW, 1), Toy(mlp), *new_run(checkpoint.parents[1]))
    assert {(end.error, end.message) for end in ends} == {
        ("CheckpointError", f"{message}; no other is left: start anew with --fresh")
    }
    assert not marker.exists()
    torch.load(checkpoint.with_name(f"set-aside-{checkpoint.name}") / name, weights_only=False)
    assert marker.exists(), "the file would have been dangerous"


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02}q", pickle.dumps({}, 0), b"no pickle at all"])
def test_a_pickle_that_is_none(checkpoint: Path, content: bytes) -> None:
    """Whatever torch's reader stumbles over, a clear message comes out."""
    with zipfile.ZipFile(checkpoint / OPTIMIZER, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    admit(checkpoint, OPTIMIZER)
    assert refusal(checkpoint).startswith(f"checkpoint {checkpoint / 'state'} is corrupt: {Path(OPTIMIZER).name}: ")
    (checkpoint / OPTIMIZER).write_bytes(content)
    admit(checkpoint, OPTIMIZER)
    assert refusal(checkpoint).startswith(f"checkpoint {checkpoint / 'state'} is corrupt: {Path(OPTIMIZER).name}: ")


@pytest.mark.slow
def test_a_corrupt_one_is_set_aside_by_every_rank(two: GlooGroup, checkpoint: Path) -> None:
    """Each verifies a part of the files, and none loads before all have found their part good."""
    flip_a_bit(checkpoint / OPTIMIZER)
    ends = two.run(run_loop, config_of(ADAMW, 1), Toy(mlp), *new_run(checkpoint.parents[1]))
    message = (
        f"checkpoint {checkpoint} is corrupt: {OPTIMIZER} has other bytes than were written; "
        "no other is left: start anew with --fresh"
    )
    assert {(end.error, end.message) for end in ends} == {("CheckpointError", message)}
    assert checkpoint.with_name(f"set-aside-{checkpoint.name}").is_dir()


@pytest.mark.slow
def test_the_one_before_a_corrupt_one_is_used(two: GlooGroup, tmp_path: Path) -> None:
    config = config_of(ADAMW, 1, interval_steps=2, keep=3)
    two.run(run_loop, config, Toy(mlp), *new_run(tmp_path / "whole"))
    root, driver = new_run(tmp_path / "parts")
    two.run(run_loop, config, Toy(mlp), root, driver, 7)
    *_, before, newest = list_checkpoints(root / "checkpoints")
    flip_a_bit(newest / OPTIMIZER)
    ends = two.run(run_loop, config, Toy(mlp), root, driver)
    assert {end.error for end in ends} == {""}
    assert losses(root) == losses(tmp_path / "whole")
    assert (newest.with_name(f"set-aside-{newest.name}") / "manifest.json").is_file()
    assert int(before.name[-8:]) < int(newest.name[-8:])


@pytest.mark.slow
def test_another_precision(two: GlooGroup, checkpoint: Path) -> None:
    ends = two.run(run_loop, config_of(ADAMW, 1, "bf16"), Toy(mlp), *new_run(checkpoint.parents[1]))
    message = (
        f"{checkpoint} was saved with workers 2, zero stage 1, precision fp32 and this run has workers 2, "
        "zero stage 1, precision bf16: continue with layout.precision=fp32, or start anew with --fresh"
    )
    assert {(end.error, end.message) for end in ends} == {("CheckpointError", message)}
