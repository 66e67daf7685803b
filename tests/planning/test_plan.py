"""make_plan: what "auto" becomes, with its reasons; what ends a run; and every combination that is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import (
    LAMB,
    SGD,
    AdamW,
    EvaluationConfig,
    Fixed,
    LayoutConfig,
    Ramp,
    Recipe,
    RunConfig,
    ScaleConfig,
    Stop,
)
from orchestrator.errors import ClusterError, ConfigError, DataError
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costing import Costing
from orchestrator.planning.layout import Layout
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.probe import Probe, Trial

CPUS = ClusterShape(nodes=1, cpus=8)
A100S = ClusterShape(nodes=1, cpus=64, accelerators=8, accelerator="A100")
V100S = replace(A100S, accelerator="V100")


def config(
    *, recipe: dict[str, Any] | None = None, layout: dict[str, Any] | None = None, workers: Any = 2, **fields: Any
) -> RunConfig:
    base = {"batch": 64, "optimizer": AdamW(learning_rate=1e-3), "stop": Stop(epochs=2)}
    return RunConfig(
        name="a-run",
        recipe=Recipe(**{**base, **(recipe or {})}),
        layout=LayoutConfig(**(layout or {})),
        scale=ScaleConfig(workers=workers),
        **fields,
    )


def plan(
    shape: ClusterShape = CPUS, *, train_samples: int = 1000, evaluation_samples: int = 200, **fields: Any
) -> Plan:
    return make_plan(config(**fields), shape, train_samples=train_samples, evaluation_samples=evaluation_samples)


def refusal(kind: type[Exception] = ConfigError, shape: ClusterShape = CPUS, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        plan(shape, **fields)
    return str(caught.value)


# -- what is decided ---------------------------------------------------------------------------


def test_of_a_range_the_most_that_there_is_room_for_and_that_share_the_batch() -> None:
    made = plan(ClusterShape(nodes=1, cpus=7), workers=(2, 8))
    assert made.layout == Layout(workers=4, micro_batch=16, accumulation=1)
    assert "4 workers: of scale.workers=2,8 the batch can be shared by 2, 4, 8" in made.reasons
    assert "shared by" not in str(plan(ClusterShape(nodes=1, cpus=7), workers=(1, 2)).reasons)
    said = refusal(ClusterError, ClusterShape(nodes=1, cpus=3), workers=(3, 8))
    assert said.startswith("scale.workers=3,8 with this global batch needs 4 workers at least, and the cluster has")


def test_a_whole_plan() -> None:
    assert plan() == Plan(
        name="a-run",
        layout=Layout(workers=2, micro_batch=32, accumulation=1),
        reference_batch=64,
        zero_stage=1,
        offload="none",
        activation_checkpointing=False,
        precision="fp32",
        device="cpu",
        nodes=1,
        train_samples=1000,
        evaluation_samples=200,
        length=2000,
        evaluate_every=1000.0,
        stop=Stop(epochs=2),
        reasons=(
            "global batch 64: the reference batch",
            "policy goodput: the batch grows while that shortens the time to the end",
            "ZeRO stage 1: optimizer state shared over the workers, at no cost in communication",
            "precision fp32: no accelerator",
        ),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"recipe": {"stop": Stop(wall_time_s=60)}},
            "policy.name='ramp' is laid over the run's length, and recipe.stop gives none",
        ),
        ({"policy": Ramp(at=(0.0,), batches=(1001,))}, "policy.batches holds 1001, more than the training set of 1000"),
        ({"layout": {"micro_batch": 8, "accumulation": 4}}, "layout.micro_batch and layout.accumulation are both set"),
    ],
)
def test_a_ramp_that_cannot_be_followed_is_refused(fields: dict[str, Any], message: str) -> None:
    ramp = Ramp(at=(0.0, 0.5), batches=(64, 128))
    assert plan(policy=ramp).reasons[1] == "policy ramp: batch 64 from 0%, 128 from 50% of the run on"
    assert message in refusal(**{"policy": ramp, **fields})


def test_a_plan_as_it_is_written_down() -> None:
    written = plan(
        A100S,
        recipe={"stop": Stop(steps=10, metric="accuracy", at_least=0.9)},
        layout={"global_batch": 128, "micro_batch": 8, "zero_stage": 2},
        evaluation=EvaluationConfig(every_epochs=0.5),
    ).to_dict()
    nulls = ("fits", "memory_bytes", "device_memory_bytes", "step_time_s", "samples_per_s", "mfu", "alternatives")
    assert all(name in written and written[name] is None for name in nulls)
    assert written == {
        "name": "a-run",
        "global_batch": 128,
        "workers": 2,
        "micro_batch": 8,
        "accumulation": 8,
        "reference_batch": 64,
        "zero_stage": 2,
        "offload": "none",
        "activation_checkpointing": False,
        "precision": "bf16",
        "device": "cuda",
        "nodes": 1,
        "train_samples": 1000,
        "evaluation_samples": 200,
        "length": 640.0,
        "evaluate_every": 500.0,
        "stop": {"steps": 10, "metric": "accuracy", "at_least": 0.9},
        "computing": {
            "compile": True,
            "tf32": True,
            "fused_optimizer": True,
            "channels_last": False,
            "attention": "auto",
        },
        "reasons": (
            "global batch 128: as set",
            "learning rate tuned at batch 64: carried over by rule 'auto'",
            "policy goodput: the batch grows while that shortens the time to the end",
            "precision bf16: what A100 is fast at",
            "compiled: kernels between two matrix products become one; the first steps of a shape take a minute",
            "TF32: for the products that bf16 leaves in fp32",
            "fused optimizer: a few kernels update all weights",
        ),
        **Costing.not_costed(),
    }
    assert json.loads(json.dumps(written, allow_nan=False))["reasons"] == list(written["reasons"])


@pytest.mark.parametrize(
    ("shape", "fields", "stage", "reason"),
    [
        (CPUS, {"workers": 1}, 0, "ZeRO stage 0: one worker has nothing to share"),
        (CPUS, {}, 1, "ZeRO stage 1: optimizer state shared over the workers, at no cost in communication"),
        (A100S, {"recipe": {"optimizer": LAMB(learning_rate=1e-3)}}, 0, "ZeRO stage 0: LAMB needs whole layers"),
        (CPUS, {"layout": {"zero_stage": 3}}, 3, None),
    ],
)
def test_zero_stage(shape: ClusterShape, fields: dict[str, Any], stage: int, reason: str | None) -> None:
    made = plan(shape, **fields)
    assert made.zero_stage == stage
    assert [said for said in made.reasons if said.startswith("ZeRO")] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("shape", "asked", "precision"),
    [
        (CPUS, "auto", "fp32"),
        (A100S, "auto", "bf16"),
        (V100S, "auto", "fp16"),
        (replace(A100S, accelerator="T4"), "auto", "fp16"),
        (replace(A100S, accelerator=""), "auto", "bf16"),
        (V100S, "fp32", "fp32"),
        (CPUS, "bf16", "bf16"),
        (A100S, "fp16", "fp16"),
    ],
)
def test_precision(shape: ClusterShape, asked: str, precision: str) -> None:
    made = plan(shape, layout={"precision": asked})
    assert made.precision == precision
    assert any("precision" in reason for reason in made.reasons) == (asked == "auto")


@pytest.mark.parametrize(
    ("stop", "length"), [(Stop(steps=7), 448.0), (Stop(epochs=1.5), 1500.0), (Stop(samples=99), 99.0)]
)
def test_lengths_are_counted_at_the_reference_batch(stop: Stop, length: float) -> None:
    """So another global batch changes how many steps there are, and not how far the run goes."""
    assert plan(recipe={"stop": stop}).length == length
    assert plan(recipe={"stop": stop}, layout={"global_batch": 256}).length == length
    assert plan(recipe={"stop": Stop(wall_time_s=5)}).length is None


def test_a_range_starts_with_as_many_workers_as_fit() -> None:
    assert plan(ClusterShape(1, 3), workers=(2, 4), layout={"global_batch": 60}).layout == Layout(3, 20, 1)


@given(st.integers(1, 16), st.integers(1, 64), st.sampled_from(["auto", 1, 2, 4]), st.sampled_from(["auto", 1, 2, 4]))
def test_a_plan_keeps_the_batch_on_any_cluster_or_is_refused(
    workers: int, batch: int, micro_batch, accumulation
) -> None:
    layout = {"global_batch": batch, "micro_batch": micro_batch, "accumulation": accumulation}
    try:
        made = plan(ClusterShape(1, 16), workers=workers, layout=layout)
    except ConfigError:
        return
    assert (made.layout.global_batch, made.layout.workers) == (batch, workers)


# -- progress and the end ----------------------------------------------------------------------


class Stands:
    def __init__(self, progress: float = 0.0, train_time_s: float = 0.0, **evaluation: float) -> None:
        self.progress, self.train_time_s, self.evaluation = progress, train_time_s, evaluation or None


def finished(stop: Stop, standing: Stands) -> str | None:
    return plan(recipe={"stop": stop}).finished(standing)


@pytest.mark.parametrize(
    ("stop", "before", "after", "reason"),
    [
        (Stop(samples=100), Stands(99.9), Stands(100), "length reached"),
        (Stop(wall_time_s=2.5), Stands(1e9, 2.4), Stands(0, 2.5), "wall time of 2.5 s reached"),
        (
            Stop(metric="accuracy", at_least=0.985),
            Stands(accuracy=0.984),
            Stands(accuracy=0.98765),
            "target reached: accuracy 0.9877 >= 0.985",
        ),
        (Stop(metric="loss", at_most=0.5), Stands(loss=0.51), Stands(loss=0.5), "target reached: loss 0.5 <= 0.5"),
        (Stop(metric="loss", at_most=0.5), Stands(), Stands(loss=-1.0), "target reached: loss -1 <= 0.5"),
        (Stop(metric="loss", at_most=0.5), Stands(other=0.1), Stands(loss=0.1), "target reached: loss 0.1 <= 0.5"),
        (
            Stop(metric="loss", at_most=0.5),
            Stands(loss=float("nan")),
            Stands(loss=0.1),
            "target reached: loss 0.1 <= 0.5",
        ),
    ],
)
def test_what_ends_a_run(stop: Stop, before: Stands, after: Stands, reason: str) -> None:
    assert finished(stop, before) is None
    assert finished(stop, after) == reason


def test_whichever_comes_first() -> None:
    stop = Stop(samples=100, wall_time_s=5, metric="accuracy", at_least=0.9)
    assert finished(stop, Stands(50, 1, accuracy=0.8)) is None
    assert finished(stop, Stands(50, 6, accuracy=0.8)) == "wall time of 5 s reached"
    assert finished(stop, Stands(50, 1, accuracy=0.95)) == "target reached: accuracy 0.95 >= 0.9"
    assert finished(stop, Stands(100, 6, accuracy=0.95)) == "length reached"


def test_shares_of_the_length() -> None:
    made = plan(recipe={"stop": Stop(samples=200)})
    assert [made.shares(progress, 64) for progress in (0, 100, 192, 256)] == [
        (0.0, 0.32),
        (0.5, 0.82),
        (0.96, 1.0),
        (1.0, 1.0),
    ]
    assert plan(recipe={"stop": Stop(wall_time_s=5)}).shares(100, 64) == (0.0, 1.0)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        (
            CPUS,
            {"train_samples": 63},
            "recipe.batch=64 is larger than the training set of 63 samples: use at most 63",
        ),
        (
            CPUS,
            {"layout": {"global_batch": 2000}},
            "layout.global_batch=2000 is larger than the training set of 1000 samples: use at most 1000",
        ),
        (
            CPUS,
            {"workers": 3},
            "layout.global_batch=64 does not divide over scale.workers=3: use 63 or 66, or another number of workers",
        ),
        (
            CPUS,
            {"workers": (3, 3)},
            (
                "layout.global_batch=64 does not divide over any number of workers in scale.workers=3,3: "
                "use 63 or 66, or another range"
            ),
        ),
        (
            CPUS,
            {"workers": (1, 2), "layout": {"micro_batch": 5}},
            (
                "layout.global_batch=64 does not divide over any number of workers in scale.workers=1,2: "
                "use 60 or 65, or another range"
            ),
        ),
        (
            CPUS,
            {"workers": (1, 2), "layout": {"micro_batch": 32, "accumulation": 1}},
            (
                "layout.micro_batch=32 and layout.accumulation=1 leave one number of workers, and scale.workers=1,2 is "
                "a range: set one of the two to auto, or scale.workers to a number"
            ),
        ),
        (
            CPUS,
            {"layout": {"offload": "optimizer"}},
            (
                "layout.offload='optimizer' moves state from accelerator to host memory, and these workers have no "
                "accelerator: set layout.offload=none"
            ),
        ),
        (
            A100S,
            {"layout": {"offload": "optimizer", "zero_stage": 0}},
            "layout.offload='optimizer' needs layout.zero_stage=1, 2 or 3, and it is 0",
        ),
        (
            A100S,
            {"layout": {"offload": "all", "zero_stage": 2}},
            "layout.offload='all' needs layout.zero_stage=3, and it is 2",
        ),
        (
            V100S,
            {"layout": {"precision": "bf16"}},
            "layout.precision='bf16': V100 has no bf16 units: use fp16, fp32 or auto",
        ),
        (
            CPUS,
            {"recipe": {"optimizer": LAMB(learning_rate=1e-3)}},
            (
                "recipe.optimizer.name='lamb' runs on DeepSpeed's fused GPU kernel, whose trust ratio needs whole "
                "layers: use accelerators and layout.zero_stage=0, or recipe.optimizer.name=adamw"
            ),
        ),
        (
            A100S,
            {"recipe": {"optimizer": LAMB(learning_rate=1e-3)}, "layout": {"zero_stage": 1}},
            (
                "recipe.optimizer.name='lamb' runs on DeepSpeed's fused GPU kernel, whose trust ratio needs whole "
                "layers: use accelerators and layout.zero_stage=0, or recipe.optimizer.name=adamw"
            ),
        ),
        (
            CPUS,
            {"layout": {"sync_batch_norm": True}},
            "layout.sync_batch_norm=true needs accelerators (torch's SyncBatchNorm): set it to false",
        ),
        (
            CPUS,
            {"recipe": {"stop": Stop(metric="loss", at_most=1.0)}, "evaluation_samples": 0},
            "recipe.stop.metric='loss' is measured on the evaluation set, and the job has none",
        ),
    ],
)
def test_refusals(shape: ClusterShape, fields: dict[str, Any], message: str) -> None:
    assert refusal(shape=shape, **fields) == message


def test_no_data() -> None:
    assert refusal(DataError, train_samples=0) == "the training set is empty: there is nothing to train on"


def test_too_small_a_cluster() -> None:
    assert refusal(ClusterError, workers=9).startswith("scale.workers=9 needs 1 CPU and 0 accelerators each, and ")


def test_what_fits_is_not_refused() -> None:
    """The same switches where they belong."""
    for offload, stage in (("optimizer", 1), ("optimizer", 3), ("all", 3)):
        assert plan(A100S, layout={"offload": offload, "zero_stage": stage}).offload == offload
    assert plan(layout={"offload": "none"}).offload == "none"
    assert plan(A100S, layout={"sync_batch_norm": True, "activation_checkpointing": True}).activation_checkpointing
    assert plan(train_samples=64).layout.global_batch == 64
    assert plan(recipe={"optimizer": SGD(learning_rate=0.1)}, evaluation_samples=0).evaluation_samples == 0
    assert re.match(r"global batch 60", plan(workers=(2, 4), layout={"global_batch": 60}).reasons[0])


def test_preconditioned_noise_needs_adam_and_its_state() -> None:
    policy = Fixed(noise_preconditioned=True)
    with pytest.raises(
        ConfigError, match=r"recipe.optimizer.name='sgd' has none to go by: set it to false, or use adam"
    ):
        plan(policy=policy, recipe={"optimizer": SGD(learning_rate=0.1)})
    with pytest.raises(ConfigError, match=r"in bf16 at layout.zero_stage=0: set layout.zero_stage=1"):
        plan(
            CPUS,
            policy=policy,
            recipe={"optimizer": AdamW(learning_rate=0.1)},
            layout={"zero_stage": 0, "precision": "bf16"},
        )
    plan(policy=policy, recipe={"optimizer": AdamW(learning_rate=0.1)})


def test_a_probe_bounds_the_micro_batch_also_where_nothing_could_be_traced() -> None:
    made = plan(evaluation_samples=0)
    place = (made.layout.workers, made.nodes, made.precision, made.zero_stage, made.offload)
    refused = made.layout.micro_batch // 2
    probe = Probe("cpu", *place, made.activation_checkpointing, (Trial(refused, None),))
    again = make_plan(config(), CPUS, train_samples=1000, evaluation_samples=0, probe=probe)
    assert again.layout.global_batch == made.layout.global_batch
    assert again.layout.micro_batch < refused
