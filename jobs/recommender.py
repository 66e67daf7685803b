"""Recommendation: a DLRM that predicts clicks, and two towers that retrieve the items a user takes next."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.recommender_data import write_clicks, write_criteo, write_movielens, write_visits
from orchestrator.config import (
    AdamW,
    Cosine,
    EvaluationConfig,
    LayoutConfig,
    Penalties,
    Recipe,
    RunConfig,
    ScaleConfig,
    Stop,
)
from orchestrator.errors import ConfigError
from orchestrator.job import Datasets, Job, Parquet

__all__ = [
    "DLRM",
    "ClickTask",
    "RetrievalTask",
    "TwoTower",
    "area_under_curve",
    "clicks",
    "interact",
    "retrieval",
]

BINS = 1000
"""Of predicted probability: what the area under the curve is computed from."""
RECALL_AT = (1, 10)
"""Items recommended, of which one should be the one taken."""


# -- the runs ----------------------------------------------------------------------------------


def clicks(
    data: str = "data/clicks",
    criteo: str = "",
    workers: int = 2,
    epochs: float = 1.0,
    batch: int = 128,
    dimension: int = 8,
    buckets: int = 100_000,
) -> Job:
    """Return the job: a DLRM whose area under the curve comes to 0.84 on made-up clicks that allow 0.89.

    The clicks are drawn from known probabilities (see ``write_clicks``), so the best possible value is known; logistic
    regression, which has no interactions, stays at 0.70. One pass is the recipe: in a second one the embeddings learn
    the samples by heart, as those of click models do (Zhang et al. 2022, arXiv:2209.06053).

    Args:
        data: Folder for ``train.parquet`` and ``test.parquet``, written unless they are there.
        criteo: A file in the format of Criteo's Display Advertising Challenge, in place of the made-up clicks.
        workers: Data-parallel workers.
        epochs: Passes over the training set.
        batch: Reference batch; the learning rate belongs to 128.
        dimension: Of each embedding.
        buckets: Of the hash for each of Criteo's categorical features.

    Raises:
        ConfigError: a size is impossible.
    """
    _at_least_one(epochs=epochs, batch=batch, dimension=dimension, buckets=buckets)
    folder = str(Path(data).absolute())  # workers may run in another folder
    write = functools.partial(write_clicks, folder)
    if criteo:
        write = functools.partial(write_criteo, folder, str(Path(criteo).absolute()), buckets=buckets)
    config = _config("clicks", batch=batch, learning_rate=8e-3, epochs=epochs, workers=workers, decay=0.1)
    return Job(config, ClickTask(folder, dimension), prepare=write)


def retrieval(
    data: str = "data/visits",
    movielens: str = "",
    workers: int = 2,
    epochs: float = 16.0,
    batch: int = 256,
    dimension: int = 16,
) -> Job:
    """Return the job: two towers that have the item taken next among their ten best of 500 for 48 % of the users.

    The made-up visits come from known preferences (see ``write_visits``), which themselves reach 57 %; the ten most
    popular items reach 3 %.

    Args:
        data: Folder for ``train.parquet`` and ``test.parquet``, written unless they are there.
        movielens: MovieLens' ``ratings.csv``, ``ratings.dat`` or ``u.data``, in place of the made-up visits.
        workers: Data-parallel workers.
        epochs: Passes over the training set.
        batch: Reference batch; the learning rate belongs to 256.
        dimension: Of each embedding and of what the towers return.

    Raises:
        ConfigError: a size is impossible.
    """
    _at_least_one(epochs=epochs, batch=batch, dimension=dimension)
    folder = str(Path(data).absolute())
    write = functools.partial(write_visits, folder)
    if movielens:
        write = functools.partial(write_movielens, folder, str(Path(movielens).absolute()))
    config = _config("retrieval", batch=batch, learning_rate=3e-3, epochs=epochs, workers=workers, decay=1e-3)
    return Job(config, RetrievalTask(folder, dimension), prepare=write)


def _config(name: str, *, batch: int, learning_rate: float, epochs: float, workers: int, decay: float) -> RunConfig:
    return RunConfig(
        name=name,
        recipe=Recipe(
            batch=batch,
            optimizer=AdamW(learning_rate=learning_rate),
            schedule=Cosine(warmup=0.05),
            penalties=Penalties(weight_decay=decay),
            stop=Stop(epochs=epochs),
        ),
        layout=LayoutConfig(zero_stage=1),
        scale=ScaleConfig(workers=workers),
        evaluation=EvaluationConfig(every_epochs=epochs / 5),
    )


def _at_least_one(**sizes: float) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise ConfigError(f"{name}={size}: give a number above 0")


# -- clicks ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClickTask:
    """Predict clicks: ``dense`` [samples, numbers], ``sparse`` [samples, features, slots], ``label`` [samples] of 0, 1.

    ``sparse`` holds ids that count from 1 within each feature; 0 is an empty slot of the feature's bag.
    """

    data: str
    """Absolute path of the folder that ``write_clicks`` or ``write_criteo`` wrote."""
    dimension: int = 8
    """Of each embedding."""

    def datasets(self) -> Datasets:
        """Return the two Parquet files."""
        columns = ("dense", "sparse", "label")
        return Datasets(*(Parquet(f"{self.data}/{name}.parquet", columns) for name in ("train", "test")))

    def model(self) -> nn.Module:
        """Return a new DLRM with a table for as many ids as the data has."""
        made_of = _metadata(self.data)
        return DLRM(made_of["numbers"], made_of["ids"], self.dimension)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log loss in nats, averaged over the micro batch."""
        logits = _click_logits(model, batch)
        return F.binary_cross_entropy_with_logits(logits, batch["label"].float())

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return log loss, label and probability of each sample, and its place in the histogram [2, bins]."""
        logits, label = _click_logits(model, batch), batch["label"].float()
        probability = logits.sigmoid()
        place = (probability * BINS).long().clamp(max=BINS - 1)
        both = torch.stack((1 - label, label), dim=1)
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, label, reduction="none"),
            "label": label,
            "probability": probability,
            "histogram": both[:, :, None] * F.one_hot(place, BINS)[:, None, :],
        }

    def summarize(self, means: Mapping[str, Tensor]) -> Mapping[str, float | Tensor]:
        """Return log loss, area under the curve, normalised entropy and calibration.

        Normalised entropy is the log loss over that of always predicting the share of clicks, and calibration the mean
        prediction over that share: both are 1 for that guess (He et al. 2014, "Practical Lessons from Predicting
        Clicks on Ads at Facebook", section 2).
        """
        share = float(means["label"])
        guess = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
        return {
            "loss": means["loss"],
            "auc": area_under_curve(*means["histogram"]),
            "normalized_entropy": means["loss"] / guess if guess else math.nan,
            "calibration": means["probability"] / share if share else math.nan,
        }


def area_under_curve(negatives: Tensor, positives: Tensor) -> float:
    """Return the chance that a positive scores above a negative, from their histograms [bins] of rising scores.

    That is Mann and Whitney's statistic, with pairs in one bin counted half: the value is exact up to half the share
    of pairs that fall into one bin. 0.5 where one of the two classes is empty.
    """
    pairs = negatives.sum() * positives.sum()
    if pairs == 0:
        return 0.5
    below = negatives.cumsum(0) - negatives / 2
    return float((positives * below).sum() / pairs)


def _click_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    # Losses are taken in fp32, whatever the model computes in.
    return cast("Tensor", model(batch["dense"].float(), batch["sparse"].long())).float()


class DLRM(nn.Module):
    """Deep learning recommendation model (Naumov et al. 2019, arXiv:1906.00091).

    A bottom MLP turns the numbers into one more vector beside the features' embeddings, all pairs of vectors meet in a
    dot product, and a top MLP reads the products and the bottom's vector. All features share one table in which each
    has rows of its own: one lookup for all, and one parameter for ZeRO to share out. Its gradient is dense, since
    DeepSpeed's stages 1 to 3 take no sparse ones.
    """

    def __init__(self, numbers: int, ids: Sequence[int], dimension: int, hidden: int = 64) -> None:
        super().__init__()
        vectors = len(ids) + 1
        first = torch.tensor([0, *ids]).cumsum(0)[:-1]
        self.register_buffer("first", first, persistent=False)
        # A constant of the model: computed in each call it would be an operator that ExecuTorch has not.
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, offset=-1), persistent=False)
        self.table = nn.EmbeddingBag(1 + sum(ids), dimension, mode="sum", padding_idx=0)
        nn.init.normal_(self.table.weight, std=1 / math.sqrt(dimension) / 4)
        with torch.no_grad():
            self.table.weight[0].zero_()
        self.bottom = mlp(numbers, hidden, dimension)
        self.top = mlp(dimension + vectors * (vectors - 1) // 2, hidden, 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Return logits [samples] of ``dense`` [samples, numbers] and ``sparse`` [samples, features, slots]."""
        rows = torch.where(sparse > 0, sparse + cast("Tensor", self.first)[:, None], 0)
        bags = self.table(rows.flatten(0, 1)).unflatten(0, (-1, sparse.shape[1]))
        numbers = self.bottom(dense.to(bags.dtype))
        products = interact(torch.cat((numbers[:, None], bags), dim=1), cast("Tensor", self.pairs))
        return cast("Tensor", self.top(torch.cat((numbers, products), dim=1))).squeeze(1)


def interact(vectors: Tensor, pairs: Tensor) -> Tensor:
    """Return the dot products of ``pairs`` [2, p] of ``vectors``: [samples, n, d] -> [samples, p]."""
    row, column = pairs
    return torch.bmm(vectors, vectors.transpose(1, 2))[:, row, column]


# -- retrieval ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """Retrieve the next item: ``user`` [samples], ``history`` [samples, slots] of earlier items, ``item`` [samples].

    Ids count from 1; 0 is an empty slot.
    """

    data: str
    """Absolute path of the folder that ``write_visits`` or ``write_movielens`` wrote."""
    dimension: int = 16
    """Of each embedding and of what the towers return."""

    def datasets(self) -> Datasets:
        """Return the two Parquet files."""
        columns = ("user", "history", "item")
        return Datasets(*(Parquet(f"{self.data}/{name}.parquet", columns) for name in ("train", "test")))

    def model(self) -> nn.Module:
        """Return two new towers for as many users and items as the data has."""
        made_of = _metadata(self.data)
        return TwoTower(made_of["users"], made_of["items"], self.dimension)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of the item among all items, averaged over the micro batch.

        Over all items, and not those of the micro batch: then a step is the same in every layout. With more than some
        ten thousand items the other way, with its correction (Yi et al. 2019, RecSys), would be the one to write.
        """
        return F.cross_entropy(_item_logits(model, batch), batch["item"].long() - 1)

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return cross-entropy, recall at 1 and 10 and reciprocal rank of each sample; known items are not offered."""
        logits, item = _item_logits(model, batch), batch["item"].long() - 1
        history = batch["history"].long()
        seen = F.pad(logits.new_zeros(logits.shape), (1, 0)).scatter(1, history, 1.0)[:, 1:] > 0
        offered = logits.masked_fill(seen, -torch.inf)
        own = logits.gather(1, item[:, None])
        rank = 1 + (offered > own).sum(dim=1)
        recalls = {f"recall_at_{count}": (rank <= count).float() for count in RECALL_AT}
        return {"loss": F.cross_entropy(logits, item, reduction="none"), "reciprocal_rank": 1.0 / rank, **recalls}


def _item_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return cast("Tensor", model(batch["user"].long(), batch["history"].long())).float()


class TwoTower(nn.Module):
    """A tower for users and one for items; what they return, of length 1, is compared by dot product.

    The user's tower reads an embedding of the user and the mean of the earlier items' embeddings (Covington et al.
    2016, "Deep Neural Networks for YouTube Recommendations"); the item's tower an embedding of the item.
    """

    TEMPERATURE = 0.1

    def __init__(self, users: int, items: int, dimension: int, hidden: int = 64) -> None:
        super().__init__()
        self.user = nn.Embedding(1 + users, dimension, padding_idx=0)
        self.history = nn.EmbeddingBag(1 + items, dimension, mode="mean", padding_idx=0)
        self.item = nn.Embedding(1 + items, dimension, padding_idx=0)
        self.popularity = nn.Embedding(1 + items, 1, padding_idx=0)
        for table in (self.user, self.history, self.item, self.popularity):
            nn.init.normal_(table.weight, std=0.1)
            with torch.no_grad():
                table.weight[0].zero_()
        self.user_tower = mlp(2 * dimension, hidden, dimension)
        self.item_tower = mlp(dimension, hidden, dimension)

    def forward(self, user: Tensor, history: Tensor) -> Tensor:
        """Return logits [samples, items] of every item after ``history`` [samples, slots] of ``user`` [samples]."""
        users = self.user_tower(torch.cat((self.user(user), self.history(history)), dim=1))
        every = torch.arange(1, self.item.num_embeddings, device=user.device)
        items = self.item_tower(self.item(every))
        likeness = F.normalize(users, dim=1) @ F.normalize(items, dim=1).T
        return likeness / self.TEMPERATURE + self.popularity(every).squeeze(1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return two linear layers with a ReLU between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _metadata(folder: str) -> dict[str, Any]:
    """What the writer says of the data: numbers and lists."""
    metadata = pq.read_schema(Path(folder) / "train.parquet").metadata or {}
    found: dict[str, Any] = json.loads(metadata[b"sizes"])
    return found
