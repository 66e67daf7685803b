"""Another number of workers, another ZeRO stage: every value is moved to the bit, and the run goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo import GlooGroup
from gloo_jobs import Rows, Toy, blocks, frozen, mlp, new_run, reshape, run_loop, save_after, tied, toy_config
from orchestrator.config import SGD, AdamW, CheckpointConfig, Penalties, RunConfig, Stop
from orchestrator.errors import CheckpointError
from orchestrator.telemetry.records import read
from orchestrator.training.optimizer import parameters_in_order
from orchestrator.training.reshard import Shards

pytestmark = pytest.mark.slow

ADAMW = {"optimizer": AdamW(learning_rate=0.01), "penalties": Penalties(weight_decay=0.1)}
MOMENTUM = {"optimizer": SGD(learning_rate=0.05, momentum=0.9)}
PLAIN = {"optimizer": SGD(learning_rate=0.05, momentum=0.0)}
TASK = Toy(mlp)


@pytest.fixture(scope="module")
def groups(one: GlooGroup, two: GlooGroup, three: GlooGroup) -> dict[int, GlooGroup]:
    return {1: one, 2: two, 3: three}


def config_of(workers: int, stage: int, recipe: dict[str, Any], precision: str = "fp32") -> RunConfig:
    return toy_config(workers, recipe={"batch": 12, **recipe}, layout={"zero_stage": stage, "precision": precision})


def values(folder: Path, task: Toy, recipe: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors by parameter and key."""
    model = task.model()
    names = {p: name for name, p in model.named_parameters()}
    penalties = recipe.get("penalties", Penalties())
    shards = Shards.open(folder / "state", [names[p] for p in parameters_in_order(model, penalties)])
    found = {}
    for parameter, name in names.items():
        if not parameter.requires_grad:
            continue
        for key in shards.state_keys():
            found[name, key] = torch.empty(parameter.numel())
            shards.copy(name, key, 0, found[name, key])
    return found


# -- to the bit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, 1), (1, 1)),
        ((2, 1), (3, 1)),
        ((3, 2), (2, 2)),
        ((2, 3), (3, 3)),
        ((3, 3), (1, 3)),
        ((2, 1), (2, 3)),
        ((2, 3), (3, 2)),
        ((2, 1), (1, 0)),
        ((1, 0), (2, 3)),
        ((2, 0), (3, 0)),
    ],
)
@pytest.mark.parametrize("recipe", [ADAMW, MOMENTUM, PLAIN], ids=["adamw", "momentum", "sgd"])
def test_values_are_moved_to_the_bit(
    groups: dict[int, GlooGroup],
    tmp_path: Path,
    saved: tuple[int, int],
    loaded: tuple[int, int],
    recipe: dict[str, Any],
) -> None:
    groups[saved[0]].run(save_after, config_of(*saved, recipe), TASK, tmp_path / "before", 3)
    groups[loaded[0]].run(reshape, config_of(*loaded, recipe), TASK, tmp_path / "before", tmp_path / "after")
    before, after = values(tmp_path / "before", TASK, recipe), values(tmp_path / "after", TASK, recipe)
    assert before.keys() == after.keys()
    assert {key for _, key in before} == {
        id(ADAMW): {"fp32", "exp_avg", "exp_avg_sq"},
        id(MOMENTUM): {"fp32", "momentum_buffer"},
        id(PLAIN): {"fp32"},
    }[id(recipe)]
    assert all(torch.equal(before[one], after[one]) for one in before)
    assert all(tensor.count_nonzero() for (_, key), tensor in before.items() if key == "fp32")


@pytest.mark.parametrize("stages", [(1, 1), (1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bit_the_fp32_masters_are_moved(
    groups: dict[int, GlooGroup], tmp_path: Path, stages: tuple[int, int], precision: str
) -> None:
    groups[2].run(save_after, config_of(2, stages[0], ADAMW, precision), TASK, tmp_path / "before", 3)
    groups[3].run(reshape, config_of(3, stages[1], ADAMW, precision), TASK, tmp_path / "before", tmp_path / "after")
    before, after = values(tmp_path / "before", TASK, ADAMW), values(tmp_path / "after", TASK, ADAMW)
    assert len(before) == len(after) == 18
    assert all(torch.equal(before[one], after[one]) for one in before)


@pytest.mark.parametrize("build", [tied, frozen, blocks])
@pytest.mark.parametrize("stages", [(1, 3), (3, 1)])
def test_shared_and_frozen_weights_and_buffers(
    groups: dict[int, GlooGroup], tmp_path: Path, build: Any, stages: tuple[int, int]
) -> None:
    task = Toy(build)
    groups[2].run(save_after, config_of(2, stages[0], ADAMW), task, tmp_path / "before", 3)
    groups[1].run(reshape, config_of(1, stages[1], ADAMW), task, tmp_path / "before", tmp_path / "after")
    before, after = values(tmp_path / "before", task, ADAMW), values(tmp_path / "after", task, ADAMW)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[one], after[one]) for one in before)


def test_another_model_is_refused(groups: dict[int, GlooGroup], tmp_path: Path) -> None:
    groups[2].run(save_after, config_of(2, 1, ADAMW), TASK, tmp_path / "before", 1)
    with pytest.raises(
        CheckpointError, match=r"holds 0 of 64 elements of other \(fp32\): it was saved by another model"
    ):
        Shards.open(tmp_path / "before" / "state", []).copy("other", "fp32", 0, torch.empty(64))


# -- going on ----------------------------------------------------------------------------------


def loop_config(workers: int, stage: int, recipe: dict[str, Any], steps: int = 9) -> RunConfig:
    return toy_config(
        workers,
        recipe={"batch": 12, **recipe, "stop": Stop(steps=steps)},
        layout={"zero_stage": stage},
        checkpoint=CheckpointConfig(),
    )


def losses(root: Path) -> list[float]:
    return [record["loss"] for record in read(root / "metrics.jsonl")]


@pytest.mark.parametrize("recipe", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
@pytest.mark.parametrize(
    "legs",
    [
        [(2, 1), (1, 1), (2, 1)],
        [(2, 3), (1, 3), (2, 3)],
        [(2, 2), (3, 2), (1, 0)],
        [(2, 1), (2, 3), (2, 2)],
    ],
    ids=["2-1-2", "2-1-2-in-stage-3", "2-3-1", "stage-1-3-2"],
)
def test_a_run_goes_on_as_if_nothing_had_changed(
    groups: dict[int, GlooGroup], tmp_path: Path, legs: list[tuple[int, int]], recipe: dict[str, Any]
) -> None:
    """Three steps on each leg: the same samples in the same order, and losses that differ by rounding alone."""
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    groups[2].run(run_loop, loop_config(2, 1, recipe), task, *new_run(tmp_path / "whole"))
    root, driver = new_run(tmp_path / "parts")
    for leg, (workers, stage) in enumerate(legs):
        stop = 3 if leg < len(legs) - 1 else None
        ends = groups[workers].run(run_loop, loop_config(workers, stage, recipe), task, root, driver, stop)
        assert {end.error for end in ends} == {""}
    assert losses(root) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert [record["samples"] for record in read(root / "metrics.jsonl")] == [12 * step for step in range(1, 10)]
    assert {record["global_batch"] for record in read(root / "metrics.jsonl")} == {12}
    told = list(read(root / "decisions.jsonl")) if (root / "decisions.jsonl").exists() else []
    changes = [(a[0], b[0]) for a, b in itertools.pairwise(legs) if a[0] != b[0]]
    assert [(d["kind"], d["reason"]) for d in told] == [
        ("refactor", f"{before} -> {after} workers: global batch kept") for before, after in changes
    ]


def test_16_bit_at_stage_0_says_what_to_do(groups: dict[int, GlooGroup], tmp_path: Path) -> None:
    root, driver = new_run(tmp_path / "run")
    config = loop_config(2, 1, ADAMW)
    config = config.model_copy(update={"layout": config.layout.model_copy(update={"precision": "bf16"})})
    groups[2].run(run_loop, config, TASK, root, driver, 2)
    config = loop_config(1, 0, ADAMW)
    config = config.model_copy(update={"layout": config.layout.model_copy(update={"precision": "bf16"})})
    (end,) = groups[1].run(run_loop, config, TASK, root, driver)
    assert end.message == (
        "ZeRO stage 0 in 16 bit takes up only what it saved itself: "
        "set layout.zero_stage=1, which one worker can use too"
    )
