"""Runs that make a trained model smaller: their configs, their tasks, and how good they become."""

from __future__ import annotations

import dataclasses
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jobs.vision import digits
from orchestrator.compression import variants
from orchestrator.compression.measuring import evaluate_model
from orchestrator.compression.pruning import plain
from orchestrator.compression.trained import load_trained
from orchestrator.compression.variants import (
    Distilled,
    Pruned,
    distilled,
    pruned,
    quantization_aware,
    shown_name,
    softened_distance,
)
from orchestrator.config import Fixed
from orchestrator.errors import ConfigError, ExportError, JobError
from orchestrator.job import Job, Summarizing, load
from orchestrator.training.checkpoint import list_checkpoints
from orchestrator.training.data import open_dataset
from trained_runs import sparsity_of, train

VARIANTS = "orchestrator.compression.variants"


def accuracy(root: Path) -> float:
    trained = load_trained(str(root))
    held_out = open_dataset(trained.task.datasets().evaluation)  # type: ignore[arg-type]
    return evaluate_model(trained.task, trained.model, held_out, batch=120)["accuracy"]


# -- configs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_variant_is_the_run_under_another_name_at_a_fixed_batch(digits_run: Path) -> None:
    job = load(f"{VARIANTS}:pruned", [f"run={digits_run}", "sparsity=0.75", "epochs=3"])
    origin = load_trained(str(digits_run)).config
    assert re.fullmatch(r"digits-pruned-75-[0-9a-f]{6}", job.config.name)
    assert shown_name(job.config.name) == "digits-pruned-75"
    assert job.config.recipe.optimizer == origin.recipe.optimizer
    assert job.config.recipe.stop.epochs == 3
    assert job.config.policy == Fixed()
    assert job.config.layout == origin.layout
    assert isinstance(job.task, Pruned)
    assert job.task.passes == 3 * 1437 // 64 // 2
    assert pickle.loads(pickle.dumps(job.task)) == job.task


@pytest.mark.slow
def test_another_request_or_checkpoint_is_another_run_and_the_same_is_found_again(
    digits_run: Path, tmp_path: Path
) -> None:
    def name(variant: str, *args: str, run: Path = digits_run) -> str:
        return load(f"{VARIANTS}:{variant}", [f"run={run}", *args]).config.name

    requests = [
        ("pruned", "sparsity=0.5"),
        ("pruned", "sparsity=0.5", "epochs=2"),
        ("pruned", "sparsity=0.5", "pattern=2:4"),
        ("distilled", "student=width=8"),
        ("distilled", "student=width=4"),
        ("distilled", "student=width=8", "temperature=3"),
    ]
    names = [name(*request) for request in requests]
    assert [name(*request) for request in requests] == names
    assert len(set(names)) == len(requests)
    assert shown_name(names[2]) == "digits-pruned-2-4"
    again = Path(shutil.copytree(digits_run, tmp_path / "again"))
    assert name("pruned", "sparsity=0.5", run=again) == names[0]
    manifest = list_checkpoints(again / "checkpoints")[-1] / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # as good as another one: its content is what counts
    assert name("pruned", "sparsity=0.5", run=again) != names[0]


@pytest.mark.slow
def test_what_a_task_adds_its_variant_has_too(digits_run: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Adding:
        def summarize(self, means: dict[str, float]) -> dict[str, float]:
            return {"twice": 2 * means["once"]}

    task = Pruned(Adding(), str(digits_run))  # type: ignore[arg-type]
    assert isinstance(task, Summarizing)
    assert task.summarize({"once": 2.0}) == {"twice": 4.0}  # type: ignore[dict-item]
    job = load(f"{VARIANTS}:quantization_aware", [f"run={digits_run}"])
    assert not isinstance(job.task, Summarizing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "error", "said"),
    [
        ("pruned", ["sparsity=1.5"], ExportError, "sparsity=1.5: should lie between 0 and 1"),
        ("pruned", ["pattern=random"], JobError, "should be 'global', '2:4' or 'channels'"),
        ("pruned", ["epochs=-1"], ConfigError, "epochs=-1: give a number above 0"),
        ("distilled", ["student=widht=8"], JobError, "unknown --arg 'widht'; did you mean 'width'"),
        ("distilled", ["student=width=8", "share=2"], ConfigError, "give a share of 0 to 1"),
    ],
)
def test_impossible_variants(digits_run: Path, name: str, args: list[str], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        load(f"{VARIANTS}:{name}", [f"run={digits_run}", *args])


@pytest.mark.slow
def test_a_teacher_of_another_task_is_refused(digits_run: Path, data: Path) -> None:
    from orchestrator.compression.variants import _prepared

    @dataclasses.dataclass(frozen=True)
    class Other(type(digits().task)):  # type: ignore[misc]
        def model(self) -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12))

    small = Job(digits().config, Other(str(data)))
    with pytest.raises(ConfigError, match=r"cannot teach this student: it answers \[1, 10\] where .* \[1, 12\]"):
        _prepared(small, Distilled(small.task, str(digits_run)))


# -- distance ----------------------------------------------------------------------------------


@given(st.floats(0.5, 10.0))
def test_the_distance_is_the_formula_and_0_for_the_same_answer(temperature: float) -> None:
    answer, wanted = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (F.softmax(x / temperature, dim=1) for x in (wanted, answer))
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(dim=1).mean()
    torch.testing.assert_close(softened_distance(answer, wanted, temperature), by_hand)
    assert softened_distance(answer, answer, temperature).abs() < 1e-12


def test_a_single_logit_is_one_of_two_classes() -> None:
    answer, wanted = torch.randn(6), torch.randn(6)
    pairs = [torch.stack((torch.zeros(6), x), dim=1) for x in (answer, wanted)]
    torch.testing.assert_close(softened_distance(answer, wanted, 2.0), softened_distance(pairs[0], pairs[1], 2.0))


def test_a_model_that_takes_its_loss_itself_is_taught_by_what_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the GPT does."""
    teacher, base = (load("jobs.language:gpt", [f"width={width}", "layers=1"]).task for width in (32, 16))
    torch.manual_seed(0)
    large, small = teacher.model(), base.model()
    monkeypatch.setattr(variants, "_teacher", lambda *_: large.requires_grad_(requires_grad=False))
    batch = {"text": torch.randint(0, 256, (3, 65), dtype=torch.uint8)}
    seen = batch["text"].long()[:, :-1]
    own, distance = base.loss(small, batch), softened_distance(small(seen), large(seen), 2.0)
    taught = Distilled(base, "", temperature=2.0, share=0.7).loss(small, batch)
    torch.testing.assert_close(taught, 0.3 * own + 0.7 * distance)
    gradients = [torch.autograd.grad(each, list(small.parameters())) for each in (taught, 0.3 * own + 0.7 * distance)]
    torch.testing.assert_close(*gradients)


# -- how good they become ----------------------------------------------------------------------


@pytest.mark.slow
def test_four_of_five_weights_can_go(digits_run: Path, tmp_path: Path) -> None:
    args = {"run": str(digits_run), "sparsity": 0.8, "epochs": 8.0}
    job = pruned(**args)
    root = train(tmp_path / "pruned", job, f"{VARIANTS}:pruned", [f"{k}={v}" for k, v in args.items()])
    assert sparsity_of(plain(load_trained(str(root)).model)) == pytest.approx(0.8, abs=0.005)
    assert accuracy(root) >= accuracy(digits_run) - 0.01


@pytest.mark.slow
def test_pruning_is_the_same_on_two_workers_in_stage_3(digits_run: Path, tmp_path: Path) -> None:
    args = {"run": str(digits_run), "sparsity": 0.5, "epochs": 1.0}
    names = [f"{k}={v}" for k, v in args.items()]
    roots = [
        train(tmp_path / f"stage-{stage}", pruned(**args), f"{VARIANTS}:pruned", names, workers=2, zero_stage=stage)
        for stage in (1, 3)
    ]
    first, second = (plain(load_trained(str(root)).model) for root in roots)
    assert sparsity_of(first) == sparsity_of(second) == pytest.approx(0.5, abs=0.01)
    for name, weight in first.named_parameters():
        assert torch.allclose(weight, dict(second.named_parameters())[name], atol=1e-4), name


@pytest.mark.slow
def test_training_aware_of_int8_goes_on_from_the_trained_model(digits_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'orchestrator[edge]'")
    args = {"run": str(digits_run), "epochs": 1.0}
    job = quantization_aware(**args)
    root = train(tmp_path / "aware", job, f"{VARIANTS}:quantization_aware", [f"{k}={v}" for k, v in args.items()])
    assert accuracy(root) >= accuracy(digits_run) - 0.01


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(digits_run: Path, tmp_path: Path) -> None:
    job = distilled(str(digits_run), ("width=8",), epochs=8.0)
    names = [f"run={digits_run}", "student=width=8", "epochs=8"]
    root = train(tmp_path / "student", job, f"{VARIANTS}:distilled", names)
    student, teacher = (load_trained(str(r)).model for r in (root, digits_run))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    assert sizes[0] < 0.27 * sizes[1]
    assert accuracy(root) > 0.9
