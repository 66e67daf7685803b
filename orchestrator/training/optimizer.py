"""The recipe's optimizer over a model's parameters, with its penalties.

Penalties act inside the optimizer's step, on the fp32 weights the optimizer holds: whole tensors in ZeRO
stage 0, this rank's flat share in stages 1 to 3. Each is a function of single weights, so the shares of all
ranks together are the penalty of the whole model, in every stage and at any accumulation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from orchestrator.config import SGD, AdamW, Penalties, Recipe
from orchestrator.scheduling.learning_rate import Scaling

__all__ = [
    "add_penalties",
    "build_optimizer",
    "carry_second_moment",
    "innermost",
    "parameters_in_order",
    "rescale",
    "set_learning_rate",
]


def build_optimizer(model: nn.Module, recipe: Recipe, *, fused: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer over ``model``'s trainable parameters, at the reference batch's learning rate.

    ``fused`` updates all weights in a few kernels. Its groups carry the penalties, which act once ``add_penalties`` has
    been called.
    """
    return _bare(_groups(model, recipe.penalties), recipe, fused=fused)


def parameters_in_order(model: nn.Module, penalties: Penalties) -> list[nn.Parameter]:
    """``model``'s trainable parameters in the order in which ``build_optimizer`` lines them up."""
    return [parameter for group in _groups(model, penalties) for parameter in group["params"]]


def add_penalties(optimizer: torch.optim.Optimizer) -> None:
    """Let every step of ``optimizer`` apply the penalties of its groups first, and the weight of their gradients.

    Weight decay is decoupled: ``w -= learning_rate * weight_decay * w`` (Loshchilov & Hutter 2019,
    arXiv:1711.05101). L2 and L1 add ``l2 * w`` and ``l1 * sign(w)`` to the gradient, after clipping.
    """
    optimizer.register_step_pre_hook(_apply_penalties)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the rate of every parameter group of a torch or DeepSpeed optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def rescale(optimizer: Any, recipe: Recipe, scaling: Scaling, *, carry: bool) -> None:
    """Set what goes with the learning rate of another batch in every group of a torch or DeepSpeed optimizer.

    With ``carry`` Adam's second moment keeps its meaning under the new beta2 (see ``carry_second_moment``).
    """
    wanted = recipe.optimizer
    if isinstance(wanted, SGD):
        for group in optimizer.param_groups:
            group["momentum"] = scaling.momentum
            group["gradient"] = scaling.gradient
        return
    assert scaling.beta2 is not None
    before = optimizer.param_groups[0]["betas"][1]
    if carry and before != scaling.beta2:
        carry_second_moment(innermost(optimizer), before, scaling.beta2)
    for group in optimizer.param_groups:
        group["betas"] = (wanted.beta1, scaling.beta2)
        group["eps"] = wanted.eps * scaling.eps
        if isinstance(wanted, AdamW) and group["decay"]:
            group["decay"] = recipe.penalties.weight_decay * scaling.weight_decay


@torch.no_grad()
def carry_second_moment(optimizer: torch.optim.Optimizer, old: float, new: float) -> None:
    """Rescale Adam's second moments so that their bias-corrected values are the same under ``new`` as under ``old``.

    After t steps of beta2 a moment holds 1 - beta2^t of what it will hold, and is divided by that.
    """
    # By state and not by group: ZeRO stage 3 leaves its groups empty between two steps.
    for state in optimizer.state.values():
        if "exp_avg_sq" in state and (steps := float(state["step"])) > 0:
            state["exp_avg_sq"].mul_((1.0 - new**steps) / (1.0 - old**steps))


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _groups(model: nn.Module, penalties: Penalties) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    exempt = [p for p in trainable if penalties.exempt == "norm_and_bias" and p.ndim < 2]
    exempt_ids = {id(p) for p in exempt}
    penalised = [p for p in trainable if id(p) not in exempt_ids]
    rates = {"decay": penalties.weight_decay, "l2": penalties.l2, "l1": penalties.l1}
    none = dict.fromkeys(rates, 0.0)
    groups = [{"params": penalised, **rates}, {"params": exempt, **none}]
    return [group for group in groups if group["params"]]


def _bare(groups: list[dict[str, Any]], recipe: Recipe, *, fused: bool) -> torch.optim.Optimizer:
    wanted = recipe.optimizer
    rate = wanted.learning_rate
    if isinstance(wanted, SGD):
        for group in groups:
            group["gradient"] = 1.0
        return torch.optim.SGD(
            groups, lr=rate, momentum=wanted.momentum, nesterov=wanted.nesterov, weight_decay=0.0, fused=fused or None
        )
    betas = (wanted.beta1, wanted.beta2)
    if wanted.name == "lamb":
        # DeepSpeed's fused kernel: built for CUDA only, refused elsewhere by the plan.
        from deepspeed.ops.lamb import FusedLamb

        for group in groups:  # LAMB's own decay, inside its trust ratio
            group["weight_decay"] = group.pop("decay")
            group["decay"] = 0.0
        return FusedLamb(groups, lr=rate, betas=betas, eps=wanted.eps)  # type: ignore[no-any-return]
    kind = torch.optim.AdamW if isinstance(wanted, AdamW) else torch.optim.Adam
    return kind(groups, lr=rate, betas=betas, eps=wanted.eps, weight_decay=0.0, fused=fused or None)


@torch.no_grad()
def _apply_penalties(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        decay, l2, l1 = group.get("decay", 0.0), group.get("l2", 0.0), group.get("l1", 0.0)
        weights = _with_gradient(group["params"])
        if decay or l2 or l1:
            _penalise(weights, group["lr"] * decay, l2, l1)
        # Of penalty and loss alike: both are what the optimizer sums.
        if (share := group.get("gradient", 1.0)) != 1.0:
            for gradient in (weight.grad for weight in weights):
                assert gradient is not None
                gradient.mul_(share)


def _with_gradient(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p for p in parameters if p.grad is not None]


def _penalise(weights: list[torch.Tensor], shrink: float, l2: float, l1: float) -> None:
    for weight in weights:
        gradient = weight.grad
        assert gradient is not None
        if l2:
            gradient.add_(weight, alpha=l2)
        if l1:
            gradient.add_(torch.sign(weight), alpha=l1)
        if shrink:
            weight.mul_(1.0 - shrink)
