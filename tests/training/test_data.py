"""The stream's laws, and what the Parquet reader reads and refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import SGD, DataConfig, FailureConfig, Recipe, RunConfig, Stop
from orchestrator.errors import CorruptDataError, DataError, StorageUnavailableError
from orchestrator.job import Parquet
from orchestrator.planning.layout import Layout
from orchestrator.training.data import Batches, Stream, open_dataset, share_of

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


def in_mode(mode: str, *, skip: bool = False, **data: Any) -> RunConfig:
    """A config that says how data is read."""
    recipe = Recipe(batch=8, optimizer=SGD(learning_rate=0.1), stop=Stop(epochs=1))
    failures = FailureConfig(on_corrupt_row_group="skip" if skip else "stop")
    return RunConfig(name="data", recipe=recipe, data=DataConfig(mode=mode, **data), failures=failures)


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
    columns = open_dataset(Parquet(str(path))).columns
    assert {name: column.dtype.name for name, column in columns.items()} == {
        "small": "int16",
        "real": "float64",
        "flag": "bool",
    }


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, first in (("b/1.parquet", 20), ("10.parquet", 0), ("9.parquet", 10)):
        write(tmp_path / name, label=[first, first + 1], image=fixed([[first], [first + 1]], 1))
    (tmp_path / "notes.txt").write_text("not data")
    columns = open_dataset(Parquet(str(tmp_path))).columns
    assert columns["label"].tolist() == [0, 1, 10, 11, 20, 21]
    assert columns["image"].tolist() == [[0], [1], [10], [11], [20], [21]]


def test_only_the_named_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[1, 2], name=["one", "two"])
    assert set(open_dataset(Parquet(str(path), columns=("label",))).columns) == {"label"}


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


def test_a_place_that_is_neither_local_nor_s3() -> None:
    assert refusal(Parquet("gs://bucket/data")) == (
        "gs://bucket/data: Parquet is read from folders and from s3://BUCKET/PREFIX"
    )


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
    assert refusal(Parquet(str(path))) == (
        f"{path}, row group 0: column 'label' has {nulls} nulls; fill or drop them first"
    )


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array(["one", "two"]), "text"),
        (pa.array([b"one", b"two"]), "bytes"),
        (pa.array([[1], [2, 3]]), "int64[]"),
        (pa.array([0, 1], pa.timestamp("s")), "timestamp[ms]"),
    ],
    ids=["text", "bytes", "lists-of-any-length", "times"],
)
def test_what_is_no_tensor(tmp_path: Path, column: pa.Array, kind: str) -> None:
    path = write(tmp_path / "a.parquet", label=column)
    assert refusal(Parquet(str(path))) == (
        f"{path}: column 'label' holds {kind}, and a tensor holds numbers: write it as numbers or "
        "fixed-size lists of them, name the columns to read in Parquet(columns=...), or give Parquet a decode function "
        "for bytes, text and lists"
    )


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", label=[1])
    write(tmp_path / "2.parquet", label=["one"])
    assert refusal(Parquet(str(tmp_path))) == (
        f"{tmp_path}/2.parquet: column 'label' holds text, and int64 in {tmp_path}/1.parquet; write them again with "
        "the same types"
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
    where = f"{path}, row group 0" if damage == "data" else str(path)
    assert message.startswith(f"{where}: cannot be read as Parquet (")
    assert message.endswith("); write it again")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ({"image": "uint8[64]"}, "column 'image' holds uint8[2], and the task wants uint8[64]"),
        ({"label": "float32"}, "column 'label' holds int64, and the task wants float32"),
        ({"png": "text"}, "column 'png' holds bytes, and the task wants text"),
        ({"labl": "int64"}, "no column 'labl'; did you mean 'label'? valid: image, label, png"),
    ],
)
def test_columns_are_what_the_task_declares(tmp_path: Path, declared: dict[str, str], problem: str) -> None:
    path = write(tmp_path / "a.parquet", image=fixed([[1, 2], [3, 4]], 2), label=[1, 2], png=[b"a", b"b"])
    assert refusal(Parquet(str(path), columns=declared)).startswith(f"{path}: {problem}")
    open_dataset(Parquet(str(path), columns={"image": "uint8[2]", "label": "int64"}))


def test_a_set_that_is_being_packed_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", label=[1])
    (tmp_path / "_packing").write_text("")
    assert refusal(Parquet(str(tmp_path))).startswith(f"{tmp_path}: is being packed, or packing it was cut off")


# -- decoding ----------------------------------------------------------------------------------


def decoded(columns: Any) -> dict[str, Any]:
    """Lengths and first elements, from bytes, text and lists."""
    return {
        "length": np.array([len(data) for data in columns["data"]]),
        "first": np.array([text[0] for text in columns["words"]]),
        "last": np.array([numbers[-1] for numbers in columns["tokens"]]),
        "label": columns["label"],
    }


@pytest.mark.parametrize("mode", ["memory", "streaming"])
def test_bytes_text_and_lists_pass_through_the_jobs_function(tmp_path: Path, mode: str) -> None:
    write(tmp_path / "a.parquet", data=[b"1", b"22"], words=["ab", "cd"], tokens=[[1], [2, 3]], label=[0, 1])
    write(tmp_path / "b.parquet", data=[b"", b"4444"], words=["ef", "gh"], tokens=[[4], [5, 6, 7]], label=[2, 3])
    data = open_dataset(Parquet(str(tmp_path), decode=decoded), in_mode(mode))
    assert {name: column.tolist() for name, column in data.take(np.array([3, 0, 2, 2])).items()} == {
        "length": [4, 1, 0, 0],
        "first": [ord(c) for c in "gaee"],
        "last": [7, 1, 4, 4],
        "label": [3, 0, 2, 2],
    }


@pytest.mark.parametrize(
    ("wrong", "found"),
    [([1, 2], "list"), (np.array(["a", "b"]), "<U1[2]"), (np.zeros((3, 2)), "float64[3, 2]")],
    ids=["no-array", "no-numbers", "rows"],
)
def test_what_a_decode_function_returns_is_checked(tmp_path: Path, wrong: Any, found: str) -> None:
    path = write(tmp_path / "a.parquet", data=[b"1", b"22"])
    data = open_dataset(Parquet(str(path), decode=lambda _: {"x": wrong}))
    with pytest.raises(DataError) as caught:
        data.take(np.array([0, 1]))
    assert str(caught.value) == (
        f"{path}: the decode function returns {found} as column 'x' for 2 rows: return a numpy array of numbers whose "
        "first axis is the rows"
    )


# -- corrupt row groups ------------------------------------------------------------------------


def spoiled(tmp_path: Path, *, groups: set[int]) -> Path:
    """Five row groups of two rows each, of which these hold other bytes than were written."""
    path = write(tmp_path / "a.parquet", label=pa.array([10 * n for n in range(10)]))
    data = bytearray(path.read_bytes())
    footer = pq.read_metadata(path)
    for number in groups:
        column = footer.row_group(number).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("mode", ["memory", "streaming"])
def test_a_corrupt_row_group_stops_the_run(tmp_path: Path, mode: str) -> None:
    path = spoiled(tmp_path, groups={3})
    with pytest.raises(CorruptDataError, match=re.escape(f"{path}, row group 3: cannot be read as Parquet")):
        open_dataset(Parquet(str(path)), in_mode(mode)).take(np.arange(10))


@pytest.mark.parametrize("mode", ["memory", "streaming"])
def test_a_corrupt_row_group_is_skipped_and_counted(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its samples' places are taken by those of the next one, so that length and order stay."""
    path = spoiled(tmp_path, groups={1, 4})
    data = open_dataset(Parquet(str(path)), in_mode(mode, skip=True))
    assert len(data) == 10
    assert data.take(np.arange(10))["label"].tolist() == [0, 10, 40, 50, 40, 50, 60, 70, 0, 10]
    assert Batches(data, 0, 0, DataConfig()).skipped_samples == 4
    assert f"skipped 2 samples: {path}, row group 4: cannot be read as Parquet" in caplog.text


@pytest.mark.parametrize("mode", ["memory", "streaming"])
def test_where_nothing_can_be_read_nothing_is_skipped(tmp_path: Path, mode: str) -> None:
    path = spoiled(tmp_path, groups={0, 1, 2, 3, 4})
    with pytest.raises(CorruptDataError, match="and no other row group can be read"):
        open_dataset(Parquet(str(path)), in_mode(mode, skip=True)).take(np.arange(10))


def test_a_file_that_goes_away_is_not_called_corrupt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=[1, 2])
    data = open_dataset(Parquet(str(path)), in_mode("streaming", skip=True))
    path.unlink()
    with pytest.raises(StorageUnavailableError, match="cannot be read"):
        data.take(np.array([0]))
