"""Files that run without this project: they answer as torch does, and int8 costs what it may."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gloo_jobs import Rows
from jobs.language import GPT, Shape, TextTask, write_text
from jobs.recommender import DLRM, TwoTower
from orchestrator.compression.exporting import need, refusing, to_executorch, to_onnx, to_onnx_int8, to_torch
from orchestrator.compression.making import PATHS, Source, make, make_one, source_of
from orchestrator.compression.measuring import evaluate_model, largest_difference, model_inputs
from orchestrator.compression.quantizing import fake_quantized, quantized, without_fake_quantization
from orchestrator.compression.trained import load_trained
from orchestrator.errors import ExportError, JobError
from orchestrator.training.data import open_dataset


def without(*packages: str) -> pytest.MarkDecorator:
    """Skip where one of the packages is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install 'orchestrator[edge]'")


onnx = without("onnx", "onnxscript", "onnxruntime")
executorch = without("executorch")
torchao = without("torchao")


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A network with a convolution and a linear layer, and batches for it, the last of another size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    return model, [(torch.randn(n, 1, 8, 8),) for n in (6, 6, 1)]


@pytest.fixture(scope="session")
def source(digits_run: Path) -> Source:
    return source_of(load_trained(str(digits_run)), "digits")


# -- fp32 --------------------------------------------------------------------------------------


def test_torchs_own_file_answers_alike_for_any_number_of_samples(small, tmp_path):
    model, inputs = small
    assert largest_difference(to_torch(model, inputs, tmp_path / "m.pt2"), model, inputs) < 1e-6


@onnx
@pytest.mark.slow
def test_onnx_answers_alike_for_any_number_of_samples(small, tmp_path):
    model, inputs = small
    assert largest_difference(to_onnx(model, inputs, tmp_path / "m.onnx"), model, inputs) < 1e-5


@onnx
@executorch
@pytest.mark.slow
def test_a_gpt_in_onnx_and_executorch_agrees_with_torch(tmp_path):
    torch.manual_seed(0)
    model = GPT(Shape(width=32, layers=2, heads=4, kv_heads=2)).eval()
    inputs = [(torch.randint(0, 256, (3, 16)),) for _ in range(2)]
    for write, name in ((to_onnx, "m.onnx"), (to_executorch, "m.pte")):
        assert largest_difference(write(model, inputs, tmp_path / name), model, inputs) < 1e-4, name


@onnx
@executorch
@pytest.mark.slow
def test_digits_in_every_fp32_format_agree_within_1e_4(source, tmp_path):
    for entry in make(source, ["torch", "onnx", "executorch"], tmp_path):
        assert not entry.problem
        assert entry.difference < 1e-4, entry.path
        assert entry.metrics == pytest.approx(evaluate_model(source.task, source.model, source.held_out, batch=64))


def recommenders() -> list[tuple[nn.Module, list[tuple[Tensor, ...]]]]:
    """Both of the recommender's models, small, with empty slots in their bags; one has tables of width 1."""
    torch.manual_seed(0)
    clicks = DLRM(3, [5, 7, 4], 8, hidden=16).eval(), [(torch.randn(4, 3), torch.randint(0, 4, (4, 3, 2)))]
    bags = torch.randint(0, 9, (4, 5))
    bags[0] = 0
    return [clicks, (TwoTower(6, 9, 16, hidden=16).eval(), [(torch.randint(1, 6, (4,)), bags)])]


@executorch
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["dlrm", "two-tower"])
def test_recommenders_in_executorch_agree_with_torch(which, tmp_path):
    model, inputs = recommenders()[which]
    before = copy.deepcopy(model.state_dict())
    assert largest_difference(to_executorch(model, inputs, tmp_path / "m.pte"), model, inputs) < 1e-4
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


# -- int8 --------------------------------------------------------------------------------------


@onnx
@executorch
@pytest.mark.slow
@pytest.mark.parametrize("path", ["onnx-int8", "executorch-int8"])
def test_int8_digits_are_small_and_as_good(source, tmp_path, path):
    entry = make_one(source, path, tmp_path)
    fp32 = make_one(source, path.removesuffix("-int8"), tmp_path)
    weights = 4 * sum(p.numel() for p in source.model.parameters())
    # A network of half the width has as large a graph around a quarter of the weights: the file is not all weights.
    graph = fp32.size_bytes - weights
    assert entry.size_bytes - graph <= 0.30 * weights + 8192
    assert entry.metrics["accuracy"] >= fp32.metrics["accuracy"] - 0.005


@onnx
@pytest.mark.slow
def test_a_gpt_in_int8_is_small_and_as_good(tmp_path):
    """The job's own size, after it has read a little: what int8 weighs, and what it costs."""
    write_text(str(tmp_path))
    task = TextTask(str(tmp_path))
    train_set, held_out = (open_dataset(part) for part in (task.datasets().train, task.datasets().evaluation))
    torch.manual_seed(0)
    model = task.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(120):
        optimizer.zero_grad()
        rows = train_set.take(np.arange(16 * step, 16 * step + 16))
        task.loss(model, {name: torch.as_tensor(column) for name, column in rows.items()}).backward()
        optimizer.step()
    model.eval()
    batches = [train_set.take(np.arange(64 * n, 64 * n + 64))["text"] for n in range(4)]
    inputs = [(torch.as_tensor(rows)[:, :-1].long(),) for rows in batches]
    whole = to_onnx(model, inputs, tmp_path / "fp32.onnx")
    small = to_onnx_int8(tmp_path / "fp32.onnx", inputs, tmp_path / "int8.onnx")
    before, after = (evaluate_model(task, each, held_out, batch=64) for each in (whole, small))
    assert before["accuracy"] > 0.2
    assert after["accuracy"] >= before["accuracy"] - 0.005
    assert (tmp_path / "int8.onnx").stat().st_size <= 0.30 * (tmp_path / "fp32.onnx").stat().st_size


@onnx
@pytest.mark.slow
def test_int8_needs_samples(small, tmp_path):
    model, inputs = small
    to_onnx(model, inputs, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="int8 needs samples to calibrate on"):
        to_onnx_int8(tmp_path / "m.onnx", [], tmp_path / "q.onnx")


@torchao
@pytest.mark.parametrize("method", ["int8-weight-only", "int8-dynamic", "int4-weight-only"])
def test_torchao_rounds_a_gpt_and_leaves_the_original(method):
    torch.manual_seed(0)
    model = GPT(Shape(width=64, layers=2, heads=4, kv_heads=2)).eval()
    before, tokens = copy.deepcopy(model.state_dict()), torch.randint(0, 256, (4, 24))
    small = quantized(model, method)
    with torch.inference_mode():
        expected, found = model(tokens), small(tokens)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < (0.2 if method == "int4-weight-only" else 0.03)


@torchao
@pytest.mark.parametrize("method", ["int8-weight-only", "int8-dynamic", "int4-weight-only"])
def test_torchao_rounds_recommenders_too(method):
    for model, inputs in recommenders():
        assert 0 < largest_difference(quantized(model, method), model, inputs) < 0.2


@torchao
def test_layers_of_width_1_stay_as_they_are():
    layers = nn.ModuleList([nn.Linear(1, 4), nn.Linear(4, 4), nn.Embedding(10, 1), nn.Embedding(10, 4)])
    aware = fake_quantized(copy.deepcopy(layers))
    assert [type(new) is type(old) for new, old in zip(aware, layers, strict=True)] == [True, False, True, False]


@torchao
def test_training_aware_of_int8_rounds_learns_and_ends_in_ordinary_layers():
    torch.manual_seed(0)
    model = GPT(Shape(width=32, layers=1, heads=4, kv_heads=2)).train()
    names, tokens = list(model.state_dict()), torch.randint(0, 256, (4, 24))
    expected = model(tokens).detach()
    aware = fake_quantized(model)
    assert list(aware.state_dict()) == names
    assert 0 < float((aware(tokens).detach() - expected).norm() / expected.norm()) < 0.05
    aware(tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in aware.parameters())
    weights = {name: value.clone() for name, value in aware.state_dict().items()}
    ordinary = without_fake_quantization(aware)
    assert {type(m).__module__.split(".")[0] for m in ordinary.modules() if isinstance(m, nn.Linear)} == {"torch"}
    assert all(torch.equal(value, ordinary.state_dict()[name]) for name, value in weights.items())
    torch.testing.assert_close(ordinary(tokens), expected)


# -- what is refused ---------------------------------------------------------------------------


class Branching(nn.Module):
    """Takes another way for another sum: no graph holds both."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_captured_says_why(tmp_path):
    with pytest.raises(ExportError, match=r"Branching cannot be exported: .*data-dependent"):
        to_torch(Branching(), [(torch.ones(2, 3),)], tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


class Unknown(nn.Module):
    """Uses what ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@onnx
@pytest.mark.slow
def test_an_operator_that_onnx_has_not_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"Unknown cannot be written as ONNX: .*bessel_j0"):
        to_onnx(Unknown(), [(torch.ones(2, 3),)], tmp_path / "m.onnx")


class Task:
    """Its only metric is the mean of what a model returns."""

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": model(batch["x"]).mean(dim=1)}


@executorch
@pytest.mark.slow
def test_an_operator_that_executorch_has_not_is_named(tmp_path):
    largest = nn.EmbeddingBag(9, 4, mode="max")
    with pytest.raises(
        ExportError, match=r"EmbeddingBag cannot be lowered to ExecuTorch: .*no operator .*embedding_bag"
    ):
        to_executorch(largest, [(torch.randint(0, 9, (2, 3)),)], tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_path_does_not_end_the_others(tmp_path):
    inputs = [(torch.randn(4, 8),)]
    source = Source("branching", Task(), Branching(), Rows.made_up(4), inputs, inputs)  # type: ignore[arg-type]
    (entry,) = make(source, ["torch"], tmp_path)
    assert "Branching cannot be exported" in entry.problem
    assert entry.latency is None


def test_whatever_a_back_end_raises_is_a_row_of_one_line(tmp_path, monkeypatch):
    def broken(source: Source, file: Path) -> nn.Module:
        with refusing("it cannot be written"):
            raise RuntimeError("shape is invalid\n  and so on")

    def written_alone(source: Source, file: Path) -> nn.Module:
        file.write_bytes(b"x")
        return nn.Flatten(0)  # gives back what has no second dimension to take a mean over

    ways = {"broken": (".b", broken), "silent": (".s", written_alone), "torch": PATHS["torch"]}
    monkeypatch.setattr("orchestrator.compression.making.PATHS", ways)
    model, inputs = nn.Linear(8, 3), [(torch.randn(4, 8),)]
    entries = make(Source("x", Task(), model, Rows.made_up(4), inputs, inputs), list(ways), tmp_path)  # type: ignore[arg-type]
    assert entries[0].problem == "it cannot be written: RuntimeError: shape is invalid"
    assert entries[1].problem.startswith("x-silent.s was written and does not run: IndexError: ")
    assert not entries[2].problem


@pytest.mark.slow
def test_an_unknown_way_is_answered_with_the_valid_ones(source, tmp_path):
    with pytest.raises(ExportError, match=r"'onxx' is no way to write a model; did you mean 'onnx'\? valid: "):
        make_one(source, "onxx", tmp_path)
    assert set(PATHS) >= {"torch", "onnx", "executorch", "onnx-int8", "executorch-int8"}


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ExportError, match=r"onnx needs onnx, onnxscript, onnxruntime: pip install"):
        need("onnx")


def test_a_task_that_calls_its_model_twice_is_refused():
    class Twice:
        def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {"loss": (model(batch["x"]) + model(batch["x"])).mean(dim=1)}

    with pytest.raises(JobError, match=r"Twice\.metrics calls its model 2 times a batch"):
        model_inputs(Twice(), nn.Linear(8, 3), Rows.made_up(4), batch=2)  # type: ignore[arg-type]


def test_inputs_are_those_of_the_set_in_order():
    class Once:
        def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {"loss": model(batch["x"]).mean(dim=1)}

    rows = Rows.made_up(5)
    found = model_inputs(Once(), nn.Linear(8, 3), rows, batch=2)  # type: ignore[arg-type]
    assert [len(args[0]) for args in found] == [2, 2, 1]
    assert np.array_equal(torch.cat([args[0] for args in found]).numpy(), rows.x)
