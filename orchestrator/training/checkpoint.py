"""Checkpoints of a run: written by all ranks, made to exist by a manifest, verified before they are trusted.

A checkpoint is a folder ``step-00000120`` with DeepSpeed's files, one small file per rank, and a manifest with
the state, sizes and SHA-256 of everything else, and a seal over itself. It is written under another name and
renamed last, and renamed before it is deleted, so whatever has the right name is whole, and whatever else lies
there is a leftover.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.errors import CheckpointError, RunFolderError
from orchestrator.storage.fence import Guard
from orchestrator.storage.folder import read_json, write_json
from orchestrator.storage.stored_run import MANIFEST
from orchestrator.training.buffers import mean_of
from orchestrator.training.engine import Engine
from orchestrator.training.snapshot import Snapshot
from orchestrator.training.state import TrainState

__all__ = [
    "Checkpoints",
    "list_checkpoints",
    "load_into",
    "needed_by",
    "raise_together",
    "rank_files",
    "read_manifest",
    "sealed_manifest",
    "set_aside",
    "set_aside_after",
    "superseded",
    "take_shards",
    "verify",
]

Name = TypeVar("Name", str, Path)

FORMAT = 3
DRAFT = ".draft-"
OWN_FILE = re.compile(r"(?:rank-|.*zero_pp_rank_)(\d+)[._].*")
"""A file of one rank alone, as we and DeepSpeed 0.19.8 name it; all others are for every rank."""
# What DeepSpeed 0.19.8's own files name beyond tensors, seen in stages 0 to 3 with every precision and optimizer:
# an enum of stages, a dataclass of two offsets, and two loss scalers that hold a few numbers. Making one runs no
# code but its own. Any other global is refused, for DeepSpeed unpickles its files without restraint.
TRUSTED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, as seen from one worker."""

    root: Path
    fence: Guard
    keep: int
    layout_key: dict[str, Any]
    """What must be equal for shards to be loaded as they are: workers, ZeRO stage, precision."""

    def restore(self, engine: Engine) -> TrainState | None:
        """Load the newest checkpoint that is whole into ``engine``, or return None where there is none at all.

        One that fails its checks is set aside, and the one before it is tried. Saved at another number of workers or
        another ZeRO stage it is taken apart and put together anew; the state is returned as it was saved, with the
        layout it was saved with.

        Raises:
            CheckpointError: none of those that are there is whole, or it was saved in another precision.
        """
        problem = ""
        for newest in reversed(list_checkpoints(self.root)):
            try:
                manifest = self._verified_by_all(newest)
            except CheckpointError as error:
                problem = problem or str(error)
                if dist.get_rank() == 0:
                    self.fence.check()
                    set_aside(newest)
                dist.barrier()
            else:
                return load_into(engine, newest, manifest, self.layout_key)
        if problem:
            raise CheckpointError(f"{problem}; no other is left: start anew with --fresh")
        return None

    @property
    def uploading(self) -> bool:
        """Whether an earlier save is still under way: never, since ``save`` returns when all is done."""
        return False

    def check(self) -> None:
        """Nothing goes on beside the training here that could fail."""

    def finish(self) -> None:
        """Nothing is left to wait for."""

    def newest(self) -> str | None:
        """Where the newest checkpoint is."""
        existing = list_checkpoints(self.root)
        return str(existing[-1]) if existing else None

    def save(self, engine: Engine, state: TrainState) -> Path | None:
        """Write ``state`` and everything in ``engine``; returns the new checkpoint's folder. All ranks call it."""
        self.fence.check()
        final = self.root / f"step-{state.step:08d}"
        draft = self.root / f"{DRAFT}{final.name}"
        if dist.get_rank() == 0:
            for leftover in self.root.glob(f"{DRAFT}*"):
                shutil.rmtree(leftover)
            draft.mkdir(parents=True)
        dist.barrier()
        _write_shards(engine, draft)
        files = _gather(_digests(draft))
        if dist.get_rank() == 0:
            self._commit(draft, final, state, files)
        dist.barrier()
        return final

    def _commit(self, draft: Path, final: Path, state: TrainState, files: dict[str, Any]) -> None:
        if missing := rank_files() - set(files):
            raise CheckpointError(
                f"{self.root}: {', '.join(sorted(missing))} written by other workers cannot be seen here: "
                "with workers on several machines checkpoint.uri must be a folder that all of them share"
            )
        write_json(draft / MANIFEST, sealed_manifest(state, self.layout_key, files))
        self.fence.check()
        if final.exists():
            _delete(final)
        draft.rename(final)
        for old in superseded(list_checkpoints(self.root), self.keep, lambda path: read_manifest(path)["state"]):
            _delete(old)

    def _verified_by_all(self, checkpoint: Path) -> dict[str, Any]:
        """Each rank verifies its share of the files; all agree before any loads."""
        error = ""
        manifest: dict[str, Any] = {}
        try:
            manifest = verify(checkpoint, part=dist.get_rank(), parts=dist.get_world_size())
        except CheckpointError as found:
            error = str(found)
        raise_together(error)
        return manifest


def _write_shards(engine: Engine, draft: Path) -> None:
    """Write this rank's part of everything below ``draft``; on return all ranks have."""
    torch.save(_own_state(engine.save(draft)), draft / _rank_file())
    dist.barrier()


def take_shards(engine: Engine, draft: Path, snapshot: Snapshot) -> None:
    """Take this rank's part of everything into ``snapshot``, to be written below ``draft`` later."""
    snapshot.add(_own_state(engine.save(draft, snapshot)), draft / _rank_file())


def sealed_manifest(state: TrainState, layout_key: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    """What makes a checkpoint of ``files``, each with its size in bytes and its SHA-256."""
    manifest = {"format": FORMAT, "state": state.to_dict(), "layout_key": layout_key, "files": files}
    return {**manifest, "seal": _seal(manifest)}


def load_into(engine: Engine, folder: Path, manifest: dict[str, Any], layout_key: dict[str, Any]) -> TrainState:
    """Load the checkpoint in ``folder``, which was verified, into ``engine``; returns the state as it was saved.

    Raises:
        CheckpointError: it was saved in another precision.
    """
    saved = manifest["layout_key"]
    if saved["precision"] != layout_key["precision"]:
        raise CheckpointError(
            f"{folder} was saved with {_describe(saved)} and this run has {_describe(layout_key)}: "
            f"continue with layout.precision={saved['precision']}, or start anew with --fresh"
        )
    if saved == layout_key:
        mine = _rank_state(folder)
        engine.load(folder, mine["buffers"])
        _set_random_state(mine["random"])
    else:
        ranks = [_rank_state(folder, rank) for rank in range(saved["workers"])]
        engine.load_reshaped(folder, mean_of([one["buffers"] for one in ranks]))
        if dist.get_rank() < len(ranks):  # a new rank's generators have drawn nothing yet
            _set_random_state(ranks[dist.get_rank()]["random"])
    return TrainState.from_dict(manifest["state"])


def raise_together(error: str) -> None:
    """Raise on every rank once any has found an error; an empty text is none.

    Raises:
        CheckpointError: with the words of the lowest rank that has any.
    """
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        raise CheckpointError(next(text for text in errors if text))


def rank_files() -> set[str]:
    """Names of the files that each rank writes of itself."""
    return {_rank_file(rank) for rank in range(dist.get_world_size())}


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / MANIFEST).is_file())


def superseded(existing: Sequence[Name], keep: int, state_of: Callable[[Name], Mapping[str, Any]]) -> list[Name]:
    """Those of ``existing``, oldest first, that are neither of the newest ``keep`` nor the best that was evaluated."""
    older = list(existing[:-keep])
    states = {name: state_of(name) for name in existing} if older else {}
    best = states[existing[-1]]["best"] if older else None
    for name, state in states.items():
        if best is not None and state["best"] == best and state["evaluated_at"] == state["progress"]:
            return [other for other in older if other != name]
    return older


def needed_by(ranks: Collection[int], layout_key: Mapping[str, Any], manifest: Mapping[str, Any], name: str) -> bool:
    """Whether any of ``ranks`` loads the file ``name`` of a checkpoint with that ``manifest``.

    At the layout that it was saved at, each rank loads its own files and those of all; at another one, everything.
    """
    owner = OWN_FILE.fullmatch(name)
    return owner is None or int(owner[1]) in ranks or manifest.get("layout_key") != layout_key


def verify(
    checkpoint: Path,
    *,
    part: int = 0,
    parts: int = 1,
    needs: Callable[[Mapping[str, Any], str], bool] = lambda manifest, file: True,  # noqa: ARG005 - all of it
) -> dict[str, Any]:
    """Check files against the manifest and return it; ``part`` of ``parts`` checks every ``parts``-th file.

    ``needs`` is asked with the manifest and a file's name whether that will be loaded at all.

    Raises:
        CheckpointError: a file is missing, unknown, has other bytes, or is not a plain pickle of tensors.
    """
    manifest = read_manifest(checkpoint)
    files = manifest["files"]
    for name in files:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"checkpoint {checkpoint}: the manifest names {name!r}, outside of its folder")
    for path in sorted(checkpoint.rglob("*.pt")):
        if (name := path.relative_to(checkpoint).as_posix()) not in files:
            raise CheckpointError(f"checkpoint {checkpoint}: {name} is not in its manifest: move it elsewhere")
    mine = [(name, entry) for name, entry in sorted(files.items()) if needs(manifest, name)][part::parts]
    _refuse_other_bytes(checkpoint, mine)
    for name, _ in mine:
        if name.endswith(".pt"):
            _refuse_code(checkpoint / name)
    return manifest


def set_aside(checkpoint: Path) -> Path:
    """Rename ``checkpoint``, so that a run goes on from the one before it; returns the new name."""
    target = checkpoint.with_name(f"set-aside-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def set_aside_after(root: Path, keep: Path) -> list[Path]:
    """Rename every checkpoint newer than ``keep``, so that a run goes on from it; returns the new names."""
    return [set_aside(path) for path in list_checkpoints(root) if path.name > keep.name]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except RunFolderError:
        raise CheckpointError(f"checkpoint {checkpoint} is corrupt: {MANIFEST} cannot be read as JSON") from None
    if manifest is None or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {checkpoint}: no manifest of format {FORMAT}")
    if manifest.pop("seal", None) != _seal(manifest):
        raise CheckpointError(f"checkpoint {checkpoint} is corrupt: {MANIFEST} says something else than was written")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _delete(checkpoint: Path) -> None:
    """Take the name away first: what is half deleted is no checkpoint."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{DRAFT}old-{checkpoint.name}")))


def _rank_state(checkpoint: Path, rank: int | None = None) -> dict[str, Any]:
    """A rank's own buffers and generators; this one's unless another is named."""
    loaded: dict[str, Any] = torch.load(checkpoint / _rank_file(rank), weights_only=True, map_location="cpu")
    return loaded


def _own_state(buffers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What ``_rank_state`` reads."""
    return {"buffers": buffers, "random": _random_state()}


def _rank_file(rank: int | None = None) -> str:
    return f"rank-{dist.get_rank() if rank is None else rank:05d}.pt"


def _digests(draft: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of every world-size-th file, beginning with this rank."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    mine = files[dist.get_rank() :: dist.get_world_size()]
    return {path.relative_to(draft).as_posix(): (path.stat().st_size, _sha256(path)) for path in mine}


def _gather(mine: dict[str, tuple[int, str]]) -> dict[str, Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: list(entry) for part in everyone for name, entry in part.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refuse_other_bytes(checkpoint: Path, files: Sequence[tuple[str, Any]]) -> None:
    """What costs least is looked at first: a file that is missing, or of another size, and only then its bytes."""
    for name, (size, _) in files:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {checkpoint} is corrupt: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"checkpoint {checkpoint} is corrupt: {name} has other bytes than were written")
    for name, (_, digest) in files:
        if _sha256(checkpoint / name) != digest:
            raise CheckpointError(f"checkpoint {checkpoint} is corrupt: {name} has other bytes than were written")


def _refuse_code(path: Path) -> None:
    """Raise unless every global the file's pickle names is known to be harmless; nothing is executed."""
    try:
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"checkpoint {path.parent} is corrupt: {path.name}: {str(error) or 'ends early'}"
        ) from None
    if strange := sorted(named - TRUSTED):
        raise CheckpointError(f"{path} names {strange[0]}, which a checkpoint has no use for: it is not loaded")


def _random_state() -> dict[str, Any]:
    """Every generator that a job's code may draw from, in types that ``weights_only`` loading accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - what users draw from
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (kind, torch.as_tensor(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": (version, list(internal), next_gauss),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))


def _describe(layout_key: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in layout_key.items())
