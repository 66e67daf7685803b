"""The text classifier: its data, and that it learns to tell texts apart."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.text_classifier import PACKAGES, ClassifierTask, classify, write_labelled_text
from orchestrator.errors import ConfigError, DataError
from orchestrator.training.data import open_dataset


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two classes whose bytes differ, ten files each."""
    root = tmp_path_factory.mktemp("own")
    draw = np.random.default_rng(0)
    for name, letters in (("first", b"abcdefgh"), ("second", b"efghijkl")):
        (root / name).mkdir()
        for number in range(10):
            (root / name / f"{name}-{number}.txt").write_bytes(bytes(draw.choice(list(letters), 500).tolist()))
    write_labelled_text(str(root / ".out"), str(root), context=32)
    return root


def test_rows_are_of_the_class_of_their_file_and_files_are_whole(own):
    train, test = (pq.read_table(own / ".out" / f"{n}.parquet") for n in ("train", "test"))
    assert json.loads(train.schema.metadata[b"classes"]) == ["first", "second"]
    assert train.num_rows + test.num_rows == 20 * (500 // 32)
    for table in (train, test):
        assert table.num_rows % (500 // 32) == 0
        for text, label in zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True):
            assert set(text) <= set(b"efghijkl" if label else b"abcdefgh")


@pytest.mark.slow
def test_it_learns(own):
    task = ClassifierTask(str(own / ".out"))
    torch.manual_seed(0)
    model, data = task.model().train(), open_dataset(task.datasets().train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = {name: torch.as_tensor(column) for name, column in data.take(np.arange(len(data))).items()}
    for _ in range(25):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    held_out = open_dataset(task.datasets().evaluation)
    rows = {name: torch.as_tensor(column) for name, column in held_out.take(np.arange(len(held_out))).items()}
    with torch.inference_mode():
        assert task.metrics(model.eval(), rows)["accuracy"].mean() > 0.95


def test_the_standard_library_has_all_packages(tmp_path):
    write_labelled_text(str(tmp_path))
    train, test = (pq.read_table(tmp_path / f"{n}.parquet") for n in ("train", "test"))
    assert set(train["label"].to_pylist()) == set(test["label"].to_pylist()) == set(range(len(PACKAGES)))
    assert train.num_rows > 3 * test.num_rows > 1000


def test_what_is_refused(tmp_path, own):
    with pytest.raises(ConfigError, match="context=3: give at least 8 bytes"):
        classify(context=3)
    with pytest.raises(DataError, match="no such folder"):
        write_labelled_text(str(tmp_path / "out"), str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="needs two classes"):
        write_labelled_text(str(tmp_path / "out"), str(own / "first"))
    with pytest.raises(DataError, match="holds text="):
        write_labelled_text(str(own / ".out"))


def test_the_job_can_be_sent_to_a_worker():
    job = classify()
    assert pickle.loads(pickle.dumps(job)).task == job.task
