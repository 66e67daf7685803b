"""The gradient's noise as a step measures it: against autograd by hand, and against a problem whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gloo import GlooGroup
from gloo_jobs import Attention, Regression, Rows, Steep, Toy, measured_steps, mlp, tied, toy_config
from orchestrator.config import SGD, AdamW, Fixed, Penalties, RunConfig
from orchestrator.planning.layout import Layout
from orchestrator.scheduling.noise_scale import NoiseSample, NoiseScaleWindow
from orchestrator.training.data import Stream
from orchestrator.training.gradient_noise import GradientNorms
from orchestrator.training.state import StepStats

STAGES = [0, 1, 2, 3]
SHAPES = [(4, 1), (4, 2), (4, 4), (8, 4), (8, 1), (2, 3)]
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01}
slow = pytest.mark.slow


def squared_norm(task: Toy, model: nn.Module, positions: np.ndarray) -> float:
    """|gradient|^2 of the mean loss over samples, by autograd."""
    columns = task.train.take(positions)
    loss = F.cross_entropy(model(torch.as_tensor(columns["x"])), torch.as_tensor(columns["y"]))
    weights = [w for w in model.parameters() if w.requires_grad]
    return sum(float(g.double().square().sum()) for g in torch.autograd.grad(loss, weights))


def by_hand(config: RunConfig, task: Toy, layouts: Sequence[Layout]) -> list[NoiseSample]:
    """What each step should measure, on weights that do not move."""
    torch.manual_seed(config.seed)
    model, stream, cursor, samples = task.model(), Stream(len(task.train), config.seed), 0, []
    for layout in layouts:
        parts = [p for rank in range(layout.workers) for p in stream.micro_batches(cursor, layout, rank)]
        if len(parts) == 1:  # a single micro batch is taken in halves
            parts = [parts[0][: len(parts[0]) // 2], parts[0][len(parts[0]) // 2 :]]
        small_batch = len(parts) / sum(1 / len(p) for p in parts)
        samples.append(
            NoiseSample.from_norms(
                mean_small_sq=float(np.mean([squared_norm(task, model, p) for p in parts])),
                big_sq=squared_norm(task, model, stream.indices(cursor, layout.global_batch)),
                small_batch=small_batch,
                small_batches=layout.global_batch / small_batch,
            )
        )
        cursor += layout.global_batch
    return samples


def agree(steps: Sequence[StepStats], expected: Sequence[NoiseSample], rel: float) -> None:
    for step, sample in zip(steps, expected, strict=True):
        assert step.noise is not None
        assert step.noise.gradient_sq == pytest.approx(sample.gradient_sq, rel=rel, abs=rel * sample.noise_trace)
        assert step.noise.noise_trace == pytest.approx(sample.noise_trace, rel=rel)
        assert (step.noise.small_batch, step.noise.small_batches) == pytest.approx(
            (sample.small_batch, sample.small_batches)
        )
        assert step.noise_cost_s > 0


# -- against autograd --------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_measure_what_autograd_says(two: GlooGroup, stage: int, precision: str) -> None:
    """In every stage, precision and layout, also where the layout changes between two steps."""
    config = toy_config(layout={"zero_stage": stage, "precision": precision})
    layouts = [Layout(2, *shape) for shape in SHAPES]
    expected = by_hand(config, Toy(mlp), layouts)
    for steps in two.run(measured_steps, config, Toy(mlp), layouts, 0.0):
        agree(steps, expected, TOLERANCE[precision])


@slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("build", [Attention, tied])
def test_attention_and_shared_weights_are_measured_too(two: GlooGroup, build: type[nn.Module], stage: int) -> None:
    config = toy_config(layout={"zero_stage": stage})
    layouts = [Layout(2, 4, 2), Layout(2, 8, 1)]
    agree(two.run(measured_steps, config, Toy(build), layouts, 0.0)[0], by_hand(config, Toy(build), layouts), 1e-4)


@slow
@pytest.mark.parametrize("shape", [(8, 2), (8, 1), (16, 1), (7, 1), (2, 1)])
def test_a_single_worker_measures_halves_where_it_does_not_accumulate(one: GlooGroup, shape: tuple[int, int]) -> None:
    layouts = [Layout(1, *shape)] * 2
    config = toy_config(1, recipe={"batch": layouts[0].global_batch})
    agree(one.run(measured_steps, config, Toy(mlp), layouts, 0.0)[0], by_hand(config, Toy(mlp), layouts), 1e-4)


@slow
def test_a_single_sample_has_no_noise_to_show(one: GlooGroup) -> None:
    config = toy_config(1, recipe={"batch": 1})
    (step,) = one.run(measured_steps, config, Toy(mlp), [Layout(1, 1, 1)], 0.1)[0]
    assert step.noise is None


def weighed_by_hand(config: RunConfig, task: Toy, layouts: Sequence[Layout]) -> list[NoiseSample]:
    """The same with each tensor's gradient over the root of Adam's mean second moment, on weights that do not move."""
    optimizer = config.recipe.optimizer
    assert isinstance(optimizer, AdamW)
    torch.manual_seed(config.seed)
    model, stream, cursor, samples = task.model(), Stream(len(task.train), config.seed), 0, []
    weights = list(model.parameters())

    def gradients(positions: np.ndarray) -> list[Tensor]:
        columns = task.train.take(positions)
        loss = F.cross_entropy(model(torch.as_tensor(columns["x"])), torch.as_tensor(columns["y"]))
        return [gradient.double() for gradient in torch.autograd.grad(loss, weights)]

    moments = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for step, layout in enumerate(layouts):
        parts = [p for rank in range(layout.workers) for p in stream.micro_batches(cursor, layout, rank)]
        whole = gradients(stream.indices(cursor, layout.global_batch))
        if step:
            scales = [1 / ((m.mean() / (1 - optimizer.beta2**step)).sqrt() + optimizer.eps) ** 2 for m in moments]
            elements = sum(w.numel() for w in weights)
            mean = sum(scale * w.numel() for scale, w in zip(scales, weights, strict=True)) / elements

            def squares(tensors: Sequence[Tensor], scales: Sequence[Tensor] = scales, mean: Tensor = mean) -> float:
                return float(sum(s / mean * t.square().sum() for s, t in zip(scales, tensors, strict=True)))

            samples.append(
                NoiseSample.from_norms(
                    mean_small_sq=float(np.mean([squares(gradients(p)) for p in parts])),
                    big_sq=squares(whole),
                    small_batch=layout.micro_batch,
                    small_batches=layout.workers * layout.accumulation,
                )
            )
        norm = math.sqrt(sum(float(g.square().sum()) for g in whole))
        clip = min(1.0, (config.recipe.clip_norm or math.inf) / norm)
        seen = [
            clip * g + (config.recipe.penalties.l2 * w.detach().double() if w.ndim > 1 else 0.0)
            for g, w in zip(whole, weights, strict=True)
        ]
        moments = [optimizer.beta2 * m + (1 - optimizer.beta2) * g * g for m, g in zip(moments, seen, strict=True)]
        cursor += layout.global_batch
    return samples


@slow
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "fp16"), (3, "bf16")]
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_noise_as_adam_sees_it(two: GlooGroup, stage: int, precision: str, clip: float | None) -> None:
    """What is clipped and what penalties add goes into Adam's moments, and not into the noise that they weigh."""
    recipe = {"optimizer": AdamW(learning_rate=0.01), "clip_norm": clip, "penalties": Penalties(l2=0.3)}
    config = toy_config(
        recipe=recipe,
        layout={"zero_stage": stage, "precision": precision},
        policy=Fixed(noise_preconditioned=True),
    )
    layouts = [Layout(2, *shape) for shape in [(4, 1), (4, 2), (8, 1), (2, 3)]]
    expected = weighed_by_hand(config, Toy(mlp), layouts)
    for steps in two.run(measured_steps, config, Toy(mlp), layouts, 0.0):
        assert steps[0].noise is None, "Adam had no moments yet"
        agree(steps[1:], expected, TOLERANCE[precision])


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_measuring_changes_no_step(two: GlooGroup, stage: int) -> None:
    """Losses and norms of measured steps, and of those after them, are those of a run that never looks, to the bit."""
    config = toy_config(layout={"zero_stage": stage})
    layouts = [Layout(2, 4, 2)] * 6
    looked = two.run(measured_steps, config, Toy(mlp), layouts, 0.1, [index % 2 == 0 for index in range(6)])[0]
    never = two.run(measured_steps, config, Toy(mlp), layouts, 0.1, [False] * 6)[0]
    assert [(s.loss, s.grad_norm) for s in looked] == [(s.loss, s.grad_norm) for s in never]
    assert [s.noise is None for s in looked] == [False, True] * 3
    assert all(s.noise is None and s.noise_cost_s == 0.0 for s in never)


@slow
def test_a_step_that_overflows_is_no_measurement(two: GlooGroup) -> None:
    config = toy_config(layout={"zero_stage": 1, "precision": "fp16"})
    steps = two.run(measured_steps, config, Steep(mlp), [Layout(2, 8, 1)] * 14, 0.0)[0]
    assert not steps[0].applied, "the loss scale fits from the start"
    assert all(step.noise is None for step in steps if not step.applied)
    assert steps[-1].noise is not None


@slow
def test_a_step_that_changes_the_loss_scale_is_no_measurement(two: GlooGroup) -> None:
    config = toy_config(layout={"zero_stage": 1, "precision": "fp16"})
    steps = two.run(measured_steps, config, Toy(mlp), [Layout(2, 8, 1)] * 9, 0.0, None, 3)[0]
    dropped = [step.noise is None for step in steps if step.applied]
    assert any(dropped), "the loss scale never grew, or growing went unnoticed"
    assert not all(dropped)


# -- against a known truth ---------------------------------------------------------------------


@slow
@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("stage", STAGES)
def test_the_noise_scale_of_linear_regression(two: GlooGroup, stage: int, accumulation: int) -> None:
    """Within three of the standard errors that theory predicts (docs: formulas of the estimator)."""
    layout, steps = Layout(2, 32, accumulation), 160 if accumulation < 8 else 80
    recipe = {"batch": layout.global_batch, "optimizer": SGD(learning_rate=0.1, momentum=0.0)}
    config = toy_config(recipe=recipe, layout={"zero_stage": stage, "accumulation": accumulation})
    stats = two.run(measured_steps, config, Regression(), [layout] * steps, 0.0)[0]
    samples = [step.noise for step in stats if step.noise is not None]
    assert len(samples) == steps
    gradient_sq = float(np.mean([s.gradient_sq for s in samples]))
    trace = float(np.mean([s.noise_trace for s in samples]))
    error = relative_error(layout, steps)
    assert gradient_sq == pytest.approx(0.10981, rel=3 * error)
    assert trace == pytest.approx(45.377, rel=0.05)
    window = NoiseScaleWindow()
    for sample in samples:
        window = window.add(sample)
    estimate = window.estimate()
    assert estimate is not None
    assert 1 / estimate.value == pytest.approx(1 / Regression.NOISE_SCALE, rel=3 * error)
    assert estimate.low < Regression.NOISE_SCALE * (1 + 2 * error)
    assert estimate.high > Regression.NOISE_SCALE / (1 + 2 * error)


def relative_error(layout: Layout, steps: int) -> float:
    """Predicted relative standard error of the mean of |G|^2: sqrt((4 rho / x + 2 n / ((n-1) r_eff x^2)) / K)."""
    h, d = Regression.spectrum(), Regression.offset()
    gradient = h * d
    sigma = ((h * d * d).sum() + 1.0) * np.diag(h) + np.outer(gradient, gradient)
    trace = np.trace(sigma)
    rho = gradient @ sigma @ gradient / (gradient @ gradient * trace)
    r_eff = trace**2 / np.trace(sigma @ sigma)
    x = layout.global_batch / (trace / (gradient @ gradient))
    n = layout.workers * layout.accumulation
    return math.sqrt((4 * rho / x + 2 * n / ((n - 1) * r_eff * x * x)) / steps)


def test_the_experiment_is_the_one_described() -> None:
    h, d = Regression.spectrum(), Regression.offset()
    gradient = h * d
    trace = ((h * d * d).sum() + 1.0) * h.sum() + gradient @ gradient
    assert gradient @ gradient == pytest.approx(0.10981)
    assert trace == pytest.approx(45.377)
    assert trace / (gradient @ gradient) == pytest.approx(Regression.NOISE_SCALE, rel=1e-4)


# -- the hooks alone ---------------------------------------------------------------------------


def test_hooks_are_gone_after_the_step() -> None:
    model = mlp()
    norms = GradientNorms(model)
    with norms.hooked():
        model(torch.zeros(2, len(Rows.made_up(1).x[0]))).sum().backward()
        norms.take(1.0)
    before = norms.sums.clone()
    model(torch.ones(2, len(Rows.made_up(1).x[0]))).sum().backward()
    assert torch.equal(norms.sums, before)
    assert norms.micro_batches == 1


def test_a_sparse_gradient_counts_each_row_once() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    norms = GradientNorms(table)
    with norms.hooked():
        table(torch.tensor([1, 1, 4])).sum().backward()
        norms.take(1.0)
    assert float(norms.sums.sum()) == pytest.approx(3 * (2.0**2 + 1.0))


def test_a_gradient_that_comes_in_parts_is_not_taken_for_a_measurement() -> None:
    """Reentrant checkpointing of a shared layer runs a backward pass inside the backward pass."""
    weight = nn.Linear(3, 3, bias=False)
    norms = GradientNorms(weight)
    x = torch.ones(1, 3, requires_grad=True)

    def block(y: Tensor) -> Tensor:
        return weight(y)

    with norms.hooked():
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        torch.utils.checkpoint.checkpoint(block, y, use_reentrant=True).sum().backward()
        norms.take(1.0)
    assert math.isnan(float(norms.sums.sum()))
