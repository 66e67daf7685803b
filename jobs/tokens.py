"""Text as tokens: byte pairs learnt from the text itself, and text that somebody has cut into tokens already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.errors import ConfigError, DataError

__all__ = ["Encoder", "need_tokenizers", "token_documents", "train_encoder"]

MOST = 2**31 - 1
"""Tokens are kept in 32 bits."""


def need_tokenizers() -> None:
    """Refuse where the package that learns and applies byte pairs is not installed.

    Raises:
        ConfigError: says how to get it.
    """
    from importlib.util import find_spec

    if find_spec("tokenizers") is None:
        raise ConfigError("tokens=bpe needs the package tokenizers: pip install 'orchestrator[text]', or tokens=bytes")


class Encoder:
    """Byte pairs: every byte is a token, and what often stands side by side is one too (Sennrich et al. 2016)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        self.widths = np.array([len(word) for word, _ in words], dtype=np.int64)
        """Bytes that each token stands for: its word has a letter for each."""
        # What the byte-level alphabet calls the zero byte; no text holds one, so nothing has been merged with it.
        self.document = int(tokenizer.token_to_id(chr(256)))
        """The token that stands before each document."""

    def encode(self, documents: Sequence[bytes]) -> NDArray[np.int32]:
        """Return the tokens of all documents, one after another; bytes that are no UTF-8 count as U+FFFD."""
        texts = [document.decode(errors="replace") for document in documents]
        parts = [[self.document, *found.ids] for found in self._tokenizer.encode_batch(texts)]
        return np.concatenate([np.array(part, dtype=np.int32) for part in parts])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text that ``tokens`` stand for."""
        return str(self._tokenizer.decode(list(tokens)))

    def save(self, path: Path) -> None:
        """Write it, whole or not at all, in the form that ``tokenizers.Tokenizer.from_file`` reads."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._tokenizer.save(str(temporary))
        temporary.replace(path)


def train_encoder(documents: Sequence[bytes], vocabulary: int) -> Encoder:
    """Learn at most ``vocabulary`` tokens from ``documents``; the same from the same, in whatever order they come."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.decode(errors="replace") for document in documents), trainer)
    return Encoder(tokenizer)


def token_documents(path: Path, vocabulary: int) -> list[bytes]:
    """Return the documents of a Parquet file, or a folder of them: each row's ``tokens``, as int32 in bytes.

    Raises:
        DataError: no such file, no lists of whole numbers in a column of that name, or tokens beyond the vocabulary.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.exists() else []
    if not files:
        raise DataError(f"text={path}: no such Parquet file or folder of them; tokens=parquet needs one")
    found: list[bytes] = []
    for file in files:
        try:
            column = pq.read_table(file, columns=["tokens"])["tokens"].combine_chunks()
            lists = column.cast(pa.list_(pa.int64()))
        except (pa.ArrowException, KeyError):
            raise DataError(f"{file}: holds no column tokens with a list of whole numbers in each row") from None
        values = lists.flatten().to_numpy(zero_copy_only=False)
        if len(values) and not 0 <= values.min() <= values.max() < min(vocabulary, MOST):
            raise DataError(
                f"{file}: holds tokens from {values.min()} to {values.max()}, and vocabulary={vocabulary}: "
                f"give vocabulary={values.max() + 1}, or more, and no negative token"
            )
        ends = np.cumsum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
        found += [part.astype(np.int32).tobytes() for part in np.split(values, ends[:-1]) if len(part)]
    if not found:
        raise DataError(f"text={path}: holds no tokens")
    return found
