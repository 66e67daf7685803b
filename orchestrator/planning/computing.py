"""How a device computes a step: compiled, on tensor cores, fused, in which order of memory; decided, with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from orchestrator.config import LayoutConfig, RunConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.costs import Profile

__all__ = ["EAGER", "Attention", "Computing", "Place", "choose_computing"]

Attention = Literal["auto", "flash", "efficient", "math"]


@dataclass(frozen=True)
class Computing:
    """What the engine switches on; nothing of it changes what is computed, but for the last bits."""

    compile: bool = False
    """Compile the model with ``torch.compile``."""
    tf32: bool = False
    """Round the factors of fp32 matrix products to 10 bits of mantissa, for tensor cores."""
    fused_optimizer: bool = False
    """Update all weights in a few kernels."""
    channels_last: bool = False
    """Keep the channels of a pixel together in memory."""
    attention: Attention = "auto"
    """Kernel of ``scaled_dot_product_attention``; auto: torch's own choice at each call."""

    def __str__(self) -> str:
        words = {
            "compile": "compiled",
            "tf32": "TF32",
            "fused_optimizer": "fused optimizer",
            "channels_last": "channels last",
        }
        named = [words[each.name] for each in fields(self) if each.name in words and getattr(self, each.name)]
        return ", ".join([*named, *([] if self.attention == "auto" else [f"{self.attention} attention"])])


EAGER = Computing()
"""As torch does by itself on a CPU."""


@dataclass(frozen=True)
class Place:
    """Where, and in what, the plan computes."""

    device: Literal["cpu", "cuda"]
    accelerator: str
    modern: bool
    """Whether its accelerators have compute capability 8.0 or what corresponds to it: bf16, TF32, flash attention."""
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: int
    activation_checkpointing: bool


def choose_computing(config: RunConfig, place: Place, profile: Profile | None) -> tuple[Computing, tuple[str, ...]]:
    """Decide what the config leaves open, and say why.

    Raises:
        ConfigError: something is pinned that the device cannot do, with the remedy.
    """
    layout = config.layout
    _check(config, place, profile)
    compiled, why_compiled = _compile(layout, place, profile)
    tf32, why_tf32 = _tf32(layout, place)
    on_gpu = place.device == "cuda"
    fused = on_gpu if layout.fused_optimizer == "auto" else layout.fused_optimizer
    convolutions = 0 if profile is None else profile.convolutions
    wants_last = on_gpu and place.precision != "fp32" and convolutions > 0
    channels_last = wants_last if layout.channels_last == "auto" else layout.channels_last
    made = Computing(compiled, tf32, fused, channels_last, layout.attention)
    reasons = [why_compiled, why_tf32]
    if fused and layout.fused_optimizer == "auto":
        reasons.append("fused optimizer: a few kernels update all weights")
    if channels_last and layout.channels_last == "auto":
        reasons.append(f"channels last: what tensor cores want of the model's {convolutions} convolutions")
    return made, (*(reason for reason in reasons if reason), *_attention(layout, place, profile))


def _compile(layout: LayoutConfig, place: Place, profile: Profile | None) -> tuple[bool, str]:
    if layout.compile != "auto":
        return layout.compile, ""
    if place.device == "cpu":
        return False, ""
    against = next(_against_compiling(place, profile), None)
    if against is not None:
        return False, f"not compiled: {against}"
    return True, "compiled: kernels between two matrix products become one; the first steps of a shape take a minute"


def _against_compiling(place: Place, profile: Profile | None) -> Iterator[str]:
    if not place.modern:
        yield f"{place.accelerator or 'the accelerator'} is older than what torch.compile makes faster"
    if place.zero_stage == 3:
        yield "ZeRO stage 3 gathers each layer by a hook, which cuts the model to pieces; layout.compile=true tries it"
    if place.activation_checkpointing and (profile is None or profile.buffer_bytes):
        yield "it takes no model with buffers whose activations are computed again"


def _tf32(layout: LayoutConfig, place: Place) -> tuple[bool, str]:
    """On beside 16 bit, where little is left in fp32; off where fp32 was asked for, which means fp32."""
    if layout.tf32 != "auto":
        return layout.tf32, ""
    if place.device == "cpu" or not place.modern:
        return False, ""
    if place.precision == "fp32":
        return False, "TF32 off: fp32 was asked for; layout.tf32=true is several times faster, at 10 bits of mantissa"
    return True, f"TF32: for the products that {place.precision} leaves in fp32"


def _attention(layout: LayoutConfig, place: Place, profile: Profile | None) -> Iterator[str]:
    has_attention = profile is not None and any(kernel.kind == "attention" for kernel in profile.plain.kernels)
    if layout.attention == "auto" and has_attention and place.device == "cuda":
        flash = place.modern and place.precision != "fp32"
        kernel = "flash attention where its mask allows" if flash else "the memory-efficient kernel: flash takes 16 bit"
        yield f"attention: torch takes {kernel}"


def _check(config: RunConfig, place: Place, profile: Profile | None) -> None:
    layout, on_gpu = config.layout, place.device == "cuda"
    if layout.compile is True and place.activation_checkpointing and profile is not None and profile.buffer_bytes:
        raise ConfigError(
            "layout.compile=true: torch.compile takes no model with buffers, such as batch norm's, whose activations "
            "are computed again: set layout.compile=false or layout.activation_checkpointing=false"
        )
    if layout.tf32 is True and not (on_gpu and place.modern):
        raise ConfigError(
            "layout.tf32=true needs accelerators of compute capability 8.0 or more, and these workers have "
            f"{place.accelerator or 'an older one' if on_gpu else 'none'}: set layout.tf32=auto"
        )
    if layout.attention == "flash" and on_gpu and (place.precision == "fp32" or not place.modern):
        raise ConfigError(
            "layout.attention='flash' takes bf16 or fp16 on compute capability 8.0 or more, and this is "
            f"{place.precision} on {place.accelerator or 'an older one'}: set layout.attention=auto"
        )
    if layout.attention == "efficient" and not on_gpu:
        raise ConfigError("layout.attention='efficient' is a kernel of GPUs: on CPU set auto, flash or math")
    if layout.fused_optimizer is False and config.recipe.optimizer.name == "lamb":
        raise ConfigError("layout.fused_optimizer=false: LAMB is a fused kernel; set auto, or another optimizer")
