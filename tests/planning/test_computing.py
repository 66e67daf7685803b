"""How a device computes: what is switched on where, what is pinned, and what a device cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.config import LAMB, AdamW, LayoutConfig, Recipe, RunConfig, Stop
from orchestrator.errors import ConfigError
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.computing import EAGER, Computing, Place, choose_computing
from orchestrator.planning.plan import make_plan
from settings import PROFILE

CPU = Place("cpu", "", modern=False, precision="fp32", zero_stage=1, activation_checkpointing=False)
A100 = Place("cuda", "A100", modern=True, precision="bf16", zero_stage=1, activation_checkpointing=False)
V100 = replace(A100, accelerator="V100", modern=False, precision="fp16")
IMAGES = replace(PROFILE, convolutions=20)
TEXT = replace(PROFILE, plain=replace(PROFILE.plain, kernels=(replace(PROFILE.plain.kernels[0], kind="attention"),)))


def config(optimizer: Any = None, **layout: Any) -> RunConfig:
    recipe = Recipe(batch=64, optimizer=optimizer or AdamW(learning_rate=1e-3), stop=Stop(steps=10))
    return RunConfig(name="a-run", recipe=recipe, layout=LayoutConfig(**layout))


def chosen(place: Place, profile: Any = None, **layout: Any) -> Computing:
    return choose_computing(config(**layout), place, profile)[0]


def reasons(place: Place, profile: Any = None, **layout: Any) -> str:
    return "; ".join(choose_computing(config(**layout), place, profile)[1])


def test_a_cpu_computes_as_torch_does_and_nothing_is_said() -> None:
    assert choose_computing(config(), CPU, IMAGES) == (EAGER, ())


def test_a_modern_gpu_gets_all_of_it_with_a_reason_each() -> None:
    made, why = choose_computing(config(), A100, IMAGES)
    assert made == Computing(compile=True, tf32=True, fused_optimizer=True, channels_last=True)
    assert [reason.split(":")[0] for reason in why] == ["compiled", "TF32", "fused optimizer", "channels last"]
    assert "the model's 20 convolutions" in why[-1]
    assert str(made) == "compiled, TF32, fused optimizer, channels last"


def test_an_older_gpu_is_not_compiled_for_and_has_no_tf32() -> None:
    assert chosen(V100, IMAGES) == Computing(fused_optimizer=True, channels_last=True)
    assert "not compiled: V100 is older" in reasons(V100, IMAGES)


def test_stage_3_is_not_compiled_unless_it_is_asked_for() -> None:
    place = replace(A100, zero_stage=3)
    assert not chosen(place).compile
    assert "not compiled: ZeRO stage 3" in reasons(place)
    assert chosen(place, compile=True).compile


def test_what_is_computed_again_is_compiled_where_it_has_no_buffers() -> None:
    place = replace(A100, activation_checkpointing=True)
    assert chosen(place, TEXT).compile
    normed = replace(IMAGES, buffer_bytes=4096)
    assert not chosen(place, normed).compile
    assert "not compiled: it takes no model with buffers" in reasons(place, normed)
    with pytest.raises(ConfigError, match=r"set layout.compile=false or layout.activation_checkpointing=false"):
        choose_computing(config(compile=True), place, normed)


def test_fp32_that_was_asked_for_stays_fp32() -> None:
    place = replace(A100, precision="fp32")
    assert not chosen(place, IMAGES).tf32
    assert "TF32 off: fp32 was asked for" in reasons(place)
    assert chosen(place, tf32=True).tf32
    assert not chosen(place, IMAGES).channels_last  # for tensor cores in 16 bit


def test_attention_is_said_where_there_is_any() -> None:
    assert "attention: torch takes flash attention" in reasons(A100, TEXT)
    assert "flash takes 16 bit" in reasons(V100, TEXT)
    assert "attention" not in reasons(A100, IMAGES)
    assert str(chosen(A100, attention="math")).endswith("math attention")


@pytest.mark.parametrize("name", ["compile", "tf32", "fused_optimizer", "channels_last"])
def test_each_can_be_switched_off(name: str) -> None:
    assert not getattr(chosen(A100, IMAGES, **{name: False}), name)
    assert not any(word in reasons(A100, IMAGES, **{name: False}) for word in (f"{name.split('_')[0]}d:", f"{name}:"))


def test_a_cpu_can_compile_fuse_and_order_too() -> None:
    pinned = {"compile": True, "fused_optimizer": True, "channels_last": True, "attention": "flash"}
    assert chosen(CPU, **pinned) == Computing(**pinned)


@pytest.mark.parametrize(
    ("place", "layout", "said"),
    [
        (CPU, {"tf32": True}, "layout.tf32=true needs accelerators of compute capability 8.0"),
        (V100, {"tf32": True}, "these workers have V100"),
        (replace(A100, precision="fp32"), {"attention": "flash"}, "takes bf16 or fp16"),
        (CPU, {"attention": "efficient"}, "on CPU set auto, flash or math"),
    ],
)
def test_what_a_device_cannot_do_is_refused(place: Place, layout: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_computing(config(**layout), place, None)


def test_lamb_is_fused_or_nothing() -> None:
    with pytest.raises(ConfigError, match="LAMB is a fused kernel"):
        choose_computing(config(LAMB(learning_rate=1e-3), fused_optimizer=False), A100, None)


def test_a_tpu_is_planned_for_and_nothing_is_switched_on() -> None:
    shape = ClusterShape(nodes=1, cpus=16, accelerators=4, accelerator="tpu-v5e", imagined=True)
    plan = make_plan(config(), shape, train_samples=1000, evaluation_samples=0)
    assert plan.computing == EAGER
    assert "DeepSpeed has no device for it, and `run` refuses it" in plan.reasons[-1]


def test_the_plan_has_it_and_writes_it_down() -> None:
    shape = ClusterShape(nodes=1, cpus=16, accelerators=8, accelerator="H100")
    plan = make_plan(config(), shape, train_samples=1000, evaluation_samples=0)
    assert plan.computing == Computing(compile=True, tf32=True, fused_optimizer=True)
    assert plan.to_dict()["computing"]["compile"] is True
    assert any(reason.startswith("compiled: ") for reason in plan.reasons)
