"""Runs to make smaller: trained by the real loop in processes of their own, with the records that a command leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gloo import GlooGroup
from gloo_jobs import new_run, run_loop
from orchestrator.config import Fixed, LayoutConfig, ScaleConfig
from orchestrator.job import Job
from orchestrator.storage.folder import RunFolder, write_json

GROUPS = {workers: GlooGroup(workers) for workers in (1, 2)}


def train(root: Path, job: Job, target: str, args: list[str], *, workers: int = 1, **layout: Any) -> Path:
    """Train ``job`` in the run folder ``root``, which says that it came from ``target`` with ``args``."""
    config = job.config.model_copy(
        update={
            "policy": Fixed(),
            "layout": LayoutConfig(**{"zero_stage": 1, "precision": "fp32", **layout}),
            "scale": ScaleConfig(workers=workers),
        }
    )
    job = dataclasses.replace(job, config=config)
    if job.prepare is not None:
        job.prepare()
    ends = GROUPS[workers].run(run_loop, config, job.task, *new_run(root))
    assert not ends[0].error, ends[0].message
    folder = RunFolder(root)
    write_json(folder.config, config.model_dump(mode="json"))
    write_json(folder.job, {"job": target, "args": args})
    return root


def sparsity_of(model: nn.Module) -> float:
    """Share of zeros among the linear and convolutional weights."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    weights = torch.cat([layer.weight.detach().flatten() for layer in model.modules() if isinstance(layer, kinds)])
    return float((weights == 0).float().mean())
