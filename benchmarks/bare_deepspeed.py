"""The bare side of overhead.py: the digits ResNet on DeepSpeed ZeRO-1, as a user would write it by hand.

Started by torchrun, one process per worker; writes ``rank-N.json`` with the wall clock and this rank's loss after
each step. Like anyone who shows a loss it reads ``loss.item()`` every step, but it does not average it over the
ranks. It has no checkpoints, no evaluation, no records, no way to stop and none to go on. From the orchestrator it
takes only the task of ``jobs.vision:digits`` and the numbers of its recipe; samples and random numbers come in the
same order, so the losses of both sides can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from jobs.vision import DigitsTask, digits

LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 6e-3, 0.05, 0.1


def main() -> None:
    """Train for ``--steps`` and write the times down."""
    options = _options()
    torch.set_num_threads(1)  # what Ray gives a worker with one CPU
    # As in orchestrator/training/engine.py: without this DeepSpeed compiles an extension before the first step.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    job = digits(batch=options.batch, width=options.width)
    assert job.prepare is not None
    job.prepare()
    assert isinstance(job.task, DigitsTask)
    record = _train(job.task, options.steps, options.batch)
    Path(options.folder, f"rank-{dist.get_rank()}.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def _train(task: DigitsTask, steps: int, batch: int) -> dict[str, list[float]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    engine = _initialize(task.model(), steps, batch, world_size)
    torch.manual_seed(rank + 1)  # each rank draws its own augmentation
    images, labels = _read(task.data)
    order = _order(len(labels), steps * batch)
    share = batch // world_size
    losses, times = [], []
    for step in range(steps):
        start = step * batch + rank * share
        mine = order[start : start + share]
        loss = task.loss(engine, {"image": torch.from_numpy(images[mine]), "label": torch.from_numpy(labels[mine])})
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        times.append(time.time())
    return {"losses": losses, "times": times}


def _initialize(model: nn.Module, steps: int, batch: int, world_size: int) -> Any:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // world_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "overlap_comm": False,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=LEARNING_RATE),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: _factor(step, steps)),
        config=config,
    )
    return engine


def _factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    start = step / steps
    if start < WARM_UP:
        return min((step + 1) / steps / WARM_UP, 1.0)
    return (1.0 + math.cos(math.pi * (start - WARM_UP) / (1.0 - WARM_UP))) / 2.0


def _read(folder: str) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(Path(folder) / "train.parquet").combine_chunks()
    images = table["image"].combine_chunks().flatten().to_numpy().reshape(len(table), -1).copy()
    return images, table["label"].to_numpy().copy()


def _order(num_samples: int, count: int) -> np.ndarray:
    """Return the first ``count`` indices of one shuffle after another."""
    epochs = range(math.ceil(count / num_samples))
    shuffles = [np.random.Generator(np.random.Philox(key=[0, epoch])).permutation(num_samples) for epoch in epochs]
    return np.concatenate(shuffles)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    for name in ("--steps", "--batch", "--width"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
