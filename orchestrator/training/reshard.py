"""Take up weights and optimizer state at another number of workers or another ZeRO stage than they were saved at.

Every rank's file holds a flat share of the fp32 weights and of each tensor of the optimizer's state, and says which
part of which parameter lies where. ``Shards`` reads such files by parameter; ``take_up`` fills this rank's own share
from them, in the shape in which DeepSpeed would have saved it here, and has DeepSpeed load that. Values are moved,
never computed: what is loaded is what was saved, to the bit.

DeepSpeed's own tool for this (``ds_to_universal``) writes every parameter to disk a second time and knows Adam only.
This is the one module that knows the layout of DeepSpeed's checkpoint files (0.19.8):

- stages 1 and 2: ``base_optimizer_state``, ``single_partition_of_fp32_groups`` and ``param_slice_mappings``, per group;
- stage 3: ``fp32_flat_groups`` and the optimizer's state per sub-group; of each parameter a rank holds an equal part,
  the last one padded, in the order of ``param_shapes``;
- stage 0 in fp32: torch's own state dict beside the module's. In 16 bit its wrappers are not understood.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import CheckpointError
from orchestrator.training.shares import Share, shares

__all__ = ["Shards", "take_up"]

FP32 = "fp32"
SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")


@dataclass(frozen=True)
class _Piece:
    """One rank's part of a parameter: where it starts in the parameter, and its tensors by key, all of one size."""

    start: int
    tensors: dict[str, torch.Tensor]


@dataclass
class Shards:
    """Fp32 weights and optimizer state by parameter, read lazily from the files of all ranks that saved them."""

    pieces: dict[str, list[_Piece]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    """What the optimizer keeps beside tensors of the parameters' size, such as its step."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """The loss scaler, as saved."""

    @classmethod
    def open(cls, folder: Path, names: Sequence[str]) -> Shards:
        """Open the files that DeepSpeed left in ``folder``; ``names`` are the trainable parameters, in the optimizer's
        order.

        Raises:
            CheckpointError: the files are of a form that is not understood.
        """
        shards = cls()
        files = sorted(folder.glob("*_optim_states.pt"), key=_rank_of)
        if not files:
            shards._add_stage_0(_load(folder / "mp_rank_00_model_states.pt"), names, folder)
        elif "fp32_flat_groups" in (first := _load(files[0])["optimizer_state_dict"]):
            shapes = _load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
            for rank, path in enumerate(files):
                shards._add_stage_3(_load(path)["optimizer_state_dict"], shapes, rank, len(files))
            shards._take_scaler(first)
        else:
            for path in files:
                shards._add_stage_1_or_2(_load(path)["optimizer_state_dict"])
            shards._take_scaler(first)
        return shards

    def state_keys(self) -> list[str]:
        """Names of the tensors that every parameter has: ``fp32`` and the optimizer's."""
        first = next(iter(self.pieces.values()), [])
        return list(first[0].tensors) if first else []

    def copy(self, name: str, key: str, start: int, target: torch.Tensor) -> None:
        """Fill ``target`` [n] with the elements from ``start`` on of parameter ``name``'s ``key``.

        Raises:
            CheckpointError: not all of them were saved.
        """
        filled = 0
        for piece in self.pieces.get(name, ()):
            source = piece.tensors[key]
            low, high = max(start, piece.start), min(start + target.numel(), piece.start + source.numel())
            if low < high:
                target[low - start : high - start].copy_(source[low - piece.start : high - piece.start])
                filled += high - low
        if filled != target.numel():
            raise CheckpointError(
                f"the checkpoint holds {filled} of {target.numel()} elements of {name} ({key}): "
                "it was saved by another model"
            )

    def _add(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Append a rank's part of ``name``; ranks come in order, so it starts where the one before ended."""
        before = self.pieces.setdefault(name, [])
        start = before[-1].start + before[-1].tensors[FP32].numel() if before else 0
        before.append(_Piece(start, tensors))

    def _add_stage_1_or_2(self, saved: dict[str, Any]) -> None:
        state, groups = saved["base_optimizer_state"]["state"], saved["single_partition_of_fp32_groups"]
        for index, slices in enumerate(saved["param_slice_mappings"]):
            flat = self._flat(groups[index], state.get(index, {}))
            for name, where in slices.items():
                self._add(name, {key: tensor[where.start : where.start + where.numel] for key, tensor in flat.items()})

    def _add_stage_3(self, saved: dict[str, Any], shapes: list[dict[str, Any]], rank: int, ranks: int) -> None:
        state, groups = saved["optimizer_state_dict"]["state"], saved["fp32_flat_groups"]
        for index, parameters in enumerate(shapes):
            flat, offset = self._flat(groups[index], state.get(index, {})), 0
            for name, shape in parameters.items():
                numel = math.prod(shape)
                share = -(-numel // ranks)
                size = max(0, min(share, numel - rank * share))
                self._add(name, {key: tensor[offset : offset + size] for key, tensor in flat.items()})
                offset += share

    def _add_stage_0(self, saved: dict[str, Any], names: Sequence[str], folder: Path) -> None:
        optimizer = saved["optimizer"]
        if not isinstance(optimizer, dict) or "state" not in optimizer:
            raise CheckpointError(
                f"checkpoint {folder.parent} was saved in 16 bit at ZeRO stage 0, and can be continued only so: set "
                "layout.zero_stage=0 and the same number of workers"
            )
        for index, name in enumerate(names):
            weights = saved["module"][name].float().flatten()
            self._add(name, self._flat(weights, optimizer["state"].get(index, {})))

    def _flat(self, weights: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a group that have an element per weight; the rest is noted as it is.

        Padding at the end of a group is saved with the optimizer's state and not with the weights.
        """
        flat = {FP32: weights}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.numel() >= weights.numel():
                flat[key] = value.flatten()
            else:
                self.scalars[key] = value
        return flat

    def _take_scaler(self, saved: dict[str, Any]) -> None:
        self.scaler = {key: saved[key] for key in SCALER if key in saved}


def take_up(optimizer: Any, names: Mapping[torch.Tensor, str], saved: Shards) -> None:
    """Load this rank's share of ``saved`` into ``optimizer`` and into the weights it updates. All ranks call it.

    Args:
        optimizer: DeepSpeed's wrapper in stages 1 to 3, torch's own in stage 0 and fp32.
        names: of every trainable parameter of the model.
        saved: of the same model, from anywhere.

    Raises:
        CheckpointError: parameters are missing, or this optimizer cannot take them up.
    """
    held = shares(optimizer, names)
    if held is None:
        raise CheckpointError(
            "ZeRO stage 0 in 16 bit takes up only what it saved itself: set layout.zero_stage=1, "
            "which one worker can use too"
        )
    filled = [_filled(share, saved) for share in held]
    weights = [tensors.pop(FP32) for tensors in filled]
    # A step that two of them shared would be counted twice.
    states = {i: {**copy.deepcopy(saved.scalars), **tensors} for i, tensors in enumerate(filled) if tensors}
    state = optimizer.state_dict()
    if isinstance(optimizer, torch.optim.Optimizer):
        for share, values in zip(held, weights, strict=True):
            share.tensor.data.copy_(values)
        optimizer.load_state_dict({**state, "state": states})
    elif "fp32_flat_groups" in state:
        of_optimizer = {**state["optimizer_state_dict"], "state": states}
        state |= {"fp32_flat_groups": weights, "optimizer_state_dict": of_optimizer, **saved.scaler}
        optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict(_as_if_saved_here(state))
        optimizer.checkpoint_event_epilogue()
    else:
        base = {**state["base_optimizer_state"], "state": states}
        state |= {"single_partition_of_fp32_groups": weights, "base_optimizer_state": base, **saved.scaler}
        optimizer.load_state_dict(_as_if_saved_here(state), load_from_fp32_weights=True)
        optimizer.update_lp_params()


def _filled(share: Share, saved: Shards) -> dict[str, torch.Tensor]:
    """Tensors of ``share``'s shape for every key."""
    tensors = {key: torch.zeros(share.tensor.numel()) for key in saved.state_keys()}
    for one in share.slices:
        for key, tensor in tensors.items():
            saved.copy(one.name, key, one.there, tensor[one.here : one.here + one.numel])
    return {key: tensor.view(share.tensor.shape) for key, tensor in tensors.items()}


def _as_if_saved_here(state: dict[str, Any]) -> list[dict[str, Any]]:
    """DeepSpeed wants every rank's state and takes its own."""
    return [state if rank == dist.get_rank() else {} for rank in range(dist.get_world_size())]


def _rank_of(path: Path) -> int:
    return int(path.name.split("zero_pp_rank_")[1].split("_")[0])


def _load(path: Path) -> dict[str, Any]:
    """Open a file without reading its tensors before they are asked for; nothing but known classes is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is missing") from None
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name}: {str(error).splitlines()[0]}") from None
    return loaded
