"""What a run has learnt: its task, and its model with the newest checkpoint's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.quiet import quiet
from orchestrator.config import RunConfig, parse_config
from orchestrator.errors import CheckpointError, RunFolderError
from orchestrator.job import Task, load
from orchestrator.storage.folder import RunFolder, find_run, read_json
from orchestrator.storage.stored_run import fetch_checkpoint
from orchestrator.training.checkpoint import list_checkpoints, verify

__all__ = ["Trained", "load_trained", "newest_checkpoint", "read_weights"]

# Where DeepSpeed puts what ``training.engine`` saves, and the name that it gives the whole model's file.
TAG = "state"
WHOLE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class Trained:
    """A model that a run has trained, in fp32 and in evaluation mode, with its task and how it came about."""

    folder: RunFolder
    config: RunConfig
    task: Task
    model: nn.Module
    checkpoint: Path


def load_trained(run: str) -> Trained:
    """Load what ``run``, a folder or a name below ``runs``, has learnt.

    The job is imported again by its name and called with the arguments of the run, so it must still be there.

    Raises:
        ConfigError: there is no such run.
        JobError: its job cannot be imported any more.
        CheckpointError: it has no checkpoint, a broken one, or one that does not fit the job's model.
    """
    folder = find_run(run)
    config, job = read_json(folder.config), read_json(folder.job)
    if config is None or job is None:
        raise RunFolderError(f"{folder.root}: config.json or job.json is missing: it was never started")
    checkpoint = newest_checkpoint(folder)
    task = load(job["job"], job["args"]).task
    model = task.model()
    _fill(model, read_weights(checkpoint), checkpoint)
    return Trained(folder, parse_config(config), task, model.eval(), checkpoint)


def newest_checkpoint(folder: RunFolder) -> Path:
    """Return a run's newest checkpoint, which is fetched first where the folder is a copy of one in a store.

    Raises:
        CheckpointError: it has none.
        StorageError: the store cannot be used.
    """
    fetch_checkpoint(folder.root)
    existing = list_checkpoints(folder.checkpoints)
    if not existing:
        raise CheckpointError(f"{folder.root}: has no checkpoint yet; let it train, then ask again")
    return existing[-1]


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return parameters and buffers by name, floating-point ones in fp32, of a checkpoint of any stage and precision.

    In fp32 and stages 0 to 2 they are the model's own file. In 16 bit the fp32 masters lie in shards: those of bf16 in
    stage 1 are put together here, and all others, and stage 3, by DeepSpeed's helper. That unpickles without restraint,
    so every file is verified first: against the manifest's hash, and for names that a checkpoint has no use for. Stage
    0 in 16 bit keeps its masters in no form that can be told apart: there the 16-bit weights are what is returned.
    Tied weights are one tensor under several names.

    Raises:
        CheckpointError: it fails its checks.
    """
    layout = verify(checkpoint)["layout_key"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stage, precision = layout["zero_stage"], layout["precision"]
    if stage == 0 or (stage < 3 and precision == "fp32"):
        weights: Mapping[str, Any] = _saved(checkpoint / TAG / WHOLE)["module"]
    elif stage == 1 and precision == "bf16":
        weights = _from_slices(checkpoint / TAG)
    else:
        with quiet():
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    copies: dict[Any, Tensor] = {}  # of each piece of memory one
    for weight in weights.values():
        if _memory(weight) not in copies:
            copies[_memory(weight)] = _fp32(weight)
    return {_plain(name): copies[_memory(weight)] for name, weight in weights.items()}


def _memory(weight: Tensor) -> Any:
    """Where a tensor lies, alike for two that are one; an empty one lies nowhere."""
    return (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype) if weight.numel() else id(weight)


def _from_slices(folder: Path) -> dict[str, Tensor]:
    """The masters of DeepSpeed's bf16 optimizer, of which each rank's file says what slice of what weight it holds."""
    whole = _saved(folder / WHOLE)
    parts: dict[str, list[Tensor]] = {}
    files = folder.glob("bf16_zero_pp_rank_*_optim_states.pt")
    for file in sorted(files, key=lambda path: int(path.name.split("_")[4])):
        state = _saved(file)["optimizer_state_dict"]
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, slices in groups:
            for name, piece in slices.items():
                parts.setdefault(name, []).append(flat[piece.start : piece.start + piece.numel])
    weights: dict[str, Tensor] = dict(whole["module"])
    weights |= {name: torch.cat(found).view_as(weights[name]) for name, found in parts.items()}
    return weights | {name: weights[source] for name, source in whole["shared_params"].items()}


def _saved(path: Path) -> dict[str, Any]:
    """What DeepSpeed wrote to ``path``: tensors, and the few classes of its own that it names."""
    with quiet():
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return found


def _plain(name: str) -> str:
    """The name as the job's own model has it: activation checkpointing wraps blocks."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def _fp32(value: Tensor) -> Tensor:
    return value.detach().float().clone() if value.is_floating_point() else value.detach().clone()


def _fill(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit the job's model: {_last_line(error)}") from None
    if missing or unknown:
        raise CheckpointError(
            f"{checkpoint} does not fit the job's model: {_some(missing, 'missing')}{_some(unknown, 'unknown')}"
            "the job's code or arguments have changed since the run"
        )


def _some(names: list[str], word: str) -> str:
    return f"{len(names)} {word}, such as {names[0]}; " if names else ""


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
