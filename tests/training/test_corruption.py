"""Ten thousand damages to a checkpoint: each is refused, or changed nothing of what would be loaded."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import CheckpointError
from orchestrator.planning.layout import Layout
from orchestrator.storage.folder import write_json
from orchestrator.storage.tree import file_sha256
from orchestrator.training.checkpoint import MANIFEST, list_checkpoints, sealed_manifest, verify
from orchestrator.training.state import TrainState

DAMAGES = 10_000
NAMES = ("rank-00000.pt", "rank-00001.pt", "state/model.pt", "state/optimizer_0.pt", "state/optimizer_1.pt")
KEY = {"workers": 2, "zero_stage": 1, "precision": "fp32"}


def write_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint of a tiny model, in the form in which all are written; of another step all files differ."""
    folder = root / f"step-{step:08d}"
    (folder / "state").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        torch.save({"weights": torch.full((8,), float(step * 10 + number))}, folder / name)
    files = {name: [(folder / name).stat().st_size, file_sha256(folder / name)] for name in NAMES}
    state = TrainState(Layout(2, 4, 2), step=step, samples=16 * step, progress=16.0 * step, loss=0.5)
    write_json(folder / MANIFEST, sealed_manifest(state, KEY, files))
    return folder


def loaded(folder: Path) -> Any:
    """All that a run would take up from a checkpoint, or None where it is refused."""
    try:
        manifest = verify(folder)
    except CheckpointError:
        return None
    values = {name: torch.load(folder / name, weights_only=True)["weights"].tolist() for name in manifest["files"]}
    return manifest["state"], manifest["layout_key"], values


# -- damages: each changes files below ``folder``, given one of their paths and random numbers ---------------------


def truncate(path: Path, draw: random.Random, _: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def flip_bits(path: Path, draw: random.Random, _: Path) -> None:
    data = bytearray(path.read_bytes())
    for _flip in range(draw.choice((1, 1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def blank(path: Path, draw: random.Random, _: Path) -> None:
    """As a disk does that lost a block."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randrange(1, 512))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def extend(path: Path, draw: random.Random, _: Path) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 64)))


def remove(path: Path, draw: random.Random, _: Path) -> None:
    path.unlink()


def swap(path: Path, draw: random.Random, _: Path) -> None:
    """With another file of the same checkpoint."""
    other = draw.choice([each for each in path.parents[path.parent.name == "state"].rglob("*.pt") if each != path])
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def mix(path: Path, draw: random.Random, other: Path) -> None:
    """With the file of the same name and size of another checkpoint."""
    folder = path.parents[path.parent.name == "state"]
    shutil.copyfile(other / path.relative_to(folder), path)


def smuggle(path: Path, draw: random.Random, other: Path) -> None:
    """A file that DeepSpeed would find by its name."""
    shutil.copyfile(other / "state" / "optimizer_1.pt", path.with_name("optimizer_2.pt"))


KINDS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    truncate,
    flip_bits,
    flip_bits,
    blank,
    extend,
    remove,
    swap,
    mix,
    smuggle,
)


@pytest.mark.slow
def test_no_damage_is_loaded(tmp_path: Path) -> None:
    other, folder = (write_checkpoint(tmp_path, step) for step in (10, 20))
    paths = [folder / name for name in (*NAMES, MANIFEST)]
    whole = {path: path.read_bytes() for path in paths}
    truth, others = loaded(folder), loaded(other)
    assert truth is not None
    assert truth != others
    refused = 0
    for seed in range(DAMAGES):
        draw = random.Random(seed)
        path = draw.choice(paths)
        draw.choice(KINDS)(path, draw, other)
        found = loaded(folder)
        assert found is None or found == truth, f"damage {seed} to {path.name} was loaded"
        refused += found is None
        for name, data in whole.items():
            if not name.exists() or name.read_bytes() != data:
                name.write_bytes(data)
        for added in (folder / "optimizer_2.pt", folder / "state" / "optimizer_2.pt"):
            with contextlib.suppress(FileNotFoundError):
                added.unlink()
    assert loaded(folder) == truth
    # A few change nothing that is read: a space of the manifest that became a line's end, zeros over zeros.
    assert refused > 0.97 * DAMAGES


@pytest.mark.slow
def test_a_damaged_manifest_never_makes_another_state(tmp_path: Path) -> None:
    """A bit of each of its bytes, one after the other."""
    folder = write_checkpoint(tmp_path, 20)
    truth, path = loaded(folder), folder / MANIFEST
    whole = path.read_bytes()
    accepted, draw = 0, random.Random(0)
    for byte in range(len(whole)):
        data = bytearray(whole)
        data[byte] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        found = loaded(folder)
        assert found is None or found == truth, byte
        accepted += found is not None
    assert accepted < 0.05 * len(whole)
    path.unlink()
    assert list_checkpoints(tmp_path) == []
