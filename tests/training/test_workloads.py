"""The jobs under every ZeRO stage and policy: the same steps in each, on two workers, and they learn.

What each job reaches in the end its docstring says, measured in whole runs: minutes each. Here the same steps in every
stage, and a part of the way to that quality under the policy that changes the batch, stand for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gloo import GlooGroup
from gloo_jobs import Ended, new_run, run_loop
from jobs.images import classify
from jobs.language import gpt
from jobs.recommender import clicks, retrieval
from jobs.text_classifier import classify as classify_text
from jobs.vision import digits
from orchestrator.config import Fixed, Goodput, LayoutConfig, Stop
from orchestrator.job import Job

pytestmark = pytest.mark.slow
JOBS: dict[str, Callable[..., Job]] = {
    "clicks": clicks,
    "retrieval": retrieval,
    "images": classify,
    "text": classify_text,
    "gpt": functools.partial(gpt, vocabulary=256),  # with head and embedding in one
}
LEARNT = {
    "clicks": (60, "normalized_entropy", 0.97),
    "images": (60, "loss", 1.2),
    "text": (60, "loss", 2.0),
    "gpt": (100, "bits_per_byte", 4.2),
}
"""Steps, a metric, and what it has fallen to by then; two towers begin too slowly for so few to show anything."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workloads")


def trained(two: GlooGroup, job: Job, root: Path, *, stage: int, steps: int, goodput: bool = False) -> list[Ended]:
    recipe = job.config.recipe.model_copy(update={"stop": Stop(steps=steps)})
    config = job.config.model_copy(
        update={
            "recipe": recipe,
            "policy": Goodput(noise_interval_steps=2) if goodput else Fixed(),
            "layout": LayoutConfig(zero_stage=stage, precision="fp32"),
        }
    )
    assert job.prepare is not None
    job.prepare()
    return two.run(run_loop, config, job.task, *new_run(root))


@pytest.mark.parametrize("name", JOBS)
def test_every_stage_takes_the_same_steps(two: GlooGroup, folder: Path, tmp_path: Path, name: str) -> None:
    job = JOBS[name](data=str(folder / name))
    ends = [trained(two, job, tmp_path / f"stage-{stage}", stage=stage, steps=5)[0] for stage in range(4)]
    assert all(not end.error for end in ends)
    for end in ends[1:]:
        for weight, value in ends[0].weights.items():
            distance = float((end.weights[weight] - value).norm() / value.norm().clamp(min=1e-6))
            assert distance < 1e-3, weight  # Adam magnifies what is left of a gradient that is almost 0
        assert end.state is not None
        assert ends[0].state is not None
        assert end.state.evaluation == pytest.approx(ends[0].state.evaluation, rel=1e-3)


@pytest.mark.parametrize("name", JOBS)
def test_the_other_policy_trains_too(two: GlooGroup, folder: Path, tmp_path: Path, name: str) -> None:
    job = JOBS[name](data=str(folder / name))
    steps, metric, value = LEARNT.get(name, (30, "loss", 7.0))
    first, second = trained(two, job, tmp_path / "run", stage=1, steps=steps, goodput=True)
    assert not first.error
    assert first.state is not None
    assert first.state.history.window.blocks, "the noise of the gradient was measured"
    assert first.state.evaluation is not None
    assert first.state.evaluation[metric] < value
    assert all(torch.equal(value, second.weights[weight]) for weight, value in first.weights.items())


def test_bf16_in_stage_3_is_within_a_point_of_fp32(two: GlooGroup, folder: Path, tmp_path: Path) -> None:
    """The main job, whole."""
    job = digits(data=str(folder / "digits"))
    assert job.prepare is not None
    job.prepare()
    accuracy = {}
    for precision, stage in (("fp32", 1), ("bf16", 3)):
        layout = LayoutConfig(zero_stage=stage, precision=precision)
        config = job.config.model_copy(update={"policy": Fixed(), "layout": layout})
        ended, _ = two.run(run_loop, config, job.task, *new_run(tmp_path / precision))
        assert ended.reason, ended.message
        accuracy[precision] = ended.state.evaluation["accuracy"]
    assert accuracy["fp32"] >= 0.97
    assert accuracy["bf16"] >= accuracy["fp32"] - 0.01
