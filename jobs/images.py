"""Image classification with a network of your choice: on the digits, CIFAR-10 and -100, or folders of images."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.image_models import NETWORKS
from jobs.parquet import are_written, write_whole
from jobs.vision import digits
from orchestrator.config import SGD, Cosine, EvaluationConfig, Fixed, LayoutConfig, Penalties, Recipe, Stop
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import Datasets, Job, Parquet

__all__ = ["ImageTask", "classify", "crop_and_flip", "mixed", "write_images"]

Network = Literal["cnn", "resnet18", "resnet34", "resnet50", "wrn16-4", "wrn28-10"]
COPIES = 10
"""Bytes that are held at once for each byte of the images: those in 8 and 32 bits, and what statistics take."""
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


# -- the run -----------------------------------------------------------------------------------


def classify(
    network: Network = "cnn",
    data: str = "data/images",
    source: str = "",
    side: int = 0,
    workers: int = 2,
    epochs: float = 6.0,
    batch: int = 64,
    mixup: float = 0.2,
    channels_last: bool | None = None,
) -> Job:
    """Return the job: the plain CNN, 288 thousand parameters, recognises 98 % and more of the held-out digits.

    The recipe is He et al.'s for CIFAR with a cosine in place of its steps: SGD with momentum 0.9 and rate 0.1 at
    batch 128, linear in the batch (Goyal et al. 2017), L2 5e-4, with label smoothing 0.1 and mixup.

    Args:
        network: cnn, resnet18, resnet34, resnet50, wrn16-4 or wrn28-10.
        data: Folder for ``train.parquet`` and ``test.parquet``, written unless they are there.
        source: CIFAR's archive (``cifar-10-python.tar.gz``, ``cifar-100-python.tar.gz``), or a folder with ``train``
            and ``val``, and in each a folder of images per class; empty reads scikit-learn's digits. All images of a
            folder are held in memory while they are written, and refused if that is too small: 30 side^2 bytes each, so
            1.5 GB a thousand at side=224. ImageNet is for ``orchestrator data pack`` and your own job that streams.
        side: Height and width that images of a folder are scaled to; needed for them alone.
        workers: Data-parallel workers.
        epochs: Passes over the training images; 200 are usual for CIFAR.
        batch: Reference batch; the learning rate is 0.1 per 128.
        mixup: Parameter of the Beta distribution that images are mixed by (arXiv:1710.09412); 0 mixes none.
        channels_last: Keep the channels of a pixel together in memory, or do not; without it the plan chooses.

    Raises:
        ConfigError: a size is impossible.
    """
    if mixup < 0 or batch < 1 or side < 0:
        raise ConfigError(f"mixup={mixup}, batch={batch}, side={side}: give none below 0, and a batch of at least 1")
    folder = str(Path(data).absolute())  # workers may run in another folder
    parent = digits(folder, workers, epochs, batch)
    recipe = Recipe(
        batch=batch,
        optimizer=SGD(learning_rate=0.1 * batch / 128, momentum=0.9, nesterov=True),
        schedule=Cosine(warmup=0.1),
        penalties=Penalties(l2=5e-4),
        stop=Stop(epochs=epochs),
    )
    config = parent.config.model_copy(
        update={
            "name": f"images-{network}",
            "recipe": recipe,
            "policy": Fixed(),
            "layout": LayoutConfig(zero_stage=1, channels_last="auto" if channels_last is None else channels_last),
            "evaluation": EvaluationConfig(every_epochs=max(epochs / 6, 0.5)),
        }
    )
    origin = str(Path(source).absolute()) if source else ""
    task = ImageTask(folder, network, mixup=mixup)
    return Job(config, task, prepare=functools.partial(write_images, folder, origin, side=side))


# -- the task ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """Recognise images: ``image`` [samples, channels, side, side] of 0..255 and ``label`` [samples]."""

    data: str
    """Absolute path of the folder that ``write_images`` wrote."""
    network: Network = "cnn"
    """Which network."""
    mixup: float = 0.2
    """Parameter of the Beta distribution that images are mixed by; 0 mixes none."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""

    def datasets(self) -> Datasets:
        """Return the two Parquet files."""
        return Datasets(*(Parquet(f"{self.data}/{name}.parquet") for name in ("train", "test")))

    def model(self) -> nn.Module:
        """Return a new network for the data's images."""
        about = _about(self.data)
        return NETWORKS[self.network](about["channels"], about["classes"], about["side"])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the smoothed cross-entropy, averaged over the micro batch; in training, of moved and mixed images."""
        images, label = self._images(batch), batch["label"].long()
        if not model.training:
            return F.cross_entropy(_logits(model, images), label, label_smoothing=self.label_smoothing)
        images = crop_and_flip(images, flip=bool(_about(self.data)["flip"]))
        images, order, share = mixed(images, self.mixup)
        logits = _logits(model, images)
        own, other = (
            F.cross_entropy(logits, target, label_smoothing=self.label_smoothing) for target in (label, label[order])
        )
        return share * own + (1 - share) * other

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return accuracy (0 or 1) and plain cross-entropy of each sample."""
        logits, label = _logits(model, self._images(batch)), batch["label"].long()
        return {
            "accuracy": (logits.argmax(dim=1) == label).float(),
            "loss": F.cross_entropy(logits, label, reduction="none"),
        }

    def _images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Scaled to mean 0 and deviation 1, by the training set's."""
        about = _about(self.data)
        mean, std = (torch.tensor(about[name], device=batch["image"].device).view(-1, 1, 1) for name in ("mean", "std"))
        return (batch["image"].float() / 255.0 - mean) / std


def crop_and_flip(images: Tensor, *, flip: bool) -> Tensor:
    """Return each of ``images`` [samples, channels, side, side] moved by up to an eighth, and mirrored or not.

    What comes in at the edges is the edge's mirror image. Drawn from torch's generator.
    """
    side = images.shape[-1]
    most = max(1, side // 8)
    padded = F.pad(images, (most,) * 4, mode="reflect")
    rows, columns = torch.randint(0, 2 * most + 1, (2, len(images), 1), device=images.device) + torch.arange(
        side, device=images.device
    )
    if flip:
        mirrored = torch.rand(len(images), 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved.contiguous()  # the order of memory is the plan's to choose


def mixed(images: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Return ``share * images + (1 - share) * images[order]``, ``order`` and ``share`` ~ Beta(alpha, alpha).

    One share for the micro batch, as in the authors' code (Zhang et al. 2018, arXiv:1710.09412).
    """
    if alpha == 0:
        return images, torch.arange(len(images), device=images.device), 1.0
    # From torch's generator, for Beta's own sampler would need a device's worth of set-up: a ratio of two Gammas.
    first, second = torch._standard_gamma(torch.full((2,), alpha)).tolist()  # noqa: SLF001 - what torch's Beta calls
    share = first / (first + second) if first + second > 0 else 1.0
    order = torch.randperm(len(images), device=images.device)
    return share * images + (1 - share) * images[order], order, share


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits.float()  # losses are taken in fp32, whatever the model computes in


@functools.lru_cache(maxsize=8)
def _about(folder: str) -> dict[str, Any]:
    """What the writer says of the images: channels, side, classes, mean and std of each channel, flip."""
    found: dict[str, Any] = json.loads(pq.read_schema(Path(folder) / "train.parquet").metadata[b"images"])
    return found


# -- the data ----------------------------------------------------------------------------------

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def write_images(folder: str, source: str = "", *, side: int = 0) -> None:
    """Write ``train.parquet`` and ``test.parquet`` of images [channels, side, side] and labels, unless they are there.

    Args:
        folder: Where to.
        source: As in ``classify``.
        side: Images of a folder are scaled, shorter edge first, and cut to it.

    Raises:
        DataError: no such source, or one of another form.
        OSError: the folder cannot be written.
    """
    made_of = {"source": source or "digits", "side": str(side)}
    files = [Path(folder) / name for name in ("train.parquet", "test.parquet")]
    if are_written(files, made_of):
        return
    train, test, flip = _read(source, side)
    pixels = train[0].astype(np.float32) / 255.0
    about = {
        "channels": int(pixels.shape[1]),
        "side": int(pixels.shape[2]),
        "classes": int(max(train[1].max(), test[1].max())) + 1,
        "mean": pixels.mean(axis=(0, 2, 3)).round(6).tolist(),
        "std": (pixels.std(axis=(0, 2, 3)) + 1e-6).round(6).tolist(),
        "flip": flip,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for (images, labels), path in zip((train, test), files, strict=True):
        table = pa.table({"image": _nested(images), "label": pa.array(labels.astype(np.int64))})
        described = table.replace_schema_metadata({**made_of, "images": json.dumps(about)})
        write_whole(described, path, row_group_size=1024)


def _read(source: str, side: int) -> tuple[Part, Part, bool]:
    """Training part, held-out part, and whether a mirrored image is still of its class."""
    path = Path(source)
    if not source:
        return (*_digits(), False)
    if not path.exists():
        raise DataError(f"source={source}: no such file or folder; correct it, or leave it out for the digits")
    if path.is_file():
        return (*_cifar(path), True)
    if side < 8:
        raise DataError(f"source={source}: images of a folder have different sizes: give side=224, at least 8 pixels")
    classes = sorted(entry.name for entry in (path / "train").glob("*") if entry.is_dir())
    if not classes or not (path / "val").is_dir():
        raise DataError(f"{source}: needs folders train and val, and in each a folder of images per class")
    _require_memory(path, classes, side)
    return _folder(path / "train", classes, side), _folder(path / "val", classes, side), True


def _require_memory(path: Path, classes: list[str], side: int) -> None:
    count = sum(1 for part in ("train", "val") for name in classes for _ in _image_files(path / part / name))
    needed, free = count * 3 * side**2 * COPIES, psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{path}: {count:,} images at side={side} need {needed:,} bytes of memory, and {free:,} are free; give a "
            f"smaller side, or pack each part with `orchestrator data pack {path}/train FOLDER` and stream it in a job "
            "of your own with Parquet(..., decode=...): docs/data.md"
        )


def _digits() -> tuple[Part, Part]:
    from sklearn.datasets import load_digits  # slow to import, and needed only once
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    kept, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    return (pixels[kept], labels[kept]), (pixels[held_out], labels[held_out])


class _ArraysOnly(pickle.Unpickler):
    """Reads CIFAR's pickles, which hold arrays, bytes and lists, and nothing that could run code."""

    ALLOWED = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            module = "numpy._core.multiarray"
        elif (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which images have no use for")
        return super().find_class(module, name)


def _cifar(path: Path) -> tuple[Part, Part]:
    """CIFAR-10 or -100 as their authors publish them for Python."""
    train, test = [], []
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda entry: entry.name):
                name = Path(member.name).name
                if not name.startswith(("data_batch", "test_batch")) and name not in ("train", "test"):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None
                found = _ArraysOnly(io.BytesIO(stream.read()), encoding="bytes").load()
                labels = np.asarray(found[b"labels"] if b"labels" in found else found[b"fine_labels"])
                part = np.asarray(found[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32), labels
                (test if name.startswith("test") else train).append(part)
    except (tarfile.TarError, pickle.UnpicklingError, KeyError, ValueError, EOFError, AssertionError) as error:
        raise DataError(f"{path}: is not CIFAR's archive for Python: {type(error).__name__}: {error}") from None
    if not train or not test:
        raise DataError(f"{path}: holds no CIFAR batches; give cifar-10-python.tar.gz or cifar-100-python.tar.gz")
    return _together(train), _together(test)


def _together(parts: list[Part]) -> Part:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _folder(root: Path, classes: list[str], side: int) -> Part:
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in _image_files(root / name):
            images.append(_image(path, side))
            labels.append(label)
    if not images:
        raise DataError(f"{root}: holds no images ({', '.join(SUFFIXES)})")
    return np.stack(images), np.asarray(labels)


def _image_files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.glob("*")) if path.suffix.lower() in SUFFIXES)


def _image(path: Path, side: int) -> NDArray[np.uint8]:
    """[3, side, side]: the shorter edge scaled to ``side``, and the middle of the longer one."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading images needs Pillow: pip install pillow") from None
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise DataError(f"{path}: is no image that can be read: {error}") from None
    scale = side / min(image.size)
    width, height = (max(side, round(edge * scale)) for edge in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def _nested(images: NDArray[np.uint8]) -> pa.Array:
    array: pa.Array = pa.array(np.ascontiguousarray(images).ravel())
    for length in reversed(images.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array
