"""Evaluation split over the ranks is the plain mean over the set: each sample counts once, on whichever rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gloo import GlooGroup
from gloo_jobs import (
    Measuring,
    Rows,
    Toy,
    blocks,
    evaluate_new,
    evaluation_error,
    mlp,
    new_run,
    run_loop,
    toy_config,
)
from orchestrator.config import Stop

pytestmark = pytest.mark.slow


def by_hand(task: Toy) -> dict[str, float]:
    """The mean over all samples at once, on one process."""
    assert task.evaluation is not None
    torch.manual_seed(0)
    model = task.model().eval()
    with torch.no_grad():
        values = task.metrics(model, {"x": torch.as_tensor(task.evaluation.x), "y": torch.as_tensor(task.evaluation.y)})
    return {name: float(value.double().mean()) for name, value in values.items()}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("samples", "batch"), [(24, 4), (7, 2), (23, 5), (3, 8), (2, 1), (1, 4)])
def test_two_ranks_find_the_plain_mean(two: GlooGroup, samples: int, batch: int, stage: int) -> None:
    """Sets that divide and sets that do not, and one with fewer samples than ranks."""
    task = Toy(mlp, evaluation=Rows.made_up(samples, seed=1))
    first, second = two.run(evaluate_new, toy_config(2, layout={"zero_stage": stage}), task, batch)
    assert first == second
    assert first == pytest.approx(by_hand(task), rel=1e-6)


def test_one_rank_finds_it_too(one: GlooGroup) -> None:
    task = Toy(mlp, evaluation=Rows.made_up(7, seed=1))
    (found,) = one.run(evaluate_new, toy_config(1, layout={"zero_stage": 0}), task, 3)
    assert found == pytest.approx(by_hand(task), rel=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_batch_norm_is_evaluated_with_the_mean_of_all_ranks_statistics(
    two: GlooGroup, tmp_path: Path, stage: int
) -> None:
    rows = Rows.made_up(21, seed=1)
    config = toy_config(2, recipe={"stop": Stop(steps=4)}, layout={"zero_stage": stage})
    ends = two.run(run_loop, config, Toy(blocks, evaluation=rows), *new_run(tmp_path / "run"))
    first, second = (end.buffers for end in ends)
    assert not torch.equal(first["1.0.norm.running_mean"], second["1.0.norm.running_mean"])
    model = blocks()
    mean = {name: (first[name] + second[name]) / 2 for name in first if first[name].is_floating_point()}
    model.load_state_dict({**ends[0].weights, **mean}, strict=False)
    assert [end.state.evaluation["loss"] for end in ends] == pytest.approx([loss_by_hand(model, rows)] * 2, rel=1e-6)


def loss_by_hand(model: nn.Module, rows: Rows) -> float:
    with torch.no_grad():
        return F.cross_entropy(model.eval()(torch.as_tensor(rows.x)), torch.as_tensor(rows.y)).item()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_near(two: GlooGroup, stage: int) -> None:
    task = Toy(mlp, evaluation=Rows.made_up(21, seed=1))
    config = toy_config(2, layout={"zero_stage": stage, "precision": "bf16"})
    found = two.run(evaluate_new, config, task, 4)[0]
    assert found["loss"] == pytest.approx(by_hand(task)["loss"], rel=0.01)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "Task.metrics returned nothing; return at least one metric, such as {'loss': ...}"),
        (
            {"loss": torch.zeros(())},
            "Task.metrics['loss'] has shape () for 4 samples; return one value per sample",
        ),
        (
            {"loss": torch.zeros(4, 1)},
            "Task.metrics['loss'] has shape (4, 1) for 4 samples; return one value per sample",
        ),
    ],
    ids=["nothing", "a-mean", "a-column"],
)
def test_metrics_of_the_wrong_shape(one: GlooGroup, answer: Mapping[str, Tensor], message: str) -> None:
    task = Measuring(mlp, evaluation=Rows.made_up(4), answer=answer)
    assert one.run(evaluation_error, toy_config(1), task) == [message]
