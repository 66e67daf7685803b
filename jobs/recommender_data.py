"""Data for recommenders: made-up sets whose structure is known, and the formats of Criteo and MovieLens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
from numpy.typing import NDArray

from jobs.parquet import are_written, write_whole
from orchestrator.errors import DataError

__all__ = ["write_clicks", "write_criteo", "write_movielens", "write_visits"]

Columns = dict[str, NDArray[Any]]

IDS = (2000, 1000, 500, 200, 50, 20)
"""Ids of each categorical feature of the made-up clicks."""
SLOTS = 3
"""Of each feature's bag; only the last feature fills more than one."""
NUMBERS = 4
"""Numeric features of the made-up clicks."""
CLICKS = (160_000, 20_000)
"""Samples to train on and held out."""

USERS, ITEMS, VISITS, HISTORY = 3000, 500, 24, 32

CRITEO_NUMBERS, CRITEO_CATEGORIES = 13, 26
CRITEO_HELD_OUT = 7
"""The last day of seven, as in the challenge's usual split."""
LIKED = 4.0
"""A rating from which on a film counts as taken."""
FEWEST = 3
"""Items of a user of whom one is held out."""


# -- made up -----------------------------------------------------------------------------------


def write_clicks(folder: str) -> None:
    """Write 160,000 clicks to train on and 20,000 held out, unless they are there.

    A click's log-odds are a sum of what each number and id adds and of dot products between the ids of neighbouring
    features, a factorisation machine (Rendle 2010); then it is drawn. The column ``probability`` holds the truth,
    whose area under the curve no model can beat but by luck: 0.892.

    Raises:
        DataError: the folder holds other data.
        OSError: it cannot be written.
    """
    sizes = {"numbers": NUMBERS, "ids": list(IDS)}
    _write(folder, {"source": "made-up clicks"}, sizes, _made_up_clicks)


def _made_up_clicks() -> tuple[Columns, Columns]:
    draw = np.random.Generator(np.random.Philox(key=[1, 0]))
    total = sum(CLICKS)
    dense = draw.standard_normal((total, NUMBERS)).astype(np.float32)
    sparse = np.zeros((total, len(IDS), SLOTS), dtype=np.int32)
    odds = -1.2 + dense @ (0.4 * draw.standard_normal(NUMBERS))
    vectors = []
    for feature, ids in enumerate(IDS):
        slots = SLOTS if feature == len(IDS) - 1 else 1
        # Ids are as unequal as in life: the n-th most frequent has a share of about 1 / n.
        share = 1.0 / np.arange(1, ids + 1)
        sparse[:, feature, :slots] = 1 + draw.choice(ids, size=(total, slots), p=share / share.sum())
        sparse[:, feature, 1:slots] *= draw.random((total, slots - 1)) < 0.5
        bias = np.append(0.0, 0.25 * draw.standard_normal(ids))
        latent = np.concatenate((np.zeros((1, 4)), draw.standard_normal((ids, 4))))
        chosen = sparse[:, feature, :slots]
        odds += bias[chosen].sum(axis=1)
        vectors.append(latent[chosen].sum(axis=1))
    odds += sum(0.4 * (a * b).sum(axis=1) for a, b in itertools.pairwise(vectors))
    probability = 1.0 / (1.0 + np.exp(-odds))
    label = (draw.random(total) < probability).astype(np.int8)
    columns = {"dense": dense, "sparse": sparse, "label": label, "probability": probability}
    return _cut(columns, CLICKS[0])


def write_visits(folder: str) -> None:
    """Write the visits of 3,000 users to 500 items, the last of each held out, unless they are there.

    Each user takes 24 different items, one after another, in proportion to ``exp(12 cos(user, item) + popularity)``.
    The column ``rank`` of the held-out part holds the rank of the item by those preferences.

    Raises:
        DataError: the folder holds other data.
        OSError: it cannot be written.
    """
    _write(folder, {"source": "made-up visits"}, {"users": USERS, "items": ITEMS}, _made_up_visits)


def _made_up_visits() -> tuple[Columns, Columns]:
    draw = np.random.Generator(np.random.Philox(key=[2, 0]))
    user, item = (_directions(draw, count) for count in (USERS, ITEMS))
    preference = 12.0 * user @ item.T + 0.5 * draw.standard_normal(ITEMS)
    # The largest of preference + Gumbel noise, in order: draws without replacement (Kool et al. 2019).
    order = np.argsort(-(preference + draw.gumbel(size=preference.shape)), axis=1)[:, :VISITS]
    users = np.repeat(np.arange(USERS), VISITS)
    train, test = _leave_last_out(users + 1, order.ravel() + 1, USERS)
    ranks = []
    for number, chosen in enumerate(order):
        open_to = preference[number].copy()
        open_to[chosen[-1 - HISTORY : -1]] = -np.inf
        ranks.append(1 + int((open_to > preference[number, chosen[-1]]).sum()))
    return train, {**test, "rank": np.asarray(ranks, dtype=np.int32)}


def _directions(draw: np.random.Generator, count: int) -> NDArray[np.float64]:
    vectors = draw.standard_normal((count, 6))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# -- Criteo ------------------------------------------------------------------------------------


def write_criteo(folder: str, source: str, *, buckets: int) -> None:
    """Write a file of Criteo's format: label, 13 whole numbers and 26 categories in hexadecimal, separated by tabs.

    Numbers become ``log(1 + x)``, negative and missing ones 0; a category becomes one of ``buckets`` ids by its
    remainder, and a missing one an empty bag. The last seventh of the lines, the last day, is held out.

    Raises:
        DataError: no such file, or lines of another form.
        OSError: the folder cannot be written.
    """
    sizes = {"numbers": CRITEO_NUMBERS, "ids": [buckets] * CRITEO_CATEGORIES}
    _write(folder, {"source": source, "buckets": str(buckets)}, sizes, lambda: _read_criteo(source, buckets))


def _read_criteo(source: str, buckets: int) -> tuple[Columns, Columns]:
    numbers = [f"number {n}" for n in range(1, CRITEO_NUMBERS + 1)]
    categories = [f"category {n}" for n in range(1, CRITEO_CATEGORIES + 1)]
    types = {"label": pa.int8(), **dict.fromkeys(numbers, pa.int64()), **dict.fromkeys(categories, pa.string())}
    table = _read_csv(source, "\t", list(types), types)
    dense = np.stack([_filled(table[name]) for name in numbers], axis=1)
    sparse = np.stack([_hashed(source, table[name], buckets) for name in categories], axis=1)[:, :, None]
    label = table["label"].to_numpy()
    if not np.isin(label, (0, 1)).all():
        raise DataError(f"{source}: the first column should be 0 or 1, a click or none")
    dense = np.log1p(np.maximum(dense, 0)).astype(np.float32)
    return _cut({"dense": dense, "sparse": sparse, "label": label}, len(label) - max(1, len(label) // CRITEO_HELD_OUT))


def _filled(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.fill_null(column, 0).to_numpy()  # type: ignore[no-any-return]


def _hashed(source: str, column: pa.ChunkedArray, buckets: int) -> NDArray[np.int32]:
    """Ids 1 .. ``buckets``, and 0 where the text is empty; each different text is read once."""
    coded = column.combine_chunks().dictionary_encode()
    try:
        ids = [1 + int(text, 16) % buckets if text else 0 for text in coded.dictionary.to_pylist()]
    except ValueError as error:
        raise DataError(f"{source}: a category should be hexadecimal: {error}") from None
    found = np.asarray([*ids, 0], dtype=np.int32)
    return found[pc.fill_null(coded.indices, len(ids)).to_numpy()]  # type: ignore[no-any-return]


# -- MovieLens ---------------------------------------------------------------------------------


def write_movielens(folder: str, source: str) -> None:
    """Write MovieLens' ratings: films rated 4 and more, in the order of time, the last of each user held out.

    ``source`` is ``ratings.csv`` (with its heading), ``ratings.dat`` (separated by ``::``) or ``u.data`` (by tabs).

    Raises:
        DataError: no such file, or lines of another form.
        OSError: the folder cannot be written.
    """
    _write(folder, {"source": source}, None, lambda: _read_movielens(source))


def _read_movielens(source: str) -> tuple[Columns, Columns]:
    names = ["user", "film", "rating", "time"]
    types = {"user": pa.int64(), "film": pa.int64(), "rating": pa.float64(), "time": pa.int64()}
    if source.endswith(".dat"):  # the reader knows separators of one character: between two colons is nothing
        spaced = [name for pair in zip(names, "123x", strict=True) for name in pair][:-1]
        table = _read_csv(source, ":", spaced, {**types, **dict.fromkeys("123", pa.string())})
    else:
        heading = source.endswith(".csv")
        table = _read_csv(source, "," if heading else "\t", names, types, skip=int(heading))
    liked = table.filter(pc.greater_equal(table["rating"], LIKED))
    table = liked.sort_by([("user", "ascending"), ("time", "ascending")])
    if table.num_rows == 0:
        raise DataError(f"{source}: no film is rated {LIKED:g} or more")
    users, films = (np.unique(table[name].to_numpy(), return_inverse=True)[1] + 1 for name in ("user", "film"))
    return _leave_last_out(users, films, int(users.max()))


# -- what they share ---------------------------------------------------------------------------


def _leave_last_out(users: NDArray[Any], items: NDArray[Any], count: int) -> tuple[Columns, Columns]:
    """Rows sorted by user and time, with each user's items before them; the last row of each user is held out."""
    padded_items, padded_users = (np.concatenate((np.zeros(HISTORY, dtype=int), c))[:-1] for c in (items, users))
    windows, owners = (np.lib.stride_tricks.sliding_window_view(c, HISTORY) for c in (padded_items, padded_users))
    columns: Columns = {
        "user": users.astype(np.int32),
        "history": np.where(owners == users[:, None], windows, 0).astype(np.int32),
        "item": items.astype(np.int32),
    }
    enough = np.bincount(users, minlength=count + 1)[users] >= FEWEST
    last = (np.append(users[1:], 0) != users) & enough
    if not last.any():
        raise DataError(f"no user has {FEWEST} items or more: there is nobody to hold an item out of")
    return tuple({name: column[part] for name, column in columns.items()} for part in (~last, last))  # type: ignore[return-value]


def _cut(columns: Columns, at: int) -> tuple[Columns, Columns]:
    first, rest = ({name: column[part] for name, column in columns.items()} for part in (slice(at), slice(at, None)))
    return first, rest


def _read_csv(
    source: str, separator: str, names: Sequence[str], types: Mapping[str, pa.DataType], *, skip: int = 0
) -> pa.Table:
    if not Path(source).is_file():
        raise DataError(f"{source}: no such file; correct the path, or leave it out for the made-up data")
    try:
        return pc_csv.read_csv(
            source,
            read_options=pc_csv.ReadOptions(column_names=list(names), skip_rows=skip),
            parse_options=pc_csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=pc_csv.ConvertOptions(column_types=dict(types)),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{source}: {str(error).splitlines()[0]}") from None


def _write(folder: str, made_of: Mapping[str, str], sizes: Mapping[str, Any] | None, make: Any) -> None:
    files = [Path(folder) / name for name in ("train.parquet", "test.parquet")]
    if are_written(files, made_of):
        return
    parts: tuple[Columns, Columns] = make()
    if sizes is None:
        sizes = {f"{name}s": int(max(part[name].max() for part in parts)) for name in ("user", "item")}
    if not all(len(next(iter(part.values()))) for part in parts):
        raise DataError(f"{made_of['source']}: too little for a part to train on and a part held out")
    Path(folder).mkdir(parents=True, exist_ok=True)
    metadata = {**made_of, "sizes": json.dumps(sizes)}
    for part, path in zip(parts, files, strict=True):
        table = pa.table({name: _column(values) for name, values in part.items()})
        write_whole(table.replace_schema_metadata(metadata), path, row_group_size=65_536)


def _column(values: NDArray[Any]) -> pa.Array:
    array: pa.Array = pa.array(np.ascontiguousarray(values).ravel())
    for length in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array
