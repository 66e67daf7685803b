"""A copy of what a checkpoint holds, in host memory, so that training goes on while it is written and uploaded."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Snapshot"]


class Snapshot:
    """Files of one save at a time: taken by ``add``, written by ``write``, and the memory used again for the next.

    Keeping the memory costs a copy of this rank's state in host memory for the length of the run, and saves the most
    of what a copy costs: memory that is asked for anew has to be mapped page by page. On CUDA it is pinned.

    ``room`` tells how many bytes of host memory this rank may take now. What finds no room is written at once: the
    save takes longer, and the run does not die of it.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._files: list[tuple[Path, Any]] = []
        self._written: list[Path] = []
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._taken: list[torch.Tensor] = []

    def add(self, state: Any, path: Path) -> None:
        """Take ``state``, as ``torch.save`` takes it, for the file ``path``; what changes later does no harm."""
        if self._needed(state) > self._room():
            torch.save(state, path)
            self._written.append(path)
            return
        copies: dict[tuple[Any, ...], torch.Tensor] = {}
        self._files.append((path, self._copy(state, copies)))
        if any(tensor.is_cuda for tensor in _tensors(state)):
            torch.cuda.synchronize()  # pinned memory is filled while Python goes on

    def write(self) -> list[Path]:
        """Write what was taken, in any thread; returns the files of this save, those written at once among them.

        Raises:
            OSError: the disk is full, or may not be written to.
        """
        for path, state in self._files:
            try:
                torch.save(state, path)
            except RuntimeError as error:  # how torch's own writer says that the disk is full
                raise OSError(f"{path} could not be written: {error}") from error
        paths = [*self._written, *(path for path, _ in self._files)]
        for tensor in self._taken:
            self._free[tensor.numel()].append(tensor)
        self._files, self._written, self._taken = [], [], []
        return paths

    def _needed(self, state: Any) -> int:
        """Bytes to be asked for beyond those that are kept."""
        free = {size: len(kept) for size, kept in self._free.items()}
        needed = 0
        for tensor in {_view(tensor): tensor for tensor in _tensors(state)}.values():
            size = tensor.numel() * tensor.element_size()
            if free.get(size, 0):
                free[size] -= 1
            else:
                needed += size
        return needed

    def _copy(self, value: Any, copies: dict[tuple[Any, ...], torch.Tensor]) -> Any:
        """The same structure over tensors of its own; what was one tensor in two places stays one."""
        if isinstance(value, torch.Tensor):
            view = _view(value)
            if view not in copies:
                copies[view] = self._tensor(value.detach())
            same = copies[view]
            return nn.Parameter(same, value.requires_grad) if isinstance(value, nn.Parameter) else same
        if isinstance(value, dict):
            like = copy.copy(value)  # an OrderedDict's own attributes, which a module's state has, stay
            for key, item in value.items():
                like[key] = self._copy(item, copies)
            return like
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, copies) for item in value)
        return copy.deepcopy(value)

    def _tensor(self, source: torch.Tensor) -> torch.Tensor:
        size = source.numel() * source.element_size()
        kept = self._free[size]
        memory = kept.pop() if kept else torch.empty(size, dtype=torch.uint8, pin_memory=source.is_cuda)
        self._taken.append(memory)
        target = memory.view(source.dtype).view(source.shape)
        return target.copy_(source, non_blocking=True)


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same elements in memory."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if type(value) in (list, tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
