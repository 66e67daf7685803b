"""Text as tokens: byte pairs that give the text back, the same each time, and lists of tokens of one's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.language import Shape, TokenTask, gpt, write_tokens
from jobs.tokens import train_encoder
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import Summarizing, load
from orchestrator.training.data import open_dataset
from orchestrator.training.evaluation import MetricSums

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'orchestrator[text]'")

TEXTS = [f"def f{n}(value):\n    return value + {n}  # größer\n".encode() * 3 for n in range(40)]


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "own" / f"{number}.py").write_bytes(text)
    return tmp_path / "own"


def tokens_of(path: Path) -> list[int]:
    """Undo the cutting: the last token of a row is the first of the next."""
    rows = np.stack(pq.read_table(path)["text"].to_numpy())
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    return [*rows[:, :-1].ravel().tolist(), int(rows[-1, -1])]


# -- byte pairs --------------------------------------------------------------------------------


def test_what_is_encoded_can_be_read_again():
    encoder = train_encoder(TEXTS, 300)
    texts = [*TEXTS[:3], "漢字 and \t tabs\r\n, never seen".encode()]
    tokens = encoder.encode(texts)
    assert [encoder.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == encoder.document))[1:]] == [
        "\0" + text.decode() for text in texts
    ]


def test_every_token_knows_its_bytes():
    encoder = train_encoder(TEXTS, 300)
    tokens = encoder.encode(TEXTS)
    assert encoder.widths[tokens].sum() == sum(len(text) + 1 for text in TEXTS)
    assert len(encoder.widths) == 300
    assert sorted(encoder.widths)[:256] == [1] * 256
    assert len(tokens) < 0.7 * sum(map(len, TEXTS))


def test_the_same_text_gives_the_same_tokens_in_any_order(tmp_path):
    for name, texts in {"a": TEXTS, "b": TEXTS[::-1]}.items():
        train_encoder(texts, 300).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_rows_are_packed_and_say_their_bytes(own, tmp_path):
    data = tmp_path / "data"
    write_tokens(str(data), str(own), context=16, tokens="bpe", vocabulary=280)
    assert {path.name for path in data.iterdir()} == {"train.parquet", "test.parquet", "tokenizer.json"}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    text = tokenizer.decode(tokens_of(data / "train.parquet"))
    documents = {"\0" + document.decode() for document in TEXTS}
    assert text[0] == "\0"
    assert {"\0" + part for part in text.split("\0")[1:-1]} < documents
    for name in ("train", "test"):
        table = pq.read_table(data / f"{name}.parquet")
        for row, width in zip(table["text"].to_pylist(), table["bytes"].to_pylist(), strict=True):
            assert width == sum(len(tokenizer.id_to_token(token)) for token in row[1:])


def test_writing_again_changes_nothing_and_another_vocabulary_is_refused(own, tmp_path):
    data = str(tmp_path / "data")
    write_tokens(data, str(own), context=16, tokens="bpe", vocabulary=280)
    before = {path.name: path.stat().st_mtime_ns for path in Path(data).iterdir()}
    write_tokens(data, str(own), context=16, tokens="bpe", vocabulary=280)
    assert {path.name: path.stat().st_mtime_ns for path in Path(data).iterdir()} == before
    with pytest.raises(DataError, match=r"vocabulary=280, not .*vocabulary=300"):
        write_tokens(data, str(own), context=16, tokens="bpe", vocabulary=300)


# -- quality -----------------------------------------------------------------------------------


def test_bits_per_byte_are_all_bits_over_all_bytes(own, tmp_path):
    data = tmp_path / "data"
    write_tokens(str(data), str(own), context=16, tokens="bpe", vocabulary=280)
    task = TokenTask(str(data), Shape(16, 1, 2, 2, 280), 16)
    assert isinstance(task, Summarizing)
    torch.manual_seed(0)
    model, dataset = task.model().eval(), open_dataset(task.datasets().train)
    columns = {name: torch.as_tensor(column) for name, column in dataset.take(np.arange(len(dataset))).items()}
    sums = MetricSums(task)
    with torch.no_grad():
        for half in (slice(0, 5), slice(5, None)):
            part = {name: column[half] for name, column in columns.items()}
            sums.add(task.metrics(model, part), len(part["text"]))
        rows = columns["text"].long()
        chances = model(rows[:, :-1]).log_softmax(dim=2).gather(2, rows[:, 1:, None])
    found = sums.metrics(len(dataset))
    assert found["bits_per_byte"] == pytest.approx(
        float(-chances.sum()) / math.log(2) / float(columns["bytes"].sum()), rel=1e-5
    )
    assert found["bits_per_token"] == pytest.approx(found["loss"] / math.log(2))
    assert set(found) == {"loss", "accuracy", "bits_per_token", "bits_per_byte"}


# -- tokens of one's own -----------------------------------------------------------------------


def written(path: Path, documents: list[list[int]], kind: pa.DataType | None = None) -> str:
    pq.write_table(pa.table({"tokens": pa.array(documents, kind or pa.list_(pa.uint16()))}), path)
    return str(path)


def test_documents_of_tokens_are_packed_and_some_held_out(tmp_path):
    documents = [[n] * (20 + n) for n in range(1, 30)]
    text = written(tmp_path / "own.parquet", documents)
    write_tokens(str(tmp_path / "data"), text, context=8, tokens="parquet", vocabulary=256)
    train, test = (tokens_of(tmp_path / "data" / f"{name}.parquet") for name in ("train", "test"))
    assert not set(train) & set(test)
    assert pq.read_schema(tmp_path / "data" / "train.parquet").names == ["text"]
    assert "bits_per_byte" not in TokenTask("").summarize({"loss": torch.tensor(1.0), "accuracy": torch.tensor(0.5)})


def test_a_single_document_is_cut_between_tokens(tmp_path):
    text = written(tmp_path / "own.parquet", [list(range(1000))])
    write_tokens(str(tmp_path / "data"), text, context=8, tokens="parquet", vocabulary=1000)
    train, test = (tokens_of(tmp_path / "data" / f"{name}.parquet") for name in ("train", "test"))
    assert train == list(range(len(train)))
    assert test == list(range(950, 950 + len(test)))


@pytest.mark.parametrize(
    ("documents", "kind", "said"),
    [
        ([[1, 300]], None, "holds tokens from 1 to 300, and vocabulary=256: give vocabulary=301"),
        ([[1, -1]], pa.list_(pa.int32()), "no negative token"),
        (["text"], pa.string(), "no column tokens with a list of whole numbers"),
        ([[]], None, "holds no tokens"),
        ([[1, 2, 3]], None, "too short for one row of 8 tokens"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused(tmp_path, documents, kind, said):
    text = written(tmp_path / "own.parquet", documents, kind)
    with pytest.raises(DataError, match=said):
        write_tokens(str(tmp_path / "data"), text, context=8, tokens="parquet", vocabulary=256)
    assert not (tmp_path / "data").exists()


# -- the job -----------------------------------------------------------------------------------


def test_the_job_reads_tokens(own, tmp_path):
    job = load(
        "jobs.language:gpt",
        [f"data={tmp_path / 'data'}", f"text={own}", "tokens=bpe", "vocabulary=280", "context=16", "width=16"],
    )
    assert job.prepare is not None
    job.prepare()
    assert isinstance(job.task, TokenTask)
    dataset = open_dataset(job.task.datasets().train)
    batch = {name: torch.as_tensor(column) for name, column in dataset.take(np.arange(4)).items()}
    model = job.task.model()
    assert model.head.weight.shape == (280, 16)
    assert model.head.weight is not model.embedding.weight
    assert job.task.loss(model, batch).item() == pytest.approx(math.log(280), abs=0.1)
    assert gpt(tokens="bpe").task.shape.vocabulary == 1024


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tokens=parquet"], "give text=FILE.parquet and vocabulary=N"),
        (["tokens=bpe", "vocabulary=100"], "give at least 256"),
    ],
)
def test_impossible_arguments(args, said):
    with pytest.raises(ConfigError, match=said):
        load("jobs.language:gpt", args)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'orchestrator\[text\]', or tokens=bytes"):
        gpt(tokens="bpe")
