"""The model profile: traced without numbers, it says what a real step keeps, computes and needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from jobs.language import GPT, Shape, TextTask
from jobs.vision import DigitsTask
from orchestrator.errors import ConfigError
from orchestrator.planning.costs import Profile
from orchestrator.planning.profile import profile_model
from orchestrator.training.precision import compute_in
from orchestrator.training.recompute import checkpoint_blocks


class Recommender(nn.Module):
    """Embeddings of categories beside a perceptron of numbers, their products, and another one on top."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, 16) for count in (1000, 200, 50))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        vectors = torch.stack([dense, *(table(categories[:, i]) for i, table in enumerate(self.tables))], dim=1)
        products = (vectors @ vectors.transpose(1, 2)).flatten(1)
        return self.top(torch.cat((dense, products), dim=1)).squeeze(1)


def clicks(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch["numbers"], batch["categories"].long()), batch["clicked"])


class Heads(nn.Module):
    """Attention without rotary positions: queries, keys and values stay views of the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            heads = (part(x).view(*x.shape[:2], 4, 16).transpose(1, 2) for part in self.parts[:3])
            x = x + self.parts[3](F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x


TEXT = TextTask("", Shape(width=32, layers=3, heads=4, kv_heads=2), context=48)
IMAGES = DigitsTask("", width=8)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], dict[str, Any]]] = {
    "resnet": (IMAGES.model, IMAGES.loss, {"image": np.zeros((1, 64), np.uint8), "label": np.zeros(1, np.int64)}),
    "gpt": (TEXT.model, TEXT.loss, dict(TEXT.sample())),
    "heads": (Heads, lambda model, batch: model(batch["x"]).mean(), {"x": np.zeros((1, 32, 64), np.float32)}),
    "recommender": (
        Recommender,
        clicks,
        {
            "numbers": np.zeros((1, 13), np.float32),
            "categories": np.zeros((1, 3), np.int32),
            "clicked": np.zeros(1, np.float32),
        },
    ),
}


@functools.cache
def profiled(name: str) -> Profile:
    build, loss, sample = MODELS[name]
    return profile_model(build, loss, sample, fit_out=lambda _: None, recompute=checkpoint_blocks)


def really_kept(model: nn.Module, loss: Callable[..., Tensor], batch: Mapping[str, Tensor]) -> int:
    """Bytes that autograd holds after a real forward pass on the CPU."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(model, batch)
    assert value.grad_fn is not None
    return sum(kept.values())


def batch_of(sample: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    return {name: torch.as_tensor(np.repeat(column, size, axis=0)) for name, column in sample.items()}


@pytest.mark.parametrize("size", [5, 24])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_autograd_keeps(name: str, size: int) -> None:
    """At micro batches that were not traced, within 2 %."""
    build, loss, sample = MODELS[name]
    predicted = profiled(name).plain.kept_bytes.at(size)
    assert profiled(name).untraced == ""
    assert predicted == pytest.approx(really_kept(build().train(), loss, batch_of(sample, size)), rel=0.02)


@pytest.mark.parametrize("size", [6, 16])
def test_checkpointing_keeps_what_autograd_keeps_with_it(size: int) -> None:
    build, loss, sample = MODELS["gpt"]
    model = build()
    checkpoint_blocks(model)
    work = profiled("gpt").checkpointed
    assert work is not None
    assert work.kept_bytes.at(size) == pytest.approx(really_kept(model, loss, batch_of(sample, size)), rel=0.02)
    assert work.kept_bytes.at(size) < 0.5 * profiled("gpt").plain.kept_bytes.at(size)
    assert work.kept_bytes.at(size) < work.peak_bytes.at(size) < profiled("gpt").plain.peak_bytes.at(size)


def test_checkpointing_computes_the_blocks_once_more() -> None:
    profile = profiled("gpt")
    assert profile.checkpointed is not None
    assert profile.checkpointed.forward_flops == profile.plain.forward_flops
    again = profile.checkpointed.backward_flops.per_sample - profile.plain.backward_flops.per_sample
    assert 0.5 * profile.plain.forward_flops.per_sample < again < profile.plain.forward_flops.per_sample


@pytest.mark.parametrize("name", ["resnet", "recommender"])
def test_flops_are_torchs_own(name: str) -> None:
    build, loss, sample = MODELS[name]
    counter = FlopCounterMode(display=False)
    with counter:
        loss(build().train(), batch_of(sample, 7)).backward()
    work = profiled(name).plain
    assert work.forward_flops.at(7) + work.backward_flops.at(7) == counter.get_total_flops()


def test_a_gpts_flops_are_six_for_each_parameter_and_twelve_for_each_pair_of_positions() -> None:
    """Chowdhery et al. 2022, appendix B: 6 P + 12 layers x width x length for each token."""
    shape = Shape(width=64, layers=2, heads=2, kv_heads=2, vocabulary=512, tied=True)
    task = TextTask("", shape, context=32)
    profile = profile_model(
        task.model, task.loss, task.sample(), fit_out=lambda _: None, recompute=checkpoint_blocks, precision="fp32"
    )
    norms = 64 * (2 * shape.layers + 1)
    matrices = profile.parameters - norms
    assert profile.flops_per_sample == 32 * (6 * matrices + 12 * shape.layers * 64 * 32)


def test_a_large_model_is_traced_without_being_allocated() -> None:
    """Its 42 billion parameters would take 168 GB in fp32: nothing here holds that."""
    task = TextTask("", Shape(16384, 13, 128, 128, vocabulary=50368, tied=True), context=128)
    profile = profile_model(
        task.model,
        task.loss,
        task.sample(),
        fit_out=lambda model: compute_in(model, torch.bfloat16),
        recompute=checkpoint_blocks,
        precision="bf16",
        on_accelerator=True,
    )
    assert profile.parameters == pytest.approx(13 * 12 * 16384**2 + 50368 * 16384, rel=0.001)
    assert profile.largest_layer == 50368 * 16384


def test_no_repeated_blocks_are_no_checkpointing() -> None:
    profile = profiled("recommender")
    assert profile.checkpointed is None
    assert "no repeated blocks" in profile.not_checkpointed


def test_a_loss_that_asks_for_a_number_is_measured_instead() -> None:
    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        value = clicks(model, batch)
        return value * (2.0 if value.item() > 100 else 1.0)

    _, _, sample = MODELS["recommender"]
    profile = profile_model(Recommender, loss, sample, fit_out=lambda _: None, recompute=checkpoint_blocks)
    assert "item" in profile.untraced or "meta" in profile.untraced
    traced = profiled("recommender").plain
    assert profile.plain.kept_bytes.at(16) == pytest.approx(traced.kept_bytes.at(16), rel=0.05)
    assert profile.plain.forward_flops == traced.forward_flops


def test_what_neither_traces_nor_runs_is_said() -> None:
    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        raise LookupError("no such column")

    _, _, sample = MODELS["recommender"]
    with pytest.raises(ConfigError, match=r"LookupError: no such column.*mend Task\.model and Task\.loss"):
        profile_model(Recommender, loss, sample, fit_out=lambda _: None, recompute=checkpoint_blocks)


def test_a_large_model_that_cannot_be_traced_is_not_built() -> None:
    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        raise RuntimeError("not this time")

    def build() -> nn.Module:
        return GPT(Shape(8192, 4, 64, 64))

    with pytest.raises(ConfigError, match=r"cannot be traced \(RuntimeError: not this time\), and is too large"):
        profile_model(build, loss, dict(TEXT.sample()), fit_out=lambda _: None, recompute=checkpoint_blocks)
