"""A snapshot is what was there when it was taken, in the same files, whatever happens to the state afterwards."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.training.snapshot import Snapshot

GENEROUS = 2**40


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    flat = torch.randn(10_000)
    tied = torch.randn(8, 4)
    module: OrderedDict[str, torch.Tensor] = OrderedDict(first=tied, second=tied, part=flat[100:200].view(10, 10))
    module._metadata = {"version": 1}  # type: ignore[attr-defined]
    others = [flat.bfloat16(), torch.tensor(3), torch.empty(0), torch.randn(6, 5).t(), torch.tensor([True, False])]
    return {"module": module, "others": others, "pair": (nn.Parameter(torch.randn(3)), "text"), "step": 7, "none": None}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_the_files_hold_what_was_there_and_nothing_that_came_later(tmp_path: Path) -> None:
    snapshot = Snapshot(lambda: GENEROUS)
    for save in range(3):  # the memory of one save is used again by the next
        state, wanted = state_of(save), state_of(save)
        snapshot.add(state, tmp_path / "a.pt")
        snapshot.add({"more": torch.full((5,), save)}, tmp_path / "b.pt")
        with torch.no_grad():
            for tensor in [*state["module"].values(), *state["others"], state["pair"][0]]:
                tensor.zero_()
        assert not (tmp_path / "a.pt").exists()
        assert snapshot.write() == [tmp_path / "a.pt", tmp_path / "b.pt"]
        found = torch.load(tmp_path / "a.pt", weights_only=True)
        assert equal(found, wanted)
        assert found["module"]["first"].data_ptr() == found["module"]["second"].data_ptr(), "tied weights stay tied"
        assert found["module"]._metadata == {"version": 1}
        assert torch.load(tmp_path / "b.pt", weights_only=True)["more"].tolist() == [save] * 5
        (tmp_path / "a.pt").unlink()


def test_a_view_takes_the_room_of_what_it_shows(tmp_path: Path) -> None:
    snapshot = Snapshot(lambda: 4 * 100)
    snapshot.add({"part": torch.zeros(10**6)[:100]}, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    snapshot.write()
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_what_finds_no_room_is_written_at_once(tmp_path: Path) -> None:
    room = [8 * 1000]
    snapshot = Snapshot(lambda: room[0])
    snapshot.add({"a": torch.ones(1000, dtype=torch.float64)}, tmp_path / "a.pt")
    room[0] = 0
    snapshot.add({"b": torch.ones(1000, dtype=torch.float64)}, tmp_path / "b.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt"]
    assert {path.name for path in snapshot.write()} == {"a.pt", "b.pt"}
    # What is kept of the first save needs no more room, so that the second of its size is a copy again.
    snapshot.add({"a": torch.ones(1000, dtype=torch.float64)}, tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()
    assert snapshot.write() == [tmp_path / "c.pt"]


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    snapshot = Snapshot(lambda: GENEROUS)
    snapshot.add({"a": torch.ones(10**6)}, Path("/dev/full"))
    with pytest.raises(OSError, match="/dev/full could not be written"):
        snapshot.write()
