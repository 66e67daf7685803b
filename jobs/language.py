"""Text: a small GPT that reads and predicts bytes or tokens, on Python's own standard library or on your files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.parquet import are_written, write_whole
from jobs.tokens import need_tokenizers, token_documents, train_encoder
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
    TelemetryConfig,
)
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import Datasets, Job, Parquet

__all__ = [
    "GPT",
    "Attention",
    "Block",
    "CrossEntropy",
    "Shape",
    "SwiGLU",
    "TextTask",
    "TokenTask",
    "gpt",
    "rotate",
    "rotations",
    "write_text",
    "write_tokens",
]

Tokens = Literal["bytes", "bpe", "parquet"]

VOCABULARY = 256
"""Every byte is a token: nothing to train or to store beside the text."""
DOCUMENT = b"\0"
"""Stands before each file, so that a model sees where one begins; text holds no zero byte."""
EVALUATED = 512
"""Rows evaluated, at most, spread evenly over the held-out files: a few hundred milliseconds on two CPUs."""
HELD_OUT = 20
"""One byte in so many is held out."""
PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest", "urllib", "xml")
"""Read beside the modules at the top of the standard library."""
MAX_BYTES = 2_500_000
"""Of the standard library, so that the run is equally long for every version of Python."""
BYTE_PAIRS = 1024
"""Tokens learnt from the text unless said otherwise: some three bytes each on the standard library."""


# -- the run -----------------------------------------------------------------------------------


def gpt(
    data: str = "data/text",
    text: str = "",
    workers: int = 2,
    epochs: float = 1.0,
    batch: int = 8,
    context: int = 64,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    sequence: int | None = None,
    vocabulary: int | None = None,
    tokens: Tokens = "bytes",
) -> Job:
    """Return the job: 218 thousand parameters that come to 2.18 bits per byte on held-out files of Python 3.11.

    That is after one pass over 2.4 MB, 4,639 steps of 8 rows, with 60 % of the next bytes guessed right; 2.28 is
    reached after 70 % of it. Other versions of Python, and your own text, come to other numbers. The learning rate is
    one of 1, 3, 4 and 6e-3 tried at this batch and length; the last three differ by 0.01, and two seeds as much.

    Args:
        data: Folder for ``train.parquet`` and ``test.parquet``, written unless they are there.
        text: Your own text, a file or a folder; without it, the standard library's source.
        workers: Data-parallel workers.
        epochs: Passes over the training text.
        batch: Reference batch in rows of ``context`` bytes; the learning rate belongs to 8.
        context: Bytes that the model sees at once.
        width: Features of each byte between the blocks.
        layers: Blocks.
        heads: Attention heads; they divide ``width`` into even parts.
        kv_heads: Heads of keys and values; they divide ``heads``. Without it 2, or as many as ``heads`` where
            a vocabulary is given.
        sequence: Another word for ``context``, in tokens.
        vocabulary: Tokens to choose from, 256 or more. Given, the model is the classical one of that shape: a block has
            12 x width^2 parameters, and embedding and head share theirs. Text still is bytes, the first 256 tokens,
            unless ``tokens`` says otherwise, and then it says how many there are and nothing of the model.
        tokens: bytes; bpe, pairs of bytes learnt from the text itself, 1,024 tokens without ``vocabulary``; or parquet,
            your own, a list in the column ``tokens`` for each document of ``text``, FILE.parquet or a folder of them.

    Raises:
        ConfigError: the sizes do not go together.
    """
    context = context if sequence is None else sequence
    folder = str(Path(data).absolute())  # workers may run in another folder
    source = str(Path(text).absolute()) if text else ""
    if context < 1:
        raise ConfigError(f"context={context}: give at least 1 byte, as in context=64")
    if tokens == "parquet" and not (text and vocabulary):
        raise ConfigError("tokens=parquet: give text=FILE.parquet and vocabulary=N, the number of its tokens")
    if tokens == "bpe":
        need_tokenizers()
        vocabulary = vocabulary or BYTE_PAIRS
    classical = vocabulary is not None and tokens == "bytes"
    config = RunConfig(
        name="gpt",
        recipe=Recipe(
            batch=batch,
            # A small batch averages the squared gradient over more steps (Marek et al. 2025, arXiv:2507.07101).
            optimizer=AdamW(learning_rate=4e-3, beta2=0.99),
            schedule=Cosine(warmup=0.05),
            penalties=Penalties(weight_decay=0.1),
            clip_norm=1.0,
            stop=Stop(epochs=epochs),
        ),
        layout=LayoutConfig(zero_stage="auto" if classical else 1),
        scale=ScaleConfig(workers=workers),
        evaluation=EvaluationConfig(every_epochs=epochs / 20),
        telemetry=TelemetryConfig(tokens_per_sample=context),
    )
    if kv_heads is None:
        kv_heads = heads if classical else 2
    shape = Shape(width, layers, heads, kv_heads, vocabulary or VOCABULARY, tied=classical)
    if tokens == "bytes":
        return Job(
            config,
            TextTask(folder, shape, context),
            prepare=functools.partial(write_text, folder, source, context=context),
        )
    write = functools.partial(write_tokens, folder, source, context=context, tokens=tokens, vocabulary=shape.vocabulary)
    return Job(config, TokenTask(folder, shape, context), prepare=write)


# -- the task ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of a model.

    Raises:
        ConfigError: the sizes do not go together.
    """

    width: int = 64
    """Features of each byte between the blocks."""
    layers: int = 4
    """Blocks."""
    heads: int = 4
    """Heads of queries."""
    kv_heads: int = 2
    """Heads of keys and values, each shared by ``heads / kv_heads`` heads of queries."""
    vocabulary: int = VOCABULARY
    """Tokens that the head chooses from; text is bytes, so at least 256."""
    tied: bool = False
    """Whether head and embedding are one matrix (Press & Wolf 2017, arXiv:1608.05859)."""

    def __post_init__(self) -> None:
        if self.vocabulary < VOCABULARY:
            raise ConfigError(f"vocabulary={self.vocabulary}: every byte is a token; give at least {VOCABULARY}")
        for name in ("width", "layers", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")
        if self.width % (2 * self.heads):
            step = 2 * self.heads
            near = max(step, round(self.width / step) * step)
            raise ConfigError(
                f"width={self.width} with heads={self.heads}: rotary positions turn pairs of features, "
                f"so the width of a head is even; use a width of {near}, a multiple of {step}"
            )
        if self.heads % self.kv_heads:
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ConfigError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: use {' or '.join(divisors)}"
            )

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden units of the feed-forward part: 8/3 of the width, rounded up to a multiple of 16.

        Three matrices then weigh as much as the usual two of 4 x width (Shazeer 2020, arXiv:2002.05202, section 3).
        """
        return 16 * math.ceil(8 * self.width / 3 / 16)


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Predict each next byte: ``text`` [samples, context + 1] of bytes, each row a piece of text."""

    data: str
    """Absolute path of the folder that ``write_text`` wrote."""
    shape: Shape = Shape()
    """Size of the model."""
    context: int = 64
    """Bytes that the model sees at once."""

    def sample(self) -> Mapping[str, NDArray[np.uint8]]:
        """Return one row as ``datasets`` holds it, so that a run can be planned before its text is there."""
        return {"text": np.zeros((1, self.context + 1), dtype=np.uint8)}

    def datasets(self) -> Datasets:
        """Return the two Parquet files."""
        folder = Path(self.data)
        return Datasets(train=Parquet(str(folder / "train.parquet")), evaluation=Parquet(str(folder / "test.parquet")))

    def model(self) -> nn.Module:
        """Return a new GPT."""
        return GPT(self.shape)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy in nats per byte, averaged over the micro batch."""
        rows = batch["text"].long()
        return cast("Tensor", model(rows[:, :-1], rows[:, 1:]))

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return cross-entropy in nats and in bits per byte, and the share of bytes guessed right, of each row."""
        logits, following = _predicted(model, batch["text"])
        nats = F.cross_entropy(logits.transpose(1, 2), following, reduction="none").mean(dim=1)
        accuracy = (logits.argmax(dim=2) == following).float().mean(dim=1)
        return {"loss": nats, "bits_per_byte": nats / math.log(2), "accuracy": accuracy}


@dataclasses.dataclass(frozen=True)
class TokenTask(TextTask):
    """Predict each next token: ``text`` [samples, context + 1], and how many ``bytes`` [samples] they stand for.

    ``bytes`` are those of all tokens but the first, so of what is predicted; where nobody knows them they are missing.
    """

    def sample(self) -> Mapping[str, NDArray[Any]]:
        """Return one row as ``datasets`` holds it, so that a run can be planned before its text is there."""
        return {"text": np.zeros((1, self.context + 1), dtype=np.int32)}

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return cross-entropy in nats and the share of tokens guessed right, of each row, and its bytes."""
        logits, following = _predicted(model, batch["text"])
        nats = F.cross_entropy(logits.transpose(1, 2), following, reduction="none").mean(dim=1)
        accuracy = (logits.argmax(dim=2) == following).float().mean(dim=1)
        return {"loss": nats, "accuracy": accuracy} | ({"bytes": batch["bytes"].float()} if "bytes" in batch else {})

    def summarize(self, means: Mapping[str, Tensor]) -> Mapping[str, float | Tensor]:
        """Return cross-entropy in nats and bits per token and, where bytes are known, in bits per byte.

        Bits per byte is what models of other tokens can be compared by: all nats over all bytes.
        """
        bits = means["loss"] / math.log(2)
        found = {"loss": means["loss"], "accuracy": means["accuracy"], "bits_per_token": bits}
        if "bytes" in means:
            found["bits_per_byte"] = bits * self.context / means["bytes"]
        return found


def _predicted(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits [samples, context, vocabulary] and the tokens they are about [samples, context]."""
    rows = rows.long()
    # Losses are taken in fp32, whatever the model computes in.
    return cast("Tensor", model(rows[:, :-1])).float(), rows[:, 1:]


# -- the model ---------------------------------------------------------------------------------


class GPT(nn.Module):
    """Embedding, blocks, a last norm, and a linear head, by default of its own.

    With 256 tokens tying the head to the embedding saves a few percent of the parameters at most, and
    the two want different sizes, the embedding 1, since the blocks add to it, and the head small, so that a
    new model guesses. It also leaves every parameter with one owner, which ZeRO stage 3, pruning and export like.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = norm(shape.width)
        self.head = linear(shape.width, shape.vocabulary, 0.02)
        if shape.tied:
            self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor, following: Tensor | None = None) -> Tensor:
        """Return logits [samples, length, vocabulary] of what comes after each of ``tokens`` [samples, length].

        With ``following`` [samples, length], what did come, return the mean cross-entropy in nats instead: inside the
        model, because logits that leave it are cast to fp32, which with many tokens takes more memory than all else.
        """
        x = self.embedding(tokens)
        turns = rotations(tokens.shape[1], self.head_width, tokens.device)
        for block in self.blocks:
            x = block(x, turns)
        logits = cast("Tensor", self.head(self.norm(x)))
        if following is None:
            return logits
        if logits.dtype == torch.float32:
            return F.cross_entropy(logits.flatten(0, 1), following.flatten())
        return cast("Tensor", CrossEntropy.apply(logits.flatten(0, 1), following.flatten()))


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of 16-bit logits [rows, classes], computed in fp32 a sixteenth of the rows at a time.

    ``F.cross_entropy(logits.float(), ...)`` holds logits, their logarithms and a gradient in fp32, 12 bytes each on top
    of the 16-bit ones. Here only the logits and their gradient are ever whole, 4 bytes together.
    """

    PARTS = 16

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean over the rows, in fp32."""
        logarithms = torch.cat([part.float().logsumexp(dim=1) for part in logits.chunk(CrossEntropy.PARTS)])
        ctx.save_for_backward(logits, wanted, logarithms)
        chosen = logits.gather(1, wanted[:, None]).squeeze(1)
        return (logarithms - chosen.float()).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return softmax less the one wanted, over the number of rows, in the logits' type."""
        logits, wanted, logarithms = ctx.saved_tensors
        scale = gradients[0] / len(logits)
        result = torch.empty_like(logits)
        parts = [t.chunk(CrossEntropy.PARTS) for t in (logits, logarithms[:, None], wanted[:, None], result)]
        for own, logarithm, chosen, out in zip(*parts, strict=True):
            part = (own.float() - logarithm).exp_()
            part.scatter_add_(1, chosen, torch.full_like(part[:, :1], -1.0))
            out.copy_(part.mul_(scale))
        return result, None


class Block(nn.Module):
    """Attention, then a feed-forward part; each reads a normed copy and adds to what it read.

    Pre-norm after Xiong et al. 2020 (arXiv:2002.04745). What adds to the residual stream starts smaller the more of
    them there are, so that the sum has the size of one (Radford et al. 2019, section 2.3).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        share = 1 / math.sqrt(2 * shape.layers)
        self.attention_norm = norm(shape.width)
        self.attention = Attention(shape, share)
        self.feed_forward_norm = norm(shape.width)
        self.feed_forward = SwiGLU(shape.width, shape.hidden, share)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Return [samples, length, width], like ``x``; ``turns`` as from ``rotations``."""
        x = x + self.attention(self.attention_norm(x), turns)
        return x + cast("Tensor", self.feed_forward(self.feed_forward_norm(x)))


class Attention(nn.Module):
    """Causal attention with rotary positions, several heads of queries to one of keys and values.

    Grouped queries after Ainslie et al. 2023 (arXiv:2305.13245); as many ``kv_heads`` as ``heads`` is the usual
    multi-head attention, and one is multi-query attention.
    """

    def __init__(self, shape: Shape, share: float = 1.0) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.query = linear(shape.width, shape.heads * shape.head_width)
        self.key = linear(shape.width, shape.kv_heads * shape.head_width)
        self.value = linear(shape.width, shape.kv_heads * shape.head_width)
        self.output = linear(shape.width, shape.width, share / math.sqrt(shape.width))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Return [samples, length, width], like ``x``; no position depends on a later one."""
        query, key, value = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(
            rotate(query, turns), rotate(key, turns), value, is_causal=True, enable_gqa=True
        )
        return cast("Tensor", self.output(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        """[samples, length, heads * head_width] -> [samples, heads, length, head_width]."""
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, share: float = 1.0) -> None:
        super().__init__()
        self.gate = linear(width, hidden)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width, share / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., width], like ``x``."""
        return cast("Tensor", self.down(Gated.apply(self.gate(x), self.up(x))))


class Gated(torch.autograd.Function):
    """``silu(gate) * up``, to the bit, without keeping ``silu(gate)`` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return a tensor like ``gate`` and ``up``."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both."""
        gate, up = ctx.saved_tensors
        gradient = gradients[0]
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


def rotations(length: int, head_width: int, device: torch.device | None = None) -> Tensor:
    """Return cosine and sine of each position's angles: [2, length, head_width / 2] in fp32.

    Pair ``i`` turns by ``10000 ** (-2i / head_width)`` per position (Su et al. 2021, arXiv:2104.09864, section 3.2.2).
    They are computed at each pass and not kept as buffers, which a cast of the model to 16 bits would round.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Return ``x`` [..., length, head_width] turned by its position; feature ``i`` pairs with ``i + head_width / 2``.

    The product of a turned query and a turned key depends on their distance alone.
    """
    cosine, sine = turns.unbind()
    first, second = x.chunk(2, dim=-1)  # each product with an fp32 turn is one in fp32
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat([half.to(x.dtype) for half in turned], dim=-1)


def norm(width: int) -> nn.RMSNorm:
    """Return a norm that divides by the root of the mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return nn.RMSNorm(width, eps=1e-5)


def linear(inputs: int, outputs: int, deviation: float | None = None) -> nn.Linear:
    """Return a linear layer without bias; it keeps the size of what it reads, unless a deviation is given."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs) if deviation is None else deviation)
    return layer


# -- the data ----------------------------------------------------------------------------------


def write_text(folder: str, text: str = "", *, context: int = 64) -> None:
    """Write ``train.parquet`` and ``test.parquet``, rows of ``context + 1`` bytes, unless both are there.

    Args:
        folder: Where to; made if it is not there.
        text: A file, or a folder whose text files are read with those of its subfolders; empty reads the source of
            the standard library. Files of the same content count once, and hidden and binary ones do not count.
        context: Bytes of a row but the first, which the row before it ends with: each byte is predicted once.

    A file belongs to one of the two whole, for what is said twice is mostly said in one file; only text that is a
    single file is cut. Files that are alike remain: of the 512 rows held out of Python 3.11's library, 23 stand word
    for word in what is trained on, ntpath's in posixpath and cProfile's in profile. Each Parquet file appears whole or
    not at all, and changes to the text after that are not looked for.

    Raises:
        DataError: no text, too little of it, or ``folder`` holds another text or context.
        OSError: the folder cannot be written.
    """
    made_of = {"text": text or "the standard library", "context": str(context)}
    files = [Path(folder) / name for name in ("train.parquet", "test.parquet")]
    if are_written(files, made_of):
        return
    streams = (_joined(documents) for documents in _split(_documents(text)))
    train, held_out = _parts(text, *streams, context=context)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for rows, path in zip((train, held_out), files, strict=True):
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), context + 1)
        write_whole(pa.table({"text": column}).replace_schema_metadata(made_of), path, row_group_size=8192)


def write_tokens(folder: str, text: str, *, context: int, tokens: Tokens, vocabulary: int) -> None:
    """Write the same of tokens, unless it is there; with byte pairs also ``tokenizer.json`` and each row's bytes.

    Byte pairs are learnt from what is trained on alone. Documents stand one after another, so that no row is padded;
    before each stands the token of a zero byte, and in a Parquet file of yours what you have put there.

    Raises:
        DataError: no text, too little of it, tokens that the vocabulary has not, or ``folder`` holds another text.
        OSError: the folder cannot be written.
    """
    made_of = {"text": text or "the standard library", "context": str(context)}
    made_of |= {"tokens": tokens, "vocabulary": str(vocabulary)}
    files = [Path(folder) / name for name in ("train.parquet", "test.parquet")]
    if are_written(files, made_of):
        return
    widths: NDArray[np.int64] | None = None
    if tokens == "bpe":
        texts = _split(_documents(text))
        encoder = train_encoder(texts[0], vocabulary)
        train, held_out = _parts(text, *(encoder.encode(part) for part in texts), context=context)
        widths = encoder.widths
        Path(folder).mkdir(parents=True, exist_ok=True)
        encoder.save(Path(folder) / "tokenizer.json")
    else:
        documents = _split(token_documents(Path(text), vocabulary), size=4)
        streams = (np.frombuffer(b"".join(part), dtype=np.int32) for part in documents)
        train, held_out = _parts(text, *streams, context=context)
        Path(folder).mkdir(parents=True, exist_ok=True)
    for rows, path in zip((train, held_out), files, strict=True):
        columns = {"text": pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), context + 1)}
        if widths is not None:
            columns["bytes"] = pa.array(widths[rows[:, 1:]].sum(axis=1))
        write_whole(pa.table(columns).replace_schema_metadata(made_of), path, row_group_size=8192)


def _joined(documents: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(DOCUMENT + document for document in documents), dtype=np.uint8)


def _parts(
    text: str, train: NDArray[Any], held_out: NDArray[Any], *, context: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows to train on, and at most ``EVALUATED`` held out, spread evenly over what there is of them."""
    rows, others = _rows(train, context), _rows(held_out, context)
    if not len(rows) or not len(others):
        raise DataError(
            f"text={text or 'the standard library'} is too short for one row of {context} "
            f"{'bytes' if train.dtype == np.uint8 else 'tokens'} to train on and one held out: give more text, "
            "or a smaller context"
        )
    return rows, others[np.linspace(0, len(others) - 1, num=min(EVALUATED, len(others))).astype(int)]


def _documents(text: str) -> list[bytes]:
    """Return the contents of the files, each once, in an order that says nothing of their names."""
    paths = _own_files(Path(text)) if text else _library_files()
    # The order of hashes is the same everywhere, and a file added or gone moves no other.
    documents = {hashlib.sha256(content).digest(): content for content in map(Path.read_bytes, paths)}
    ordered = [content for _, content in sorted(documents.items()) if content.strip() and DOCUMENT not in content]
    if not ordered:
        where = text or sysconfig.get_path("stdlib")
        raise DataError(f"{where}: holds no text; give text=FILE or text=FOLDER with text files in it")
    return ordered if text else list(_up_to(MAX_BYTES, ordered))


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [path for name in ("", *PACKAGES) for path in sorted((root / name).glob("*.py"))]


def _own_files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"text={path}: no such file or folder; correct it, or leave it out for the standard library")
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _up_to(limit: int, documents: Sequence[bytes]) -> Iterator[bytes]:
    """Yield those that fit below ``limit`` bytes together, first come, first served."""
    for document in documents:
        if len(document) <= limit:
            limit -= len(document)
            yield document


def _split(documents: Sequence[bytes], *, size: int = 1) -> tuple[list[bytes], list[bytes]]:
    """Return what is trained on and what is held out, a twentieth or the smallest; a token has ``size`` bytes."""
    if len(documents) == 1:
        cut = len(documents[0]) - len(documents[0]) // size // HELD_OUT * size
        return [documents[0][:cut]], [documents[0][cut:]]
    share = sum(map(len, documents)) // HELD_OUT
    held_out = list(_up_to(share, documents)) or [min(documents, key=len)]
    return [document for document in documents if document not in held_out], held_out


def _rows(stream: NDArray[Any], context: int) -> NDArray[Any]:
    """Return [rows, context + 1] of the stream; what does not fill a row is left out."""
    if len(stream) <= context:
        return np.empty((0, context + 1), dtype=stream.dtype)
    return np.lib.stride_tricks.sliding_window_view(stream, context + 1)[::context]
