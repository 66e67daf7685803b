"""The digits: the data, the models and the tasks, each by itself."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from jobs.vision import (
    MEAN,
    STD,
    BasicBlock,
    DigitsTask,
    Mlp,
    MlpTask,
    ResNet,
    digits,
    mlp,
    pixels,
    shift,
    write_digits,
)
from orchestrator.config import AdamW, Cosine
from orchestrator.job import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    write_digits(str(path))
    return path


@pytest.fixture(scope="module")
def batch(folder):
    table = pq.read_table(folder / "test.parquet").slice(0, 50)
    images = np.stack(table["image"].to_numpy())
    return {"image": torch.from_numpy(images), "label": torch.from_numpy(table["label"].to_numpy().copy())}


def rows(table: pa.Table) -> list[tuple[int, ...]]:
    pairs = zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
    return [(*image, label) for image, label in pairs]


# -- the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("train", 1437), ("test", 360)])
def test_the_files_hold_what_they_should(folder, name, count):
    file = pq.ParquetFile(folder / f"{name}.parquet")
    assert file.metadata.num_rows == count
    assert file.schema_arrow.field("image").type == pa.list_(pa.uint8(), 64)
    assert file.schema_arrow.field("label").type == pa.int64()
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert sizes == [256] * (count // 256) + [count % 256]


def test_together_they_are_scikit_learns_set(folder):
    written = rows(pq.read_table(folder / "train.parquet")) + rows(pq.read_table(folder / "test.parquet"))
    images, labels = load_digits(return_X_y=True)
    original = [(*map(int, image), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(written) == sorted(original)


def test_the_held_out_fifth_keeps_the_shares_of_the_classes(folder):
    train, test = (pq.read_table(folder / f"{n}.parquet")["label"].to_numpy() for n in ("train", "test"))
    assert np.abs(np.bincount(test) - np.bincount(train) / 1437 * 360).max() < 1
    assert not np.array_equal(test, np.sort(test))


def test_writing_again_changes_nothing_and_leaves_nothing(folder, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(before) == {"train.parquet", "test.parquet"}
    write_digits(str(folder))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    write_digits(str(tmp_path / "deep" / "er"))
    for name in before:
        assert (tmp_path / "deep" / "er" / name).read_bytes() == (folder / name).read_bytes()


def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def full(table, path, **options):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_digits(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_half_a_data_set_is_completed(folder, tmp_path):
    (tmp_path / "train.parquet").write_bytes((folder / "train.parquet").read_bytes())
    write_digits(str(tmp_path))
    assert pq.read_table(tmp_path / "test.parquet").num_rows == 360


# -- images ------------------------------------------------------------------------------------


def test_pixels_have_mean_0_and_deviation_1(folder):
    images = np.stack(pq.read_table(folder / "train.parquet")["image"].to_numpy())
    values = pixels(torch.from_numpy(images))
    assert values.shape == (1437, 1, 8, 8)
    assert abs(values.mean().item()) < 0.01
    assert values.std().item() == pytest.approx(1.0, abs=0.01)
    assert values[0, 0, 2, 3] == pytest.approx((images[0, 2 * 8 + 3] / 16 - MEAN) / STD)


def test_a_shift_moves_each_image_by_at_most_a_pixel():
    images = pixels(torch.randint(0, 17, (200, 64), dtype=torch.uint8))
    black = -MEAN / STD
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=black)
    moves = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    torch.manual_seed(0)
    moved = shift(images)
    matches = torch.stack([(moved == move).all(dim=(1, 2, 3)) for move in moves])
    assert matches.any(dim=0).all()
    assert matches.any(dim=1).all()  # among 200 each of the nine moves occurs
    torch.manual_seed(0)
    assert torch.equal(shift(images), moved)


# -- models ------------------------------------------------------------------------------------


def test_a_new_block_passes_its_input_on():
    x = torch.rand(4, 6, 8, 8)
    assert torch.equal(BasicBlock(6, 6)(x), x)


def test_a_block_adds_its_branch_to_its_shortcut():
    block = BasicBlock(3, 6, stride=2).eval()
    torch.nn.init.normal_(block.branch[-1].weight)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(block(x), torch.relu(block.shortcut(x) + block.branch(x)))
    assert block(x).shape == (4, 6, 4, 4)
    assert not torch.equal(block(x), torch.relu(block.branch(x)))


@pytest.mark.parametrize(
    ("model", "parameters"), [(ResNet(32), 308_074), (ResNet(8), 19_810), (Mlp(64), 8_970)], ids=["32", "8", "mlp"]
)
def test_the_number_of_parameters_is_recorded(model, parameters):
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("task", [DigitsTask("", width=8), MlpTask("", width=16, augment=False)])
def test_every_parameter_gets_a_gradient(task, batch):
    model = task.model().train()
    for module in model.modules():
        if isinstance(module, BasicBlock):
            torch.nn.init.ones_(module.branch[-1].weight)  # a zero gamma hides the branch from the first gradient
    loss = task.loss(model, batch)
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_new_model_guesses(batch):
    task = DigitsTask("")
    torch.manual_seed(0)
    loss = task.loss(task.model().train(), batch)
    assert loss.item() == pytest.approx(math.log(10), rel=0.5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", [DigitsTask("", width=8), MlpTask("", width=16)])
def test_a_model_takes_images_in_its_own_precision(kind, task, batch):
    model = task.model().to(kind).train()
    loss = task.loss(model, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == kind for p in model.parameters())


# -- tasks -------------------------------------------------------------------------------------


def test_metrics_are_per_sample(batch):
    task = DigitsTask("", width=8)
    model = task.model().eval()
    with torch.no_grad():
        metrics = task.metrics(model, batch)
        logits = model(pixels(batch["image"]))
    assert {name: value.shape for name, value in metrics.items()} == {"accuracy": (50,), "loss": (50,)}
    expected = -torch.log_softmax(logits, 1)[torch.arange(50), batch["label"]]
    torch.testing.assert_close(metrics["loss"], expected)
    assert torch.equal(metrics["accuracy"], (logits.argmax(1) == batch["label"]).float())


def test_the_loss_is_a_mean_over_samples(batch):
    task = MlpTask("", width=16, augment=False)
    model = task.model().train()
    halves = [{name: column[part] for name, column in batch.items()} for part in (slice(0, 25), slice(25, 50))]
    mean = sum(task.loss(model, half) for half in halves) / 2
    torch.testing.assert_close(task.loss(model, batch), mean)


def test_only_training_augments(batch):
    task = DigitsTask("", width=8)
    model = task.model().eval()
    assert task.loss(model, batch) == task.loss(model, batch)
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.0
    assert task.loss(model, batch) != task.loss(model, batch)


def test_the_mlp_draws_nothing(batch):
    task = mlp().task
    model = task.model().train()
    state = torch.get_rng_state()
    assert task.loss(model, batch) == task.loss(model, batch)
    assert torch.equal(torch.get_rng_state(), state)


# -- jobs --------------------------------------------------------------------------------------


def test_the_job_is_the_recipe_it_says():
    config = digits().config
    assert (config.name, config.scale.workers, config.layout.zero_stage) == ("digits", 2, 1)
    assert config.recipe.batch == 64
    assert config.recipe.optimizer == AdamW(learning_rate=6e-3)
    assert config.recipe.schedule == Cosine(warmup=0.1)
    assert config.evaluation.every_epochs == 2.0


def test_the_mlp_is_the_same_job_but_for_name_and_task():
    parent, child = digits("x", 3, 2.0, 32), mlp("x", 3, 2.0, 32)
    assert child.config == parent.config.model_copy(update={"name": "digits-mlp"})
    assert isinstance(child.task, MlpTask)
    assert child.task.data == parent.task.data


def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load("jobs.vision:digits", ["data=here", "width=8", "epochs=1"])
    monkeypatch.chdir("/")
    assert job.prepare is not None
    job.prepare()
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"train.parquet", "test.parquet"}
    datasets = job.task.datasets()
    assert datasets.train.uri == str(tmp_path / "here" / "train.parquet")
    assert datasets.evaluation.uri == str(tmp_path / "here" / "test.parquet")


@pytest.mark.parametrize("job", [digits(), mlp()], ids=["digits", "mlp"])
def test_a_job_can_be_sent_to_a_worker(job):
    assert pickle.loads(pickle.dumps(job)).task == job.task
