"""Compiling, fused kernels, order of memory and kernels of attention: switched on, and the same numbers come out."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gloo import GlooGroup
from gloo_jobs import Toy, compiled_graphs, mlp, plain_blocks, plan_for, take_steps, toy_config
from orchestrator.config import AdamW
from orchestrator.errors import ConfigError
from orchestrator.planning.computing import Computing
from orchestrator.planning.layout import Layout
from orchestrator.training.computing import attending, in_channels_last, require_compiler, set_fp32_products

RECIPE = {"optimizer": AdamW(learning_rate=0.01, eps=1e-3), "clip_norm": 0.3}
STEPS = [Layout(2, 8, 1)] * 3 + [Layout(2, 4, 2)] * 3
"""The shape changes on the way, so that more than one is compiled."""


def steps(two: GlooGroup, build: Any, stage: int, **layout: Any) -> Any:
    config = toy_config(recipe=RECIPE, layout={"zero_stage": stage, **layout})
    return two.run(take_steps, config, Toy(build), STEPS, [0.01] * len(STEPS))[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: torch.compile writes C++ on CPUs")
@pytest.mark.parametrize(("stage", "checkpointing"), [(0, False), (1, False), (2, False), (3, False), (1, True)])
def test_a_compiled_model_takes_the_same_steps(two: GlooGroup, stage: int, checkpointing: bool) -> None:
    pinned = {"activation_checkpointing": checkpointing}
    plain, compiled = (steps(two, plain_blocks, stage, compile=wanted, **pinned) for wanted in (False, True))
    assert min(two.run(compiled_graphs)) > 0
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert compiled.norms == pytest.approx(plain.norms, rel=1e-4)
    assert compiled.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        torch.testing.assert_close(compiled.weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_fused_optimizer_takes_the_same_steps(two: GlooGroup, stage: int) -> None:
    plain, fused = (steps(two, mlp, stage, fused_optimizer=fused) for fused in (False, True))
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(toy_config(layout={"compile": True}), Toy(mlp))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    require_compiler(plan)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"c\+\+ and g\+\+ and clang\+\+ cannot be found: install one, or set"):
        require_compiler(plan)
    require_compiler(plan_for(toy_config(), Toy(mlp)))


def test_images_come_in_channels_last_and_go_on_so() -> None:
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    in_channels_last(model)
    model[0].register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    model(torch.randn(2, 3, 8, 8))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


def test_what_is_no_image_is_left_alone() -> None:
    model = nn.Embedding(8, 4)
    in_channels_last(model)
    assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 4)


def test_attention_takes_the_planned_kernel_and_no_other() -> None:
    made = SimpleNamespace(computing=Computing(attention="math"))
    query = torch.randn(1, 2, 4, 8)
    with attending(made):  # type: ignore[arg-type]
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
        found = F.scaled_dot_product_attention(query, query, query)
    assert torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, query, query))


@pytest.mark.parametrize(("tf32", "word"), [(True, "high"), (False, "highest")])
def test_tf32_is_set_for_products_and_convolutions(tf32: bool, word: str) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_fp32_products(SimpleNamespace(device="cuda", computing=Computing(tf32=tf32)))  # type: ignore[arg-type]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (word, tf32)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
