"""What an accelerator can do, as its maker publishes it, and how much of that training reaches.

Peak rates are dense (no sparsity) matrix rates, from the makers' data sheets, in the form that is named in each line.
Memory is what a process may allocate at most, so a little less than the nominal size where the maker counts in GB of
1e9 bytes. Links are one direction: ``link_bytes_per_s`` to another device of the node, ``network_bytes_per_s`` each
device's share of what a node of the usual build has to other nodes (8 NICs of 200 Gbit/s beside 8 A100, of 400 beside
8 H100; one of 25 or 100 Gbit/s on machines with PCIe cards).

**Achievable fractions.** No published peak is reached: matrix units stall on instruction issue, on tiles that do not
fill the chip, and since Hopper on power. ``matmul`` is the fraction that cuBLAS or hipBLASLt reach on large 16-bit
products of random numbers in a loop, ``attention`` that of a fused attention kernel (Dao 2023, arXiv:2307.08691,
table of figure 4: forward and backward together up to 225 TFLOP/s on A100 and 338 on H100, less at 2,048 tokens and
with a causal mask), ``bandwidth`` that of streaming kernels. Where nobody has published them they are those of the
nearest relative: assumptions.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from orchestrator.config import AcceleratorConfig
from orchestrator.errors import ConfigError

__all__ = ["Accelerator", "accelerator_named", "known_accelerators", "recognise"]

Precision = Literal["fp32", "bf16", "fp16"]
GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device. Rates in FLOP/s and bytes/s; a rate of 0 says that it lacks that precision."""

    name: str
    memory_bytes: int
    bf16_flops: float
    fp16_flops: float
    fp32_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    source: str
    per_node: int = 8
    matmul: float = 0.75
    """Reached by large matrix products, as a fraction of the peak."""
    attention: float = 0.45
    """Reached by a fused attention kernel, forward and backward."""
    bandwidth: float = 0.85
    """Of the memory's, reached by kernels that only move data."""
    launch_s: float = 6e-6
    """Shortest time from one kernel to the next in eager PyTorch."""
    host_bytes_per_s: float = 12e9
    """To host memory over PCIe, for offload; half of a 4.0 x16 link, which two devices share."""

    def flops(self, precision: Precision) -> float:
        """Peak matrix rate in FLOP/s; torch leaves TF32 off, so fp32 is the plain one."""
        return {"bf16": self.bf16_flops, "fp16": self.fp16_flops, "fp32": self.fp32_flops}[precision]

    @property
    def is_cpu(self) -> bool:
        """Whether it is no accelerator at all."""
        return self.name == "cpu"


class Reached(NamedTuple):
    """What of the published numbers is reached; the fields of ``Accelerator`` of the same names."""

    matmul: float
    attention: float
    launch_s: float = 6e-6
    host_bytes_per_s: float = 12e9


def _gpu(
    name: str,
    memory_gib: float,
    half_tflops: float,
    fp32_tflops: float,
    memory_gb_s: float,
    link_gb_s: float,
    network_gbit_s: float,
    source: str,
    *,
    bf16: bool = True,
    per_node: int = 8,
    reached: Reached,
) -> Accelerator:
    return Accelerator(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        bf16_flops=half_tflops * 1e12 if bf16 else 0.0,
        fp16_flops=half_tflops * 1e12,
        fp32_flops=fp32_tflops * 1e12,
        memory_bytes_per_s=memory_gb_s * 1e9,
        link_bytes_per_s=link_gb_s * 1e9,
        network_bytes_per_s=network_gbit_s / 8 * 1e9,
        source=source,
        per_node=per_node,
        **reached._asdict(),
    )


# Hopper and later throttle on power under dense matrix products of random numbers: cuBLAS holds 600 to 700 TFLOP/s on
# an H100 SXM, against 240 to 270 of an A100's 312.
AMPERE = Reached(matmul=0.8, attention=0.5)
HOPPER = Reached(matmul=0.66, attention=0.33, host_bytes_per_s=25e9, launch_s=5e-6)
PCIE_CARD = Reached(matmul=0.6, attention=0.35)
VOLTA = Reached(matmul=0.6, attention=0.3)
OTHER = Reached(matmul=0.5, attention=0.25)

TABLE: tuple[Accelerator, ...] = (
    _gpu("t4", 15, 65, 8.1, 320, 8, 3.125, "NVIDIA T4 data sheet", bf16=False, per_node=4, reached=OTHER),
    _gpu("v100-16gb", 15.8, 125, 15.7, 900, 150, 12.5, "NVIDIA V100 SXM2 data sheet", bf16=False, reached=VOLTA),
    _gpu("v100-32gb", 31.7, 125, 15.7, 900, 150, 12.5, "NVIDIA V100 SXM2 data sheet", bf16=False, reached=VOLTA),
    _gpu("a10g", 22.5, 70, 35, 600, 12, 12.5, "AWS G5 page, NVIDIA A10 data sheet", reached=PCIE_CARD),
    _gpu("l4", 22.5, 121, 30.3, 300, 12, 12.5, "NVIDIA L4 data sheet, half of the sparse rate", reached=OTHER),
    _gpu("l40s", 44.5, 362, 91.6, 864, 25, 50, "NVIDIA L40S data sheet, half of the sparse rate", reached=PCIE_CARD),
    _gpu("rtx-4090", 23.6, 165, 82.6, 1008, 12, 10, "NVIDIA Ada white paper, fp32 sums", per_node=4, reached=AMPERE),
    _gpu("a100-40gb", 39.4, 312, 19.5, 1555, 300, 200, "NVIDIA A100 SXM data sheet", reached=AMPERE),
    _gpu("a100-80gb", 79.2, 312, 19.5, 2039, 300, 200, "NVIDIA A100 SXM data sheet", reached=AMPERE),
    _gpu(
        "h100-80gb", 79.1, 989, 67, 3350, 450, 400, "NVIDIA H100 SXM data sheet, half the sparse rate", reached=HOPPER
    ),
    _gpu("h200", 139.8, 989, 67, 4800, 450, 400, "NVIDIA H200 data sheet, half of the sparse rate", reached=HOPPER),
    _gpu("b200", 178, 2250, 75, 7700, 900, 400, "NVIDIA HGX B200 data sheet, half the sparse rate", reached=HOPPER),
    _gpu("gb200", 184, 2500, 80, 8000, 900, 400, "NVIDIA GB200 NVL72 page, per GPU", per_node=4, reached=HOPPER),
    _gpu("mi250", 63.9, 181, 45.3, 1638, 50, 100, "AMD MI250 data sheet, one of its two dies", reached=VOLTA),
    _gpu("mi300x", 191.5, 1307, 163.4, 5300, 448, 400, "AMD MI300X data sheet", reached=OTHER),
    _gpu("tpu-v5e", 15.8, 197, 24, 819, 45, 25, "Google Cloud TPU v5e page, ICI per link", per_node=4, reached=OTHER),
    _gpu("tpu-v5p", 95, 459, 57, 2765, 200, 50, "Google Cloud TPU v5p page, ICI per link", per_node=4, reached=OTHER),
    # One core of a server of today: 2 x 8 fp32 lanes with fused multiply-add at 2.5 GHz, and its share of the memory.
    Accelerator(
        name="cpu",
        memory_bytes=4 * GIB,
        bf16_flops=80e9,
        fp16_flops=0.0,
        fp32_flops=80e9,
        memory_bytes_per_s=8e9,
        link_bytes_per_s=2e9,
        network_bytes_per_s=1e9,
        source="an assumption, per worker of one core; its memory is read from the machine where there is one",
        per_node=2**20,
        matmul=0.5,
        attention=0.2,
        bandwidth=0.5,
    ),
)

# What people and Ray say, where it is not the name above. Without a size the smaller one, which promises less.
ALIASES = {
    "v100": "v100-16gb",
    "a100": "a100-40gb",
    "a100-40g": "a100-40gb",
    "a100-80g": "a100-80gb",
    "h100": "h100-80gb",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
    "tesla-t4": "t4",
    "a10": "a10g",
    "mi300": "mi300x",
    "mi250x": "mi250",
    "amd-instinct-mi250": "mi250",
    "amd-instinct-mi300x": "mi300x",
    "tpu-v5lite": "tpu-v5e",
    "tpu-v5litepod": "tpu-v5e",
    "v5e": "tpu-v5e",
    "v5p": "tpu-v5p",
}


def known_accelerators(own: AcceleratorConfig | None = None) -> dict[str, Accelerator]:
    """Name to accelerator: the table, and the config's own, which goes before one of the same name."""
    table = {each.name: each for each in TABLE}
    if own is not None:
        table[own.name] = _own(own)
    return table


def accelerator_named(name: str, own: AcceleratorConfig | None = None) -> Accelerator:
    """The accelerator called ``name``, in any case and with spaces, dots or underscores for dashes.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    table = known_accelerators(own)
    if (found := _find(name, table)) is not None:
        return found
    near = difflib.get_close_matches(_plain(name), table, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"accelerator {name!r} is not known; {hint}valid: {', '.join(sorted(table))}; describe another one by "
        "--set planning.accelerator.name=..., .memory_gib=... and so on, or in the job's config"
    )


def recognise(label: str, own: AcceleratorConfig | None = None) -> Accelerator | None:
    """The accelerator that Ray's or the driver's ``label`` means, such as "A100" or "NVIDIA-H100-80GB-HBM3"."""
    table = known_accelerators(own)
    plain = _plain(label)
    if (found := _find(plain, table)) is not None:
        return found
    words = plain.removeprefix("nvidia-").removeprefix("tesla-").split("-")
    for length in range(len(words), 0, -1):
        if (found := _find("-".join(words[:length]), table)) is not None:
            return found
    return None


def _find(name: str, table: dict[str, Accelerator]) -> Accelerator | None:
    plain = _plain(name)
    return table.get(plain) or table.get(ALIASES.get(plain, ""))


def _plain(name: str) -> str:
    return re.sub(r"[\s_.]+", "-", name.strip().lower())


def _own(config: AcceleratorConfig) -> Accelerator:
    return Accelerator(
        name=config.name,
        memory_bytes=int(config.memory_gib * GIB),
        bf16_flops=config.bf16_tflops * 1e12,
        fp16_flops=config.fp16_tflops * 1e12,
        fp32_flops=config.fp32_tflops * 1e12,
        memory_bytes_per_s=config.memory_gb_per_s * 1e9,
        link_bytes_per_s=config.link_gb_per_s * 1e9,
        network_bytes_per_s=config.network_gbit_per_s / 8 * 1e9,
        source="the config",
        per_node=config.per_node,
        matmul=config.matmul_fraction,
    )
