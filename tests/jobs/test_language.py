"""The language model: the text, the parts of the model and the task, each by itself."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import language
from jobs.language import (
    GPT,
    MAX_BYTES,
    Attention,
    Block,
    Shape,
    SwiGLU,
    TextTask,
    gpt,
    rotate,
    rotations,
    write_text,
)
from orchestrator.config import AdamW, Cosine
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import load

SMALL = Shape(width=16, layers=2, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    write_text(str(path))
    return path


@pytest.fixture
def own(tmp_path):
    """Thirty files, each of a letter of its own, as a user might have them."""
    texts = tmp_path / "own"
    (texts / "deep").mkdir(parents=True)
    for number in range(30):
        name = f"deep/{number}.txt" if number % 2 else f"{number}.md"
        (texts / name).write_bytes(bytes([ord("A") + number]) * (50 + number))
    return texts


@pytest.fixture(scope="module")
def batch():
    return {"text": torch.randint(0, 256, (6, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))}


def rows(path: Path) -> np.ndarray:
    column = pq.read_table(path)["text"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def text_of(path: Path) -> bytes:
    """Undo the cutting: the last byte of a row is the first of the next."""
    table = rows(path)
    assert np.array_equal(table[1:, 0], table[:-1, -1])
    return table[:, :-1].tobytes() + table[-1:, -1].tobytes()


# -- the data ----------------------------------------------------------------------------------


def test_the_library_is_a_few_megabytes_in_rows_of_65(folder):
    assert {path.name for path in folder.iterdir()} == {"train.parquet", "test.parquet"}
    train, test = rows(folder / "train.parquet"), rows(folder / "test.parquet")
    assert train.dtype == np.uint8
    assert train.shape[1] == test.shape[1] == 65
    assert 0.9 * MAX_BYTES < train.shape[0] * 64 < MAX_BYTES
    assert test.shape[0] == 512


def test_no_file_of_the_library_is_in_both(folder):
    train, held_out = language._split(language._documents(""))
    assert not set(train) & set(held_out)
    assert len(train) > 5 * len(held_out) > 20
    assert text_of(folder / "train.parquet") in b"".join(b"\0" + document for document in train)
    stream = b"".join(b"\0" + document for document in held_out)
    assert all(row.tobytes() in stream for row in rows(folder / "test.parquet"))


def test_rows_rebuild_the_text_and_no_file_is_in_both(own, tmp_path):
    write_text(str(tmp_path / "data"), str(own), context=7)
    train, test = (text_of(tmp_path / "data" / f"{name}.parquet") for name in ("train", "test"))
    trained_on, held_out = (set(text.split(b"\0")[1:]) for text in (train, test))
    originals = {path.read_bytes() for path in own.rglob("*.*")}
    last = {train.rpartition(b"\0")[2], test.rpartition(b"\0")[2]}  # what does not fill a row is left out
    assert all(any(original.startswith(end) and len(original) - len(end) < 7 for original in originals) for end in last)
    assert len(trained_on) + len(held_out) == 30
    assert (trained_on | held_out) - last == originals - {o for o in originals if any(o[:1] == end[:1] for end in last)}
    assert not {document[:1] for document in trained_on} & {document[:1] for document in held_out}
    assert 0 < len(test) <= len(train) / 19


def test_copies_binaries_and_hidden_files_do_not_count(own, tmp_path):
    write_text(str(tmp_path / "before"), str(own), context=7)
    (own / "copy.txt").write_bytes((own / "0.md").read_bytes())
    (own / "picture.png").write_bytes(b"PNG\0" * 100)
    (own / "empty.txt").write_bytes(b" \n")
    (own / ".git").mkdir()
    (own / ".git" / "HEAD").write_text("ref: refs/heads/main" * 9)
    write_text(str(tmp_path / "after"), str(own), context=7)
    for name in ("train.parquet", "test.parquet"):
        assert np.array_equal(rows(tmp_path / "before" / name), rows(tmp_path / "after" / name))


def test_a_single_file_is_cut_without_overlap(tmp_path):
    text = b"".join(b"%d " % number for number in range(2000))
    (tmp_path / "one.txt").write_bytes(text)
    write_text(str(tmp_path / "data"), str(tmp_path / "one.txt"), context=8)
    train, test = (text_of(tmp_path / "data" / f"{name}.parquet")[1:] for name in ("train", "test"))
    cut = len(text) - len(text) // 20
    assert text[:cut].startswith(train)
    assert text[cut:].startswith(test)
    assert cut - len(train) < 8
    assert len(text) - cut - len(test) < 8


def test_two_files_are_one_each(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"a" * 900)
    (tmp_path / "short.txt").write_bytes(b"b" * 300)
    write_text(str(tmp_path / "data"), str(tmp_path), context=8)
    assert set(text_of(tmp_path / "data" / "train.parquet")) == set(b"\0a")
    assert set(text_of(tmp_path / "data" / "test.parquet")) == set(b"\0b")


def test_writing_again_changes_nothing_and_reads_no_text(own, tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_text(str(data), str(own), context=7)
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    monkeypatch.setattr(language, "_documents", None)
    write_text(str(data), str(own), context=7)
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == before


def test_half_a_data_set_is_completed(own, tmp_path):
    data = tmp_path / "data"
    write_text(str(data), str(own), context=7)
    whole = rows(data / "test.parquet")
    (data / "test.parquet").unlink()
    write_text(str(data), str(own), context=7)
    assert np.array_equal(rows(data / "test.parquet"), whole)


@pytest.mark.parametrize(("other", "context", "said"), [("own", 9, "context=9"), ("", 7, "the standard library")])
def test_a_folder_that_holds_something_else_is_refused(own, tmp_path, other, context, said):
    data = str(tmp_path / "data")
    write_text(data, str(own), context=7)
    with pytest.raises(DataError, match=rf"holds .*own, context=7, not .*{said}.* data=FOLDER, or delete"):
        write_text(data, str(own) if other else "", context=context)


def test_a_damaged_file_is_named(own, tmp_path):
    write_text(str(tmp_path / "data"), str(own), context=7)
    (tmp_path / "data" / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"test.parquet: cannot be read as Parquet; delete it"):
        write_text(str(tmp_path / "data"), str(own), context=7)


def test_a_write_that_fails_leaves_no_part_of_a_file(own, tmp_path, monkeypatch):
    def full(table, path, **options):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(str(tmp_path / "data"), str(own), context=7)
    assert list((tmp_path / "data").iterdir()) == []


def test_text_that_is_missing_empty_or_short_is_refused_with_a_remedy(tmp_path):
    data, texts = str(tmp_path / "data"), tmp_path / "texts"
    with pytest.raises(DataError, match=r"text=.*texts: no such file or folder; correct it, or leave it out"):
        write_text(data, str(texts))
    texts.mkdir()
    with pytest.raises(DataError, match=r"texts: holds no text; give text=FILE or text=FOLDER"):
        write_text(data, str(texts))
    (texts / "short.txt").write_text("Call me Ishmael.")
    with pytest.raises(DataError, match=r"too short for one row of 64 bytes .* give more text, or a smaller context"):
        write_text(data, str(texts))
    assert not Path(data).exists()


# -- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "parameters"), [(Shape(), 217_664), (SMALL, 14_416)], ids=["default", "small"])
def test_the_number_of_parameters_is_recorded(shape, parameters):
    assert sum(p.numel() for p in GPT(shape).parameters()) == parameters


@pytest.mark.parametrize("length", [1, 9, 32])
def test_every_byte_gets_a_distribution(length):
    assert GPT(SMALL)(torch.zeros(3, length, dtype=torch.long)).shape == (3, length, 256)


def test_no_logit_depends_on_a_later_byte(batch):
    torch.manual_seed(0)
    model, tokens = GPT(SMALL).eval(), batch["text"].long()
    for position in (1, 16, 32):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 256
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.isclose(before[:, position:], after[:, position:]).all(dim=2).any()


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 8).double().expand(2, 40, 8)
    turns = rotations(40, 8).double()
    # The same query and key everywhere: the scores are then a matrix whose diagonals are constant.
    scores = rotate_exactly(query, turns) @ rotate_exactly(key, turns).T
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert scores.diagonal(0)[0].item() == pytest.approx((query[0] @ key[0]).item(), abs=1e-5)
    assert scores[0].std() > 0.1


def rotate_exactly(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    return rotate(x.float(), turns.float()).double()


def test_a_turn_is_a_complex_product():
    x, turns = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), rotations(5, 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(turns[0], turns[1])
    torch.testing.assert_close(rotate(x, turns), torch.cat((turned.real, turned.imag), dim=-1))
    assert torch.equal(rotate(x, turns)[:, 0], x[:, 0])
    torch.testing.assert_close(turns[:, 3, 1], torch.tensor([math.cos(0.3), math.sin(0.3)]))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_attention_is_full_attention_with_repeated_heads(kv_heads):
    torch.manual_seed(0)
    grouped, full = Attention(Shape(16, 1, 4, kv_heads)), Attention(Shape(16, 1, 4, 4))
    full.load_state_dict(
        {
            name: weight.unflatten(0, (kv_heads, 4)).repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
            if name.startswith(("key", "value"))
            else weight
            for name, weight in grouped.state_dict().items()
        }
    )
    x, turns = torch.randn(2, 9, 16), rotations(9, 4)
    torch.testing.assert_close(grouped(x, turns), full(x, turns))


def test_attention_is_what_its_formula_says():
    torch.manual_seed(0)
    part, x, turns = Attention(Shape(8, 1, 2, 2)), torch.randn(1, 5, 8), rotations(5, 4)
    query, key, value = (layer(x)[0].view(5, 2, 4).transpose(0, 1) for layer in (part.query, part.key, part.value))
    scores = rotate(query, turns) @ rotate(key, turns).transpose(1, 2) / math.sqrt(4)
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(dim=2)
    expected = part.output((weights @ value).transpose(0, 1).reshape(1, 5, 8))
    torch.testing.assert_close(part(x, turns), expected)


def test_a_block_adds_twice_to_what_it_reads():
    torch.manual_seed(0)
    block, x, turns = Block(SMALL), torch.randn(2, 5, 16), rotations(5, 4)
    between = x + block.attention(x / (x.square().mean(2, keepdim=True) + 1e-5).sqrt(), turns)
    expected = between + block.feed_forward(between / (between.square().mean(2, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(block(x, turns), expected)


def test_the_gate_multiplies():
    torch.manual_seed(0)
    part, x = SwiGLU(8, 16), torch.randn(3, 8)
    gate, up = x @ part.gate.weight.T, x @ part.up.weight.T
    torch.testing.assert_close(part(x), (gate * torch.sigmoid(gate) * up) @ part.down.weight.T)


def test_blocks_stand_where_recomputation_finds_them():
    assert isinstance(GPT(SMALL).blocks, torch.nn.ModuleList)
    assert [type(block) for block in GPT(SMALL).blocks] == [Block, Block]
    assert not list(GPT(SMALL).buffers())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((30, 2, 4, 2), "width=30 with heads=4: .* use a width of 32, a multiple of 8"),
        ((4, 2, 4, 2), "use a width of 8, a multiple of 8"),
        ((32, 2, 4, 3), "kv_heads=3 does not divide heads=4: use 1 or 2 or 4"),
        ((32, 0, 4, 2), "layers=0: give at least 1"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Shape(*sizes)


# -- the task ----------------------------------------------------------------------------------


def test_a_new_model_guesses(batch):
    torch.manual_seed(0)
    task = TextTask("")
    loss = task.loss(task.model().train(), batch)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)


def test_every_parameter_gets_a_gradient(batch):
    torch.manual_seed(0)
    task = TextTask("", SMALL)
    model = task.model().train()
    task.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_computes_in_its_own_precision(kind, batch):
    task = TextTask("", SMALL)
    model = task.model().to(kind).train()
    loss = task.loss(model, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == kind for p in model.parameters())


def test_metrics_are_per_sample(batch):
    torch.manual_seed(0)
    task = TextTask("", SMALL)
    model, text = task.model().eval(), batch["text"].long()
    with torch.no_grad():
        metrics = task.metrics(model, batch)
        chances = model(text[:, :-1]).log_softmax(dim=2)
    nats = -chances.gather(2, text[:, 1:, None]).squeeze(2).mean(dim=1)
    torch.testing.assert_close(dict(metrics)["loss"], nats)
    torch.testing.assert_close(metrics["bits_per_byte"], nats / math.log(2))
    torch.testing.assert_close(metrics["accuracy"], (chances.argmax(2) == text[:, 1:]).float().mean(dim=1))


def test_the_loss_is_a_mean_over_samples(batch):
    torch.manual_seed(0)
    task = TextTask("", SMALL)
    model = task.model().train()
    torch.testing.assert_close(task.loss(model, batch), task.metrics(model, batch)["loss"].mean())


def test_one_batch_is_learnt_by_heart(batch):
    torch.manual_seed(0)
    task = TextTask("", Shape(width=32, layers=2))
    model = task.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    metrics = task.metrics(model.eval(), batch)
    assert metrics["loss"].max() < 0.1
    assert metrics["accuracy"].mean() > 0.99


# -- the job -----------------------------------------------------------------------------------


def test_the_job_is_the_recipe_it_says():
    config = gpt().config
    assert (config.name, config.scale.workers, config.layout.zero_stage) == ("gpt", 2, 1)
    assert (config.recipe.batch, config.recipe.clip_norm) == (8, 1.0)
    assert config.recipe.optimizer == AdamW(learning_rate=4e-3, beta2=0.99)
    assert config.recipe.schedule == Cosine(warmup=0.05)
    assert gpt(epochs=2.0).config.evaluation.every_epochs == 0.1


def test_arguments_reach_model_and_data(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load("jobs.language:gpt", ["data=here", "text=own", "context=16", "width=16", "layers=1", "kv_heads=1"])
    monkeypatch.chdir("/")
    assert job.prepare is not None
    job.prepare()
    datasets = job.task.datasets()
    assert datasets.train.uri == str(tmp_path / "here" / "train.parquet")
    assert rows(Path(datasets.evaluation.uri)).shape[1] == 17
    model = job.task.model()
    assert (len(model.blocks), model.blocks[0].attention.key.weight.shape) == (1, (4, 16))


@pytest.mark.parametrize(("arg", "message"), [("context=0", "at least 1 byte"), ("kv_heads=3", "does not divide")])
def test_an_impossible_argument_is_refused_before_anything_starts(arg, message):
    with pytest.raises(ConfigError, match=message):
        load("jobs.language:gpt", [arg])


def test_a_job_can_be_sent_to_a_worker():
    assert pickle.loads(pickle.dumps(gpt())).task == gpt().task
