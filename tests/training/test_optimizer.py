"""The recipe's optimizer and its penalties against closed forms and torch's own decay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.config import SGD, Adam, AdamW, Adaptive, Penalties, Recipe, Stop
from orchestrator.scheduling.learning_rate import scale
from orchestrator.training.optimizer import add_penalties, build_optimizer, rescale, set_learning_rate

RATE = 0.1
small = st.floats(0.0, 0.5)


class Weights(nn.Module):
    """A matrix and a vector, to be pulled towards ``target`` by a quadratic loss."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([values], dtype=torch.float64))
        self.vector = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def loss(self, target: float | Tensor) -> Tensor:
        return 0.5 * sum(((p - target) ** 2).sum() for p in self.parameters())


def recipe(optimizer: SGD | Adaptive | None = None, **penalties: Any) -> Recipe:
    optimizer = optimizer or SGD(learning_rate=RATE, momentum=0.0)
    return Recipe(batch=1, optimizer=optimizer, penalties=Penalties(**penalties), stop=Stop(steps=1))


def trained(model: Weights, ours: Recipe, steps: int, target: float | Tensor | None = 0.0) -> Weights:
    """After some steps of the quadratic loss, or of no loss at all where the target is None."""
    optimizer = build_optimizer(model, ours, fused=False)
    add_penalties(optimizer)
    descend(model, optimizer, steps, target)
    return model


def descend(model: Weights, optimizer: torch.optim.Optimizer, steps: int, target: float | Tensor | None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        if target is None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        else:
            model.loss(target).backward()
        optimizer.step()


# -- closed forms ------------------------------------------------------------------------------


@given(st.floats(-3.0, 3.0), st.floats(0.01, 0.9), st.integers(0, 30))
def test_decay_alone_shrinks_geometrically(start: float, decay: float, steps: int) -> None:
    model = trained(Weights(start), recipe(weight_decay=decay), steps, None)
    assert model.matrix.item() == pytest.approx(start * (1 - RATE * decay) ** steps)


@given(st.floats(0.0, 3.0), st.floats(0.01, 0.9), st.integers(0, 200))
def test_l1_alone_takes_equal_steps_and_stays_at_zero(start: float, l1: float, steps: int) -> None:
    """Within one step of zero, from wherever it began."""
    weight = trained(Weights(start, -start), recipe(l1=l1), steps, None).matrix[0]
    arrival = max(0.0, start - steps * RATE * l1)
    assert weight.tolist() == pytest.approx([arrival, -arrival], abs=RATE * l1 + 1e-9)
    if start > (steps + 1) * RATE * l1:
        assert weight.tolist() == pytest.approx([arrival, -arrival], abs=1e-9)


@pytest.mark.parametrize("l1", [0.05, 0.3, 1.0])
def test_l1_with_a_loss_ends_at_the_soft_threshold(l1: float) -> None:
    """argmin (w - a)^2 / 2 + l1 |w| = sign(a) max(|a| - l1, 0), to within the step that the subgradient takes."""
    targets = torch.linspace(-2.0, 2.0, 81, dtype=torch.float64)
    weights = trained(Weights(*[0.3] * 81), recipe(l1=l1), 200, targets).matrix[0]
    threshold = torch.sign(targets) * (targets.abs() - l1).clamp(min=0.0)
    zero = threshold == 0
    assert torch.allclose(weights[~zero], threshold[~zero], rtol=0.0, atol=1e-6)
    assert weights[zero].abs().max() <= 2 * RATE * l1


@pytest.mark.parametrize("l2", [0.05, 0.3, 1.0])
def test_l2_with_a_loss_ends_at_the_shrunk_target(l2: float) -> None:
    """argmin (w - a)^2 / 2 + l2 w^2 / 2 = a / (1 + l2)."""
    targets = torch.linspace(-2.0, 2.0, 81, dtype=torch.float64)
    weights = trained(Weights(*[0.3] * 81), recipe(l2=l2), 200, targets).matrix[0]
    assert torch.allclose(weights, targets / (1 + l2), rtol=0.0, atol=1e-6)


@given(small, st.integers(1, 20))
def test_l2_is_decay_in_plain_sgd(strength: float, steps: int) -> None:
    coupled = trained(Weights(0.7, -1.2), recipe(l2=strength), steps, 0.5)
    decoupled = trained(Weights(0.7, -1.2), recipe(weight_decay=strength), steps, 0.5)
    assert torch.allclose(coupled.matrix, decoupled.matrix, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [SGD(learning_rate=RATE, momentum=0.9), Adam(learning_rate=RATE)])
def test_l2_is_not_decay_elsewhere(optimizer: SGD | Adam) -> None:
    coupled = trained(Weights(0.7, -1.2), recipe(optimizer, l2=0.3), 5, 0.5)
    decoupled = trained(Weights(0.7, -1.2), recipe(optimizer, weight_decay=0.3), 5, 0.5)
    assert not torch.allclose(coupled.matrix, decoupled.matrix, rtol=1e-3)


# -- another batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("k", [0.5, 2.0, 4.0])
def test_under_a_constant_gradient_less_momentum_changes_no_step(nesterov: bool, k: float) -> None:
    """Sum and step have settled at 1 / (1 - momentum) times the gradient, and stay there when the batch changes."""
    wanted = recipe(SGD(learning_rate=RATE, momentum=0.9, nesterov=nesterov))
    weights = Weights(0.0)
    optimizer = build_optimizer(weights, wanted, fused=False)
    add_penalties(optimizer)

    def moved() -> float:
        before = weights.matrix.item()
        weights.matrix.grad = torch.ones_like(weights.matrix)
        optimizer.step()
        return before - weights.matrix.item()

    for _ in range(300):
        moved()
    settled = replace(scale("auto", wanted.optimizer, 1e9, 64, 64 * k), learning_rate=1.0)
    rescale(optimizer, wanted, settled, carry=True)
    assert [moved() for _ in range(5)] == pytest.approx([10.0 * RATE] * 5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_quarter_of_the_steps_at_four_times_the_batch_comes_as_far(nesterov: bool) -> None:
    """A quadratic without noise to average out: what k steps do at the reference batch, one does at k times it."""
    ends = {}
    for k in (1, 4):
        wanted = recipe(SGD(learning_rate=1e-3, momentum=0.9, nesterov=nesterov))
        weights = Weights(1.0)
        optimizer = build_optimizer(weights, wanted, fused=False)
        add_penalties(optimizer)
        scaling = scale("auto", wanted.optimizer, 1e9, 64, 64 * k)
        rescale(optimizer, wanted, scaling, carry=True)
        set_learning_rate(optimizer, 1e-3 * scaling.learning_rate)
        for _ in range(400 // k):
            weights.matrix.grad = weights.matrix.detach().clone()
            optimizer.step()
        ends[k] = weights.matrix.item()
    assert ends[4] == pytest.approx(ends[1], rel=0.1)
    assert ends[1] < 0.1


# -- against torch's own -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "penalties", "own"),
    [
        (SGD(learning_rate=RATE, momentum=0.9), {"l2": 0.3}, lambda p: torch.optim.SGD(p, RATE, 0.9, weight_decay=0.3)),
        (
            SGD(learning_rate=RATE, momentum=0.9, nesterov=True),
            {"l2": 0.3},
            lambda p: torch.optim.SGD(p, RATE, 0.9, nesterov=True, weight_decay=0.3),
        ),
        (
            Adam(learning_rate=RATE, beta1=0.8, beta2=0.95, eps=1e-3),
            {"l2": 0.3},
            lambda p: torch.optim.Adam(p, RATE, (0.8, 0.95), 1e-3, weight_decay=0.3),
        ),
        (
            AdamW(learning_rate=RATE, beta1=0.8, beta2=0.95, eps=1e-3),
            {"weight_decay": 0.3},
            lambda p: torch.optim.AdamW(p, RATE, (0.8, 0.95), 1e-3, weight_decay=0.3),
        ),
        (AdamW(learning_rate=RATE), {}, lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.0)),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "adamw-without-decay"],
)
def test_torchs_own_decay_is_matched(optimizer: SGD | Adaptive, penalties: dict[str, float], own: Any) -> None:
    ours = trained(Weights(0.7, -1.2), recipe(optimizer, exempt="none", **penalties), 10, 0.5)
    theirs = Weights(0.7, -1.2)
    descend(theirs, own(theirs.parameters()), 10, 0.5)
    assert torch.allclose(ours.matrix, theirs.matrix, rtol=1e-9)
    assert torch.allclose(ours.vector, theirs.vector, rtol=1e-9)


# -- what they act on --------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["weight_decay", "l2", "l1"])
def test_norms_and_biases_are_exempt_unless_asked_for(penalty: str) -> None:
    model = trained(Weights(1.0), recipe(**{penalty: 0.5}), 3, None)
    assert model.vector.item() == 1.0
    assert model.matrix.item() < 1.0
    model = trained(Weights(1.0), recipe(**{penalty: 0.5}, exempt="none"), 3, None)
    assert model.vector.item() == model.matrix.item() < 1.0


def test_a_model_of_vectors_alone_has_one_group() -> None:
    optimizer = build_optimizer(nn.LayerNorm(3), recipe(weight_decay=0.5), fused=False)
    assert [group["decay"] for group in optimizer.param_groups] == [0.0]


def test_frozen_parameters_are_left_out() -> None:
    model = Weights(1.0)
    model.matrix.requires_grad_(False)
    optimizer = build_optimizer(model, recipe(exempt="none"), fused=False)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [model.vector]


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = Weights(1.0)
    optimizer = build_optimizer(model, recipe(weight_decay=0.5, exempt="none"), fused=False)
    add_penalties(optimizer)
    model.matrix.grad = torch.zeros_like(model.matrix)
    optimizer.step()
    assert (model.matrix.item(), model.vector.item()) == (0.95, 1.0)


def test_penalties_wait_until_they_are_added() -> None:
    """DeepSpeed may take a step on zero gradients while it starts."""
    model = Weights(1.0)
    optimizer = build_optimizer(model, recipe(weight_decay=0.5, l1=0.5, l2=0.5), fused=False)
    descend(model, optimizer, 3, None)
    assert model.matrix.item() == 1.0
    add_penalties(optimizer)
    descend(model, optimizer, 1, None)
    assert model.matrix.item() < 1.0


def test_decay_follows_the_rate_of_the_step() -> None:
    model = Weights(1.0)
    optimizer = build_optimizer(model, recipe(weight_decay=0.5), fused=False)
    add_penalties(optimizer)
    for rate in (0.4, 0.2, 0.0):
        set_learning_rate(optimizer, rate)
        descend(model, optimizer, 1, None)
    assert model.matrix.item() == pytest.approx((1 - 0.4 * 0.5) * (1 - 0.2 * 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
