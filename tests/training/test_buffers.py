"""Buffers: one truth over all ranks while it is needed, and each rank's own again afterwards."""

from __future__ import annotations

import pytest
import torch

from gloo import GlooGroup
from gloo_jobs import average_buffers, averaged_is_left_by_an_error
from orchestrator.training.buffers import load_local_buffers, local_buffers

pytestmark = pytest.mark.slow


def test_buffers_are_averaged_and_then_put_back(two: GlooGroup) -> None:
    (before0, inside0, after0), (before1, inside1, after1) = two.run(average_buffers)
    for before, after in ((before0, after0), (before1, after1)):
        assert all(torch.equal(before[name], after[name]) for name in before)
    for inside in (inside0, inside1):
        assert torch.equal(inside["running_mean"], torch.tensor([1.5, 3.0, 4.5]))
        assert torch.equal(inside["running_var"], torch.tensor([0.75, 1.0, 1.5]))
        assert torch.equal(inside["coarse"], torch.tensor([1.5, 4.5], dtype=torch.bfloat16))
        assert inside["num_batches_tracked"] == 5, "whole numbers are rank 0's"
        assert torch.equal(inside["mask"], torch.tensor([True, True]))
    assert {name: b.dtype for name, b in inside0.items()} == {name: b.dtype for name, b in before0.items()}


def test_one_worker_has_nothing_to_average(one: GlooGroup) -> None:
    ((before, inside, after),) = one.run(average_buffers)
    assert all(torch.equal(before[name], inside[name]) and torch.equal(before[name], after[name]) for name in before)


def test_an_error_inside_puts_them_back_too(two: GlooGroup) -> None:
    for before, after in two.run(averaged_is_left_by_an_error):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_are_copies() -> None:
    model = torch.nn.BatchNorm1d(2)
    copies = local_buffers(model)
    model.running_mean += 1
    assert torch.equal(copies["running_mean"], torch.zeros(2))
    load_local_buffers(model, {"running_mean": torch.tensor([3.0, 4.0])})
    assert torch.equal(model.running_mean, torch.tensor([3.0, 4.0]))
    assert torch.equal(model.running_var, torch.ones(2)), "what is not among the copies stays"
