"""The recommenders: data of known structure, the published formats, the models and the tasks, each by itself."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jobs import recommender_data
from jobs.recommender import (
    BINS,
    DLRM,
    ClickTask,
    RetrievalTask,
    TwoTower,
    area_under_curve,
    clicks,
    interact,
    retrieval,
)
from jobs.recommender_data import write_clicks, write_criteo, write_movielens, write_visits
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import Summarizing
from orchestrator.training.data import open_dataset


@pytest.fixture(scope="module")
def click_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clicks")
    write_clicks(str(path))
    return path


@pytest.fixture(scope="module")
def visit_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("visits")
    write_visits(str(path))
    return path


def head(task, count=200):
    dataset = open_dataset(task.datasets().evaluation)
    return {name: torch.as_tensor(column) for name, column in dataset.take(np.arange(count)).items()}


# -- made-up data ------------------------------------------------------------------------------


def test_clicks_are_drawn_from_the_probabilities_they_come_with(click_folder):
    table = pq.read_table(click_folder / "test.parquet")
    label, probability = (table[name].to_numpy() for name in ("label", "probability"))
    assert roc_auc_score(label, probability) == pytest.approx(0.892, abs=0.005)
    for low in np.arange(0.0, 1.0, 0.1):
        part = (probability >= low) & (probability < low + 0.1)
        error = 4 * np.sqrt(0.25 / part.sum())
        assert abs(label[part].mean() - probability[part].mean()) < error


def test_no_id_lies_outside_its_feature(click_folder):
    sizes = json.loads(pq.read_schema(click_folder / "train.parquet").metadata[b"sizes"])
    sparse = open_dataset(ClickTask(str(click_folder)).datasets().train).columns["sparse"]
    assert sparse.shape == (160_000, 6, 3)
    assert (sparse >= 0).all()
    assert (sparse.max(axis=(0, 2)) <= sizes["ids"]).all()
    assert (sparse[:, :, 0] > 0).all()


def test_visits_come_in_order_and_the_last_is_held_out(visit_folder):
    train, test = (pq.read_table(visit_folder / f"{n}.parquet").to_pandas() for n in ("train", "test"))
    assert sorted(test["user"]) == list(range(1, 3001))
    assert (train.groupby("user").size() == 23).all()
    own = train[train["user"] == 7]["item"].tolist()
    history = test[test["user"] == 7]["history"].iloc[0]
    assert [item for item in history if item] == own
    assert test[test["user"] == 7]["item"].iloc[0] not in own
    for index, row in enumerate(train[train["user"] == 7].itertuples()):
        assert [item for item in row.history if item] == own[:index]


def test_writing_again_changes_nothing_and_other_data_is_refused(click_folder):
    before = (click_folder / "train.parquet").stat().st_mtime_ns
    write_clicks(str(click_folder))
    assert (click_folder / "train.parquet").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="holds source=made-up clicks, not source=made-up visits"):
        write_visits(str(click_folder))


# -- Criteo and MovieLens ----------------------------------------------------------------------


def criteo_line(label, numbers, categories):
    return "\t".join([label, *numbers, *categories])


def test_criteos_format(tmp_path):
    numbers = ["1", "-2", "", *["3"] * 10]
    rows = [criteo_line(str(n % 2), numbers, ["68fd1e64", "", *["a"] * 24]) for n in range(14)]
    (tmp_path / "train.txt").write_text("\n".join(rows) + "\n")
    write_criteo(str(tmp_path / "out"), str(tmp_path / "train.txt"), buckets=50)
    train, test = (pq.read_table(tmp_path / "out" / f"{n}.parquet") for n in ("train", "test"))
    assert (train.num_rows, test.num_rows) == (12, 2)
    first = train.slice(0, 1).to_pydict()
    assert first["dense"][0] == pytest.approx([np.log(2), 0.0, 0.0, *[np.log(4)] * 10])
    assert first["sparse"][0] == [[1 + 0x68FD1E64 % 50], [0], *[[1 + 10]] * 24]
    task = ClickTask(str(tmp_path / "out"), dimension=4)
    model = task.model()
    assert model.table.num_embeddings == 1 + 26 * 50
    assert task.loss(model, head(task, 2)).isfinite()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1\t2", r"Expected 40 columns, got 2"),
        (criteo_line("x", ["1"] * 13, ["a"] * 26), r"conversion error to int8"),
        (criteo_line("7", ["1"] * 13, ["a"] * 26), r"the first column should be 0 or 1"),
        (criteo_line("1", ["1"] * 13, ["zz"] * 26), r"a category should be hexadecimal"),
    ],
)
def test_lines_of_another_form_are_refused(tmp_path, line, said):
    (tmp_path / "bad.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=said):
        write_criteo(str(tmp_path / "out"), str(tmp_path / "bad.txt"), buckets=50)


RATINGS = [(9, 50, 5.0, 30), (9, 60, 4.0, 10), (9, 70, 2.0, 20), (9, 80, 4.5, 40), (3, 60, 5.0, 2), (3, 50, 5.0, 1)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n" + "\n".join(",".join(map(str, r)) for r in RATINGS)),
        ("ratings.dat", "\n".join("::".join(map(str, r)) for r in RATINGS)),
        ("u.data", "\n".join("\t".join(map(str, r)) for r in RATINGS)),
    ],
)
def test_movielens_formats(tmp_path, name, text):
    (tmp_path / name).write_text(text + "\n")
    write_movielens(str(tmp_path / "out"), str(tmp_path / name))
    train, test = (pq.read_table(tmp_path / "out" / f"{n}.parquet").to_pydict() for n in ("train", "test"))
    # Films 50, 60, 80 become 1, 2, 3; user 3 has two liked films, too few to hold one out.
    assert (train["user"], train["item"]) == ([1, 1, 2, 2], [1, 2, 2, 1])
    assert (test["user"], test["item"]) == ([2], [3])
    assert [item for item in test["history"][0] if item] == [2, 1]


def test_a_missing_file_and_one_without_a_liked_film(tmp_path):
    with pytest.raises(DataError, match="no such file; correct the path"):
        write_movielens(str(tmp_path / "out"), str(tmp_path / "ratings.csv"))
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n")
    with pytest.raises(DataError, match="no film is rated 4 or more"):
        write_movielens(str(tmp_path / "out"), str(tmp_path / "u.data"))


# -- metrics -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, BINS - 1)), min_size=2, max_size=200))
def test_the_area_is_scikit_learns_on_binned_scores(samples):
    labels, scores = (np.asarray(column) for column in zip(*samples, strict=True))
    counts = [torch.as_tensor(np.bincount(scores[labels == kind], minlength=BINS)).double() for kind in (0, 1)]
    found = area_under_curve(*counts)
    if labels.all() or not labels.any():
        assert found == 0.5
    else:
        assert found == pytest.approx(roc_auc_score(labels, scores))


def test_metrics_of_clicks_over_a_set_are_those_of_its_parts(click_folder):
    task = ClickTask(str(click_folder))
    assert isinstance(task, Summarizing)
    torch.manual_seed(0)
    model, batch = task.model().eval(), head(task, 2000)
    with torch.no_grad():
        rows = task.metrics(model, batch)
        scores = model(batch["dense"].float(), batch["sparse"].long())
    halves = [{name: value[part].double() for name, value in rows.items()} for part in (slice(600), slice(600, None))]
    means = {name: sum(half[name].sum(dim=0) for half in halves) / 2000 for name in rows}
    found = task.summarize(means)
    assert found["auc"] == pytest.approx(roc_auc_score(batch["label"], scores), abs=2e-3)
    assert float(found["loss"]) == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(scores, batch["label"].float()).item(), rel=1e-5
    )
    assert float(found["calibration"]) == pytest.approx(scores.sigmoid().mean().item() / batch["label"].float().mean())


def test_always_guessing_the_share_has_entropy_and_calibration_1(click_folder):
    share = 0.3
    loss = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    histogram = torch.zeros(2, BINS, dtype=torch.float64)
    histogram[0, 300], histogram[1, 300] = 1 - share, share
    means = {"loss": torch.tensor(loss), "label": torch.tensor(share), "probability": torch.tensor(share)}
    found = ClickTask(str(click_folder)).summarize({**means, "histogram": histogram})
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"loss": loss, "auc": 0.5, "normalized_entropy": 1.0, "calibration": 1.0}, rel=1e-6
    )


# -- models ------------------------------------------------------------------------------------


def test_the_interaction_is_every_pairs_dot_product():
    vectors = torch.randn(5, 4, 3, dtype=torch.float64)
    direct = [
        [sum(a * b for a, b in zip(v[i], v[j], strict=True)) for i in range(4) for j in range(i)] for v in vectors
    ]
    torch.testing.assert_close(
        interact(vectors, torch.tril_indices(*[vectors.shape[1]] * 2, offset=-1)),
        torch.tensor(direct, dtype=torch.float64),
    )


def test_a_dlrm_against_its_definition():
    """Each feature's bag is the sum of its own table's rows, whatever slots are empty."""
    torch.manual_seed(0)
    model = DLRM(3, [5, 7], 4)
    dense, sparse = torch.randn(6, 3), torch.tensor([[[1, 2, 0], [7, 0, 0]], [[0, 0, 0], [3, 3, 1]]]).repeat(3, 1, 1)
    tables = model.table.weight[1:6], model.table.weight[6:13]
    bags = [
        torch.stack([sum((table[i - 1] for i in slots if i), torch.zeros(4)) for slots in sparse[:, feature]])
        for feature, table in enumerate(tables)
    ]
    numbers = model.bottom(dense)
    products = torch.stack([(bags[0] * numbers).sum(1), (bags[1] * numbers).sum(1), (bags[1] * bags[0]).sum(1)], dim=1)
    expected = model.top(torch.cat((numbers, products), dim=1)).squeeze(1)
    torch.testing.assert_close(model(dense, sparse), expected)


def test_the_number_of_parameters_is_recorded(click_folder, visit_folder):
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(ClickTask(str(click_folder)).model()) == 32_993
    assert count(RetrievalTask(str(visit_folder)).model()) == 69_829
    assert count(DLRM(13, [100] * 26, 8)) == 2601 * 8 + (13 * 64 + 64 + 64 * 8 + 8) + ((8 + 351) * 64 + 64 + 65)


def test_known_items_are_not_offered_and_the_rank_is_counted(visit_folder):
    task = RetrievalTask(str(visit_folder))
    model = task.model().eval()
    batch = head(task, 50)
    with torch.no_grad():
        found = task.metrics(model, batch)
        scores = model(batch["user"].long(), batch["history"].long())
    for row in range(50):
        known = set(batch["history"][row].tolist())
        own = scores[row, batch["item"][row] - 1]
        rank = 1 + sum(bool(s > own) for item, s in enumerate(scores[row], start=1) if item not in known)
        assert found["reciprocal_rank"][row] == pytest.approx(1 / rank)
        assert found["recall_at_10"][row] == (rank <= 10)


@pytest.mark.parametrize("kind", ["clicks", "visits"])
def test_every_parameter_gets_a_gradient_and_the_loss_is_a_mean(kind, click_folder, visit_folder):
    task = ClickTask(str(click_folder)) if kind == "clicks" else RetrievalTask(str(visit_folder))
    model, batch = task.model().train(), head(task)
    loss = task.loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    halves = [{name: column[part] for name, column in batch.items()} for part in (slice(100), slice(100, 200))]
    torch.testing.assert_close(sum(task.loss(model, half) for half in halves) / 2, loss)


def test_an_empty_history_is_a_vector_of_zeros():
    model = TwoTower(3, 4, 5)
    assert torch.equal(model.history(torch.zeros(2, 6, dtype=torch.long)), torch.zeros(2, 5))


# -- jobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [clicks(), retrieval()], ids=["clicks", "retrieval"])
def test_a_job_can_be_sent_to_a_worker(job):
    assert pickle.loads(pickle.dumps(job)).task == job.task
    assert Path(job.task.data).is_absolute()


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="dimension=0: give a number above 0"):
        clicks(dimension=0)
    with pytest.raises(ConfigError, match="epochs=-1: give a number above 0"):
        retrieval(epochs=-1)
    assert recommender_data.FEWEST > 1
