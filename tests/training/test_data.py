"""The stream's laws, and what the Parquet reader reads and refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DataError
from orchestrator.job import Parquet
from orchestrator.planning.layout import Layout
from orchestrator.training.data import ParquetDataset, Stream, open_dataset, share_of

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**32 - 1)
layouts = st.builds(Layout, workers=st.integers(1, 5), micro_batch=st.integers(1, 7), accumulation=st.integers(1, 4))


# -- the stream --------------------------------------------------------------------------------


def global_batch(stream: Stream, start: int, layout: Layout) -> list[int]:
    """A step's samples in stream order: worker by worker, micro batch by micro batch."""
    parts = [part for rank in range(layout.workers) for part in stream.micro_batches(start, layout, rank)]
    return np.concatenate(parts).tolist()


@given(sizes, seeds, layouts, st.integers(1, 3))
def test_every_sample_is_seen_once_per_epoch(num_samples: int, seed: int, layout: Layout, epochs: int) -> None:
    """At batches that do not divide the set, and at batches larger than it."""
    stream = Stream(num_samples, seed)
    seen: list[int] = []
    while len(seen) < epochs * num_samples:
        seen += global_batch(stream, len(seen), layout)
    for epoch in range(epochs):
        assert sorted(seen[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(sizes, seeds, layouts, st.integers(0, 1000))
def test_a_layout_only_cuts_the_order_into_parts(num_samples: int, seed: int, layout: Layout, start: int) -> None:
    stream = Stream(num_samples, seed)
    assert global_batch(stream, start, layout) == stream.indices(start, layout.global_batch).tolist()


@given(sizes, seeds, layouts, st.integers(0, 500))
def test_a_micro_batch_has_the_planned_shape(num_samples: int, seed: int, layout: Layout, start: int) -> None:
    for rank in range(layout.workers):
        parts = Stream(num_samples, seed).micro_batches(start, layout, rank)
        assert [part.shape for part in parts] == [(layout.micro_batch,)] * layout.accumulation


@given(sizes, seeds, st.lists(st.integers(1, 60), max_size=8), st.integers(0, 300))
def test_the_order_is_the_same_from_wherever_it_is_taken_up(
    num_samples: int, seed: int, counts: list[int], start: int
) -> None:
    """A resize or a restart goes on at the cursor: the order depends on no batch before it."""
    stream = Stream(num_samples, seed)
    whole = stream.indices(0, start + sum(counts)).tolist()
    cursor = start
    for count in counts:
        assert stream.indices(cursor, count).tolist() == whole[cursor : cursor + count]
        cursor += count


@given(st.integers(20, 200), seeds)
def test_epochs_and_seeds_are_shuffled_differently(num_samples: int, seed: int) -> None:
    first, second = np.split(Stream(num_samples, seed).indices(0, 2 * num_samples), 2)
    other = Stream(num_samples, seed + 1).indices(0, num_samples)
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    assert first.tolist() != list(range(num_samples))


def test_the_order_is_the_recorded_one() -> None:
    """On every machine and with every numpy: a run that is resumed elsewhere must not see another order."""
    assert Stream(10, seed=3).indices(0, 25).tolist() == [
        *[6, 8, 4, 1, 3, 5, 9, 7, 0, 2],
        *[2, 4, 0, 5, 8, 1, 3, 9, 7, 6],
        *[4, 3, 6, 5, 2],
    ]


# -- shares ------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 20))
def test_shares_part_the_whole(total: int, workers: int) -> None:
    shares = [share_of(total, rank, workers) for rank in range(workers)]
    assert [item for share in shares for item in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, shares)) == len(shares[0]), "evaluation counts its passes by the first share"


# -- Parquet -----------------------------------------------------------------------------------


def write(path: Path, **columns: pa.Array | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def refusal(source: Parquet) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(source)
    return str(caught.value)


def fixed(rows: list, width: int, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(rows, type=pa.list_(kind or pa.uint8(), width))


def test_fixed_size_lists_become_axes(tmp_path: Path) -> None:
    grid = pa.array([[[1, 2], [3, 4], [5, 6]]] * 5, type=pa.list_(pa.list_(pa.float32(), 2), 3))
    path = write(
        tmp_path / "a.parquet", image=fixed([[n, n + 1, n + 2] for n in range(5)], 3), grid=grid, label=range(5)
    )
    data = open_dataset(Parquet(str(path)))
    assert len(data) == 5
    rows = data.take(np.array([4, 0, 4]))
    assert {name: (column.dtype.name, column.shape) for name, column in rows.items()} == {
        "image": ("uint8", (3, 3)),
        "grid": ("float32", (3, 3, 2)),
        "label": ("int64", (3,)),
    }
    assert rows["image"].tolist() == [[4, 5, 6], [0, 1, 2], [4, 5, 6]]
    assert rows["grid"][0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert rows["label"].tolist() == [4, 0, 4]


def test_numbers_and_truth_values_keep_their_type(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", small=pa.array([1, 2], pa.int16()), real=[0.5, 1.5], flag=[True, False])
    columns = ParquetDataset.open(Parquet(str(path))).columns
    assert {name: column.dtype.name for name, column in columns.items()} == {
        "small": "int16",
        "real": "float64",
        "flag": "bool",
    }


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, first in (("b/1.parquet", 20), ("10.parquet", 0), ("9.parquet", 10)):
        write(tmp_path / name, label=[first, first + 1], image=fixed([[first], [first + 1]], 1))
    (tmp_path / "notes.txt").write_text("not data")
    columns = ParquetDataset.open(Parquet(str(tmp_path))).columns
    assert columns["label"].tolist() == [0, 1, 10, 11, 20, 21]
    assert columns["image"].tolist() == [[0], [1], [10], [11], [20], [21]]


def test_only_the_named_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[1, 2], name=["one", "two"])
    assert set(ParquetDataset.open(Parquet(str(path), columns=("label",))).columns) == {"label"}


def test_a_dataset_that_answers_already_is_returned_as_it_is(tmp_path: Path) -> None:
    data = open_dataset(Parquet(str(write(tmp_path / "a.parquet", label=[1]))))
    assert open_dataset(data) is data


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.parquet"
    assert refusal(Parquet(str(path))) == (
        f"{path}: no such file or folder; write the data first, or correct the job's data argument"
    )


def test_a_folder_without_parquet(tmp_path: Path) -> None:
    assert refusal(Parquet(str(tmp_path))) == f"{tmp_path}: no *.parquet file in this folder"


def test_a_place_that_is_not_local() -> None:
    assert refusal(Parquet("s3://bucket/data")) == "s3://bucket/data: only local Parquet files and folders can be read"


def test_a_missing_column_is_answered_with_the_likely_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=[1], label=[1])
    assert refusal(Parquet(str(path), columns=("label", "imgae"))) == (
        f"{path}: no column 'imgae'; did you mean 'image'? valid: image, label"
    )


def test_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=pa.array([], pa.int64()))
    assert refusal(Parquet(str(path))) == f"{path}: holds no rows; check the step that wrote it"


@pytest.mark.parametrize(
    ("column", "nulls"),
    [
        (pa.array([1, None, 3]), 1),
        (fixed([[1, 2], None, [3, 4]], 2), 1),
        (fixed([[1, None], [None, 4]], 2), 2),
        (fixed([[1.0, None], [2.0, 3.0]], 2, pa.float32()), 1),
    ],
    ids=["value", "list", "inside-lists", "inside-lists-of-floats"],
)
def test_nulls(tmp_path: Path, column: pa.Array, nulls: int) -> None:
    path = write(tmp_path / "a.parquet", label=column)
    assert refusal(Parquet(str(path))) == f"{path}: column 'label' has {nulls} nulls; fill or drop them first"


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array(["one", "two"]), "string"),
        (pa.array([[1], [2, 3]]), "list<element: int64>"),
        (pa.array([0, 1], pa.timestamp("s")), "timestamp[ms]"),
    ],
    ids=["text", "lists-of-any-length", "times"],
)
def test_what_is_no_tensor(tmp_path: Path, column: pa.Array, kind: str) -> None:
    path = write(tmp_path / "a.parquet", label=column)
    assert refusal(Parquet(str(path))) == (
        f"{path}: column 'label' holds {kind}, and a tensor holds numbers: write it as numbers or "
        "fixed-size lists of them, or name the columns to read in Parquet(columns=...)"
    )


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", label=[1])
    write(tmp_path / "2.parquet", label=["one"])
    assert refusal(Parquet(str(tmp_path))) == (
        f"{tmp_path}: its files do not have the same columns and types; write them again"
    )


@pytest.mark.parametrize("damage", ["no-parquet", "empty", "cut-off", "footer", "data"])
def test_a_corrupt_file(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.parquet", label=list(range(500)))
    whole = path.read_bytes()
    middle = len(whole) // 4
    path.write_bytes(
        {
            "no-parquet": b"label\n1\n2\n" * 20,
            "empty": b"",
            "cut-off": whole[: len(whole) // 2],
            "footer": whole[:-40] + bytes(40),
            "data": whole[:4] + bytes(middle) + whole[4 + middle :],
        }[damage]
    )
    message = refusal(Parquet(str(path)))
    assert message.startswith(f"{path}: cannot be read as Parquet (")
    assert message.endswith("); write it again")
    assert "\n" not in message
