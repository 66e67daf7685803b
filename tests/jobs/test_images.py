"""Image networks against their published sizes, and the public sets' formats."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from jobs.image_models import NETWORKS, Bottleneck, WideBlock
from jobs.images import COPIES, ImageTask, classify, crop_and_flip, mixed, write_images
from orchestrator.errors import ConfigError, DataError, JobError
from orchestrator.job import load
from orchestrator.training.computing import in_channels_last
from orchestrator.training.data import open_dataset


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    write_images(str(path))
    return path


def head(folder: Path, count: int = 32) -> dict[str, torch.Tensor]:
    dataset = open_dataset(ImageTask(str(folder)).datasets().train)
    return {name: torch.as_tensor(column) for name, column in dataset.take(np.arange(count)).items()}


# -- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "classes", "side", "parameters"),
    [
        ("resnet18", 3, 1000, 224, 11_689_512),  # torchvision's tables
        ("resnet34", 3, 1000, 224, 21_797_672),
        ("resnet50", 3, 1000, 224, 25_557_032),
        ("wrn28-10", 3, 10, 32, 36_479_194),  # 36.5M in the paper's table 4
        ("wrn16-4", 3, 10, 32, 2_748_890),  # 2.7M in the paper's table 4
        ("cnn", 1, 10, 8, 288_170),
    ],
)
def test_the_number_of_parameters_is_the_published_one(name, channels, classes, side, parameters):
    with torch.device("meta"):
        model = NETWORKS[name](channels, classes, side)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet50", "wrn16-4"])
@pytest.mark.parametrize("side", [32, 65])
def test_a_network_answers_for_images_of_either_size(name, side):
    if name == "cnn" and side == 65:
        side = 64
    model = NETWORKS[name](3, 7, side).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, side, side)).shape == (2, 7)


def test_a_new_bottleneck_passes_its_input_on():
    x = torch.rand(2, 8, 4, 4)
    assert torch.equal(Bottleneck(8, 8)(x), x)


def test_a_wide_block_adds_its_branch_to_its_shortcut():
    block = WideBlock(4, 8, 2, 0.0).eval()
    x = torch.randn(2, 4, 6, 6)
    active = F.relu(block.norm(x))
    assert torch.equal(block(x), block.shortcut(active) + block.rest(block.first(active)))
    assert block(x).shape == (2, 8, 3, 3)


# -- augmentation ------------------------------------------------------------------------------


def test_a_mixture_is_between_its_two_and_so_is_its_target():
    torch.manual_seed(0)
    images = torch.randn(8, 1, 4, 4)
    shares = []
    for _ in range(200):
        found, order, share = mixed(images, 0.2)
        torch.testing.assert_close(found, share * images + (1 - share) * images[order])
        assert sorted(order.tolist()) == list(range(8))
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.12)
    assert np.mean([0.1 < s < 0.9 for s in shares]) < 0.5  # Beta(0.2, 0.2) sits at the ends
    assert mixed(images, 0.0)[0] is images


def test_images_are_moved_by_an_eighth_at_most_and_mirrored_only_where_asked():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(100, 1, 1, 1)
    padded = F.pad(images[:1], (1,) * 4, mode="reflect")
    moves = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    torch.manual_seed(0)
    for flip in (False, True):
        allowed = moves + [move.flip(3) for move in moves] if flip else moves
        moved = crop_and_flip(images, flip=flip)
        matches = torch.stack([(moved == move).all(dim=(1, 2, 3)) for move in allowed])
        assert matches.any(dim=0).all()
    torch.manual_seed(0)
    mirrored = crop_and_flip(images, flip=True)
    assert (mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, -1]).any()


# -- task --------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient(digits):
    task = ImageTask(str(digits))
    model = task.model().train()
    task.loss(model, head(digits)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_order_of_memory_goes_through_the_network(channels_last):
    model, formats = NETWORKS["resnet18"](3, 10, 32).eval(), []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, __, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    with torch.inference_mode():
        if channels_last:
            in_channels_last(model)
        model(crop_and_flip(torch.randn(2, 3, 32, 32), flip=True))
    assert formats == [channels_last] * 8


def test_layouts_of_memory_change_no_answer(digits):
    answers = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        task = ImageTask(str(digits))
        model = task.model().eval()
        if channels_last:
            in_channels_last(model)
        with torch.inference_mode():
            answers.append(task.metrics(model, head(digits))["loss"])
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


def test_images_have_mean_0_and_deviation_1(digits):
    task = ImageTask(str(digits))
    images = task._images(head(digits, 1437))
    assert abs(float(images.mean())) < 1e-3
    assert float(images.std()) == pytest.approx(1.0, abs=1e-3)


# -- data --------------------------------------------------------------------------------------


def cifar(path: Path, parts: dict[str, dict[bytes, object]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in parts.items():
            payload = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(f"cifar/{name}")
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return path


def test_cifars_archives(tmp_path):
    draw = np.random.default_rng(0)
    data = [draw.integers(0, 256, (4, 3072), dtype=np.uint8) for _ in range(3)]
    ten = {f"data_batch_{n}": {b"data": data[n - 1], b"labels": [n, 9, 0, 1]} for n in (1, 2)}
    archive = cifar(tmp_path / "ten.tar.gz", {**ten, "test_batch": {b"data": data[2], b"labels": [3, 2, 1, 0]}})
    write_images(str(tmp_path / "ten"), str(archive))
    datasets = ImageTask(str(tmp_path / "ten")).datasets()
    train, test = open_dataset(datasets.train), open_dataset(datasets.evaluation)
    assert np.array_equal(train.columns["image"], np.concatenate(data[:2]).reshape(-1, 3, 32, 32))
    assert train.columns["label"].tolist() == [1, 9, 0, 1, 2, 9, 0, 1]
    assert test.columns["label"].tolist() == [3, 2, 1, 0]
    hundred = {
        n: {b"data": data[0], b"fine_labels": [5, 6, 7, 99], b"coarse_labels": [0] * 4} for n in ("train", "test")
    }
    write_images(str(tmp_path / "hundred"), str(cifar(tmp_path / "hundred.tar.gz", hundred)))
    assert ImageTask(str(tmp_path / "hundred")).model().head.out_features == 100


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_an_archive_with_code_in_it_is_refused(tmp_path, capsys):
    archive = cifar(tmp_path / "evil.tar.gz", {"data_batch_1": {b"data": Evil(), b"labels": []}})
    with pytest.raises(DataError, match=r"print, which images have no use for"):
        write_images(str(tmp_path / "out"), str(archive))
    assert "run" not in capsys.readouterr().out


def test_folders_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for part, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (20, 10 + number), (100 * label, 50, 10)).save(folder / f"{number}.png")
    write_images(str(tmp_path / "out"), str(tmp_path), side=8)
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert table["label"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert np.asarray(table["image"][4].as_py())[:, 3, 3].tolist() == [100, 50, 10]
    with pytest.raises(DataError, match="images of a folder have different sizes: give side=224"):
        write_images(str(tmp_path / "other"), str(tmp_path))


def test_a_folder_that_memory_cannot_hold_is_refused_before_an_image_is_read(tmp_path, monkeypatch):
    for part, count in (("train", 3), ("val", 1)):
        folder = tmp_path / part / "cat"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").touch()  # empty: reading one would be an error of another kind
    memory = psutil.virtual_memory()._replace(available=4 * 3 * 224**2 * COPIES - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(DataError, match=r"4 images at side=224 need 6,021,120 bytes .*6,021,119 are free; .*data pack"):
        write_images(str(tmp_path / "out"), str(tmp_path), side=224)
    with pytest.raises(DataError, match=r"is no image that can be read|needs Pillow"):
        write_images(str(tmp_path / "out"), str(tmp_path), side=223)


def test_sources_that_are_none(tmp_path, digits):
    with pytest.raises(DataError, match="no such file or folder"):
        write_images(str(tmp_path / "out"), str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is not CIFAR's archive"):
        write_images(str(tmp_path / "out"), __file__)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="needs folders train and val"):
        write_images(str(tmp_path / "out"), str(tmp_path / "empty"), side=8)
    with pytest.raises(DataError, match="holds source=digits, side=0, not source="):
        write_images(str(digits), str(tmp_path / "empty"), side=8)


# -- job ---------------------------------------------------------------------------------------


def test_the_job_is_the_recipe_it_says():
    job = load("jobs.images:classify", ["network=resnet18", "batch=256"])
    assert job.config.name == "images-resnet18"
    assert job.config.recipe.optimizer.learning_rate == pytest.approx(0.2)
    assert job.config.recipe.penalties.l2 == 5e-4
    assert pickle.loads(pickle.dumps(job)).task == job.task


def test_impossible_arguments():
    with pytest.raises(JobError, match="--arg network='resnet19' should be 'cnn', 'resnet18'"):
        load("jobs.images:classify", ["network=resnet19"])
    with pytest.raises(ConfigError, match="mixup=-1"):
        classify(mixup=-1)
