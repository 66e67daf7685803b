"""The engine on an accelerator, alone in its group: what the CPU tests hold, NCCL and the device must hold too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ports import free_port

pytestmark = pytest.mark.gpu

STEPS = 20


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(free_port())}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("nccl")
        yield
        dist.destroy_process_group()


def losses(folder: Path, stage: int, precision: str, device: str, *, compiled: bool = False) -> list[float]:
    import torch

    from jobs.vision import mlp
    from orchestrator.config import apply_overrides
    from orchestrator.planning.cluster import ClusterShape
    from orchestrator.planning.plan import make_plan
    from orchestrator.training.data import Stream, open_dataset
    from orchestrator.training.engine import Engine

    job = mlp(data=str(folder), workers=1)
    assert job.prepare is not None
    job.prepare()
    overrides = [f"layout.zero_stage={stage}", f"layout.precision={precision}", "layout.accumulation=2"]
    overrides += [f"layout.compile={str(compiled).lower()}", "layout.tf32=false"]
    config = apply_overrides(job.config, overrides)
    train_set = open_dataset(job.task.datasets().train)
    shape = ClusterShape(nodes=1, cpus=1, accelerators=1 if device == "cuda" else 0)
    plan = make_plan(config, shape, train_samples=len(train_set), evaluation_samples=0)
    engine = Engine(job.task, config, plan, device=torch.device(device))
    stream = Stream(plan.train_samples, 0)
    batch = plan.layout.global_batch
    return [
        engine.step(
            [train_set.take(positions) for positions in stream.micro_batches(step * batch, plan.layout, 0)],
            learning_rate=1e-3,
        ).loss
        for step in range(STEPS)
    ]


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_follow_stage_0_in_fp32(tmp_path: Path, stage: int) -> None:
    expected = losses(tmp_path, 0, "fp32", "cuda")
    np.testing.assert_allclose(losses(tmp_path, stage, "fp32", "cuda"), expected, rtol=1e-5)


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_model_follows_the_eager_one(tmp_path: Path, stage: int) -> None:
    expected = losses(tmp_path, stage, "fp32", "cuda")
    np.testing.assert_allclose(losses(tmp_path, stage, "fp32", "cuda", compiled=True), expected, rtol=1e-4)


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_16_bit_stays_near_fp32(tmp_path: Path, stage: int, precision: str) -> None:
    expected = losses(tmp_path, 0, "fp32", "cuda")
    # fp16 discards its first steps while it looks for a loss scale, and so lags behind.
    found = losses(tmp_path, stage, precision, "cuda")
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    assert found[-1] < expected[0]
    if precision == "bf16":
        np.testing.assert_allclose(found, expected, rtol=0.05)
