"""Memory: the published values, what DeepSpeed really allocates, and laws of the breakdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

import gloo_jobs as jobs
from gloo import GlooGroup
from orchestrator.config import SGD, AdamW
from orchestrator.planning.costs import Linear, Pass, Profile
from orchestrator.planning.memory import memory_use, model_state_bytes, optimizer_bytes

WORK = Pass((), Linear(0, 2e9), Linear(0, 4e9), Linear(1e6, 5e7), Linear(3e6, 6e7))
PROFILE = Profile(
    parameters=350_000_000,
    frozen_parameters=0,
    largest_layer=50_000_000,
    small_parameters=100_000,
    tensors=300,
    buffer_bytes=0,
    sample_bytes=1000,
    precision="bf16",
    plain=WORK,
    checkpointed=WORK,
)


@pytest.mark.parametrize(
    ("workers", "gigabytes"), [(64, (120, 31.4, 16.6, 1.88)), (8, (120, 41.2, 28.1, 15.0))], ids=["64", "8"]
)
def test_published_values(workers: int, gigabytes: tuple[float, ...]) -> None:
    """Rajbhandari et al. 2020, figure 1, for 7.5 billion parameters; 8 workers by the same formulas."""
    found = [model_state_bytes(7.5e9, stage, workers) / 1e9 for stage in range(4)]
    assert found == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_worker_shares_nothing(precision: str) -> None:
    """In every stage it holds all; the sharded stages hold masters beside fp32 parameters too."""
    found = {model_state_bytes(1e6, stage, 1, precision=precision) for stage in (1, 2, 3)}
    assert found == {20e6 if precision == "fp32" else 16e6}


def test_what_is_offloaded_is_on_the_host() -> None:
    whole = model_state_bytes(1e9, 3, 4)
    assert model_state_bytes(1e9, 3, 4, offload="optimizer") == pytest.approx(1e9 * 4 / 4)
    assert model_state_bytes(1e9, 3, 4, offload="all") == 0 < whole


def test_the_breakdown_adds_up_and_grows_with_the_micro_batch() -> None:
    def use(micro_batch: int, stage: int = 2) -> Any:
        return memory_use(
            PROFILE,
            jobs.toy_config(recipe={"optimizer": AdamW(learning_rate=1e-3)}),
            zero_stage=stage,
            workers=4,
            offload="none",
            checkpointing=False,
            micro_batch=micro_batch,
            device="cuda",
        )

    small, large = use(1), use(9)
    assert small.total == sum(asdict(small).values())
    assert large.activations - small.activations == pytest.approx(8 * (5e7 + 1000))
    assert large.total - small.total == pytest.approx(8 * 6e7 * 1.06, rel=1e-3)
    assert small.gathered == 0 < use(1, 3).gathered
    assert small.buckets == 2 * use(1, 3).buckets == 2 * 2 * 50_000_000


# -- against DeepSpeed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Iterator[GlooGroup]:
    pair = GlooGroup(2)
    yield pair
    pair.close()


OPTIMIZERS = {
    "adamw": AdamW(learning_rate=1e-3),
    "momentum": SGD(learning_rate=0.1),
    "sgd": SGD(learning_rate=0.1, momentum=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_are_what_deepspeed_allocates(group: GlooGroup, stage: int, precision: str, optimizer: str) -> None:
    config = jobs.toy_config(
        recipe={"optimizer": OPTIMIZERS[optimizer], "batch": 32},
        layout={"zero_stage": stage, "precision": precision, "accumulation": 2},
    )
    predicted = None
    measured = (jobs.Toy(jobs.deep), 20_000) if stage == 2 else (jobs.Toy(jobs.wide),)
    for parameters, allocated in group.run(jobs.state_bytes, config, *measured):
        predicted = model_state_bytes(
            parameters,
            stage,
            2,
            precision=precision,
            optimizer_bytes=optimizer_bytes(config),
            fp32_sums=precision == "bf16" and stage in (1, 2),
        )
        assert allocated == pytest.approx(predicted, rel=0.01)
    assert predicted is not None
