"""The table of accelerators: complete, plausible, and found under the names that people and Ray use."""

from __future__ import annotations

import pytest

from orchestrator.config import AcceleratorConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.accelerators import TABLE, accelerator_named, known_accelerators, recognise

PROMISED = {
    *("t4", "v100-16gb", "v100-32gb", "a10g", "l4", "l40s", "a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200"),
    *("gb200", "mi250", "mi300x", "rtx-4090", "tpu-v5e", "tpu-v5p", "cpu"),
}
OWN = AcceleratorConfig(
    name="homemade", memory_gib=32, bf16_tflops=100, fp32_tflops=10, memory_gb_per_s=1000, network_gbit_per_s=80
)


def test_the_table_is_complete() -> None:
    assert set(known_accelerators()) == PROMISED


@pytest.mark.parametrize("each", TABLE, ids=lambda each: each.name)
def test_every_entry_is_plausible(each) -> None:
    """Half precision is no slower than fp32, memory faster than links, links than the network; a source is named."""
    assert each.memory_bytes > 2**30
    assert max(each.bf16_flops, each.fp16_flops) >= each.fp32_flops > 0
    assert each.memory_bytes_per_s > each.link_bytes_per_s >= each.network_bytes_per_s > 0
    assert all(0 < fraction <= 1 for fraction in (each.matmul, each.attention, each.bandwidth))
    assert len(each.source) > 10


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("A100", "a100-40gb"),
        ("A100-80G", "a100-80gb"),
        ("a100 80gb", "a100-80gb"),
        ("NVIDIA-H100-80GB-HBM3", "h100-80gb"),
        ("H100", "h100-80gb"),
        ("Tesla-T4", "t4"),
        ("TPU-V5LITEPOD", "tpu-v5e"),
        ("RTX_4090", "rtx-4090"),
        ("K80", None),
        ("", None),
    ],
)
def test_labels(label: str, name: str | None) -> None:
    found = recognise(label)
    assert (found.name if found else None) == name


def test_an_unknown_name_is_answered_with_the_known() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'h1000' is not known; did you mean 'h100-80gb'\? valid: a100-40gb, .*planning.accelerator.name",
    ):
        accelerator_named("h1000")


def test_one_of_your_own() -> None:
    made = accelerator_named("Homemade", OWN)
    assert (made.memory_bytes, made.bf16_flops, made.network_bytes_per_s) == (32 * 2**30, 1e14, 1e10)
    assert made.fp16_flops == 0
    assert recognise("homemade", OWN) == made
    assert recognise("homemade") is None
