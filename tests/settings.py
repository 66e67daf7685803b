"""A model, a job and a device for the tests that choose between combinations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gloo_jobs as jobs
from orchestrator.config import AdamW
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.choice import Choice, Setting, choose, space_of
from orchestrator.planning.costs import Kernel, Linear, Pass, Profile

GIB = 2**30
PLAIN = Pass(
    kernels=(Kernel("matmul", 100, Linear(0, 1e11), Linear(1e7, 1e7), Linear(4096, 0)),),
    forward_flops=Linear(0, 1e13 / 3),
    backward_flops=Linear(0, 2e13 / 3),
    kept_bytes=Linear(0, 4 * GIB),
    peak_bytes=Linear(GIB, 4.5 * GIB),
)
AGAIN = replace(
    PLAIN,
    kernels=(replace(PLAIN.kernels[0], count=133),),
    kept_bytes=Linear(0, 0.2 * GIB),
    peak_bytes=Linear(GIB, 0.5 * GIB),
)
PROFILE = Profile(1_000_000_000, 0, 50_000_000, 100_000, 200, 0, 4096, "bf16", PLAIN, AGAIN)
ADAM = {"optimizer": AdamW(learning_rate=1e-3), "batch": 64}


def setting(
    layout: dict[str, Any] | None = None,
    *,
    accelerator: str = "a100-40gb",
    workers: int = 8,
    parameters: int = 1_000_000_000,
    **fields: Any,
) -> Setting:
    auto = {"zero_stage": "auto", "precision": "bf16", **(layout or {})}
    device = accelerator_named(accelerator)
    return replace(
        Setting(
            profile=replace(PROFILE, parameters=parameters),
            config=jobs.toy_config(workers, recipe=ADAM, layout=auto),
            accelerator=device,
            workers=workers,
            nodes=1,
            capacity_bytes=device.memory_bytes,
            host_bytes=None,
        ),
        **fields,
    )


def chosen(made: Setting, share: int = 8) -> Choice:
    space = space_of(made.config, made.profile, share, made.workers, on_accelerator=made.device == "cuda")
    return choose(made, space)
