"""Whatever happens to workers, batch and restarts, every sample is seen once per epoch, in one order."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.config import SGD, DataConfig, Recipe, RunConfig, Stop
from orchestrator.job import Parquet
from orchestrator.planning.layout import Layout
from orchestrator.storage.store import open_store
from orchestrator.training.data import Batches, Stream, open_dataset
from orchestrator.training.streaming import StreamingDataset, WindowOrder
from s3_server import BUCKET, Weed

seeds = st.integers(0, 2**32 - 1)
orders = st.builds(
    WindowOrder,
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20).map(tuple),
    window=st.integers(1, 8),
    lanes=st.integers(1, 8),
    block=st.integers(1, 30),
)


def stream(order: WindowOrder, seed: int = 0) -> Stream:
    return Stream(sum(order.sizes), seed, order)


# -- the order ---------------------------------------------------------------------------------


@given(orders, seeds)
def test_every_epoch_holds_every_sample_once(order: WindowOrder, seed: int) -> None:
    n = sum(order.sizes)
    for epoch in range(3):
        assert sorted(stream(order, seed).indices(epoch * n, n).tolist()) == list(range(n))


@given(orders, seeds, st.lists(st.integers(1, 60), max_size=8), st.integers(0, 300))
def test_the_order_is_the_same_from_wherever_it_is_taken_up(
    order: WindowOrder, seed: int, counts: list[int], start: int
) -> None:
    whole = stream(order, seed).indices(0, start + sum(counts)).tolist()
    for count in counts:
        assert stream(order, seed).indices(start, count).tolist() == whole[start : start + count]
        start += count


@given(orders, seeds)
def test_a_window_holds_so_many_row_groups(order: WindowOrder, seed: int) -> None:
    at, left = 0, len(order.sizes)
    while left > 0:
        part = stream(order, seed).rest(at)
        assert len(np.unique(order.groups_of(part))) == min(order.window, left)
        at, left = at + len(part), left - order.window
    assert at == sum(order.sizes)


def test_epochs_windows_and_seeds_are_shuffled_differently() -> None:
    order = WindowOrder((10,) * 8, window=2, lanes=1, block=8)
    whole = stream(order).indices(0, 160)
    groups = order.groups_of(whole)
    assert whole[:80].tolist() != whole[80:].tolist()
    assert whole[:80].tolist() != stream(order, 1).indices(0, 80).tolist()
    assert len(np.unique(groups[:20])) == 2
    first, second = np.argsort(whole[:20]), np.argsort(whole[20:40])
    assert first.tolist() != second.tolist()


def test_the_order_is_the_recorded_one() -> None:
    """On every machine and with every numpy: a run that is resumed elsewhere must not see another order."""
    order = WindowOrder((3, 2, 4, 3), window=2, lanes=1, block=4)
    assert stream(order, 3).indices(0, 15).tolist() == [8, 0, 1, 6, 5, 2, 7, 4, 11, 3, 10, 9, 1, 9, 10]
    lanes = WindowOrder((3, 2, 4, 3), window=2, lanes=2, block=4)
    assert stream(lanes, 3).indices(0, 15).tolist() == [6, 5, 2, 0, 8, 7, 1, 11, 10, 3, 4, 9, 1, 2, 10]


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_with_as_many_lanes_a_worker_reads_its_part(workers: int) -> None:
    order = WindowOrder((64,) * 32, window=16, lanes=8, block=128)
    layout = Layout(workers=workers, micro_batch=128 // workers, accumulation=1)
    steps = range(0, 32 * 64, 128)
    read = []
    for rank in range(workers):
        mine = [np.concatenate(stream(order).micro_batches(start, layout, rank)) for start in steps]
        read.append(len(np.unique(order.groups_of(np.concatenate(mine)))))
    assert read == [32 // workers] * workers


@given(orders, seeds)
def test_every_block_mixes_its_lanes(order: WindowOrder, seed: int) -> None:
    """As far as whole samples allow, each lane has the same share of every block as of the window."""
    part = stream(order, seed).rest(0)
    groups = order.groups_of(part)
    shuffled = np.unique(groups[np.sort(np.unique(groups, return_index=True)[1])])
    for group in shuffled:
        if order.lanes < len(shuffled):
            continue  # several groups share a lane
        share = order.sizes[group] / len(part)
        for start in range(0, len(part) - order.block, order.block):
            count = int((groups[start : start + order.block] == group).sum())
            assert abs(count - share * order.block) <= 1 + len(shuffled)


# -- exactly once ------------------------------------------------------------------------------

ROWS = 103  # a prime: no batch divides it


def config(**data: Any) -> RunConfig:
    recipe = Recipe(batch=8, optimizer=SGD(learning_rate=0.1), stop=Stop(epochs=1))
    return RunConfig(name="data", recipe=recipe, data=DataConfig(**data))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for number, rows in enumerate(np.array_split(np.arange(ROWS), 3)):
        blobs = [b"%d" % n for n in rows]
        table = pa.table({"id": rows, "blob": blobs, "pair": pa.FixedSizeListArray.from_arrays(np.repeat(rows, 2), 2)})
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=7, write_page_checksum=True)
    return folder


@pytest.fixture
def in_s3(s3: Weed, files: Path) -> str:
    """The same files in S3."""
    store = open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}")
    for path in files.iterdir():
        store.upload(path, path.name)
    return store.uri


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, files: Path) -> str:
    """The files in a folder and in S3."""
    return str(files) if request.param == "local" else str(request.getfixturevalue("in_s3"))


def decode(columns: Any) -> dict[str, Any]:
    return {"id": columns["id"], "blob": np.array([int(blob) for blob in columns["blob"]]), "pair": columns["pair"]}


@dataclass(frozen=True)
class Life:
    """From the start of a worker group to its kill: the layout of each step, and after which step it last saved."""

    workers: int
    steps: tuple[tuple[int, int], ...]
    saved_after: int


@st.composite
def lives(draw: st.DrawFn) -> Life:
    """Micro batch and accumulation stay or change from one step to the next, as a policy wants them."""
    layouts = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3))
    steps = tuple(layout for layout in layouts for _ in range(draw(st.integers(1, 2))))
    return Life(draw(st.integers(1, 4)), steps, draw(st.integers(0, len(steps))))


def seen(open_batches: Any, lived: Sequence[Life], seed: int) -> tuple[list[int], list[int]]:
    """The samples that count, in the order of the stream, and those of steps that were lost with a kill."""
    order: list[int] = []
    lost: list[int] = []
    for life in lived:
        workers, saved = [open_batches(seed, rank) for rank in range(life.workers)], len(order)
        for number, (micro_batch, accumulation) in enumerate(life.steps, start=1):
            layout, at = Layout(life.workers, micro_batch, accumulation), len(order)
            for worker in workers:
                for batch in worker.at(at, layout):
                    assert batch["pair"].shape == (layout.micro_batch, 2)
                    assert batch["id"].tolist() == batch["blob"].tolist() == batch["pair"][:, 1].tolist()
                    order += batch["id"].tolist()
            saved = len(order) if number == life.saved_after else saved
        lost += order[saved:]
        del order[saved:]
    return order, lost


MODES = pytest.mark.parametrize(("mode", "lanes"), [("memory", 1), ("streaming", 1), ("streaming", 2)])


@MODES
@settings(max_examples=25)
@given(st.lists(lives(), min_size=1, max_size=4), seeds)
def test_every_sample_once_per_epoch_whatever_happens(
    files: Path, mode: str, lanes: int, lived: list[Life], seed: int
) -> None:
    """Each life has new workers, a new number of them, other batches, and goes on at the last checkpoint's cursor."""
    check_lives(str(files), mode, lanes, lived, seed)


@pytest.mark.s3
@MODES
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(lives(), min_size=2, max_size=3), seeds)
def test_the_same_from_s3(in_s3: str, mode: str, lanes: int, lived: list[Life], seed: int) -> None:
    check_lives(in_s3, mode, lanes, lived, seed)


def check_lives(place: str, mode: str, lanes: int, lived: Sequence[Life], seed: int) -> None:
    settings_ = config(mode=mode, window=3, lanes=lanes, ahead=1, threads=2)

    def open_batches(seed: int, rank: int) -> Batches:
        return Batches(open_dataset(Parquet(place, decode=decode), settings_), seed, rank, settings_.data)

    order, lost = seen(open_batches, lived, seed)
    assert len(order) + len(lost) == sum(life.workers * micro * times for life in lived for micro, times in life.steps)
    undisturbed = Stream.over(open_dataset(Parquet(place, decode=decode), settings_), seed)
    assert order == undisturbed.indices(0, len(order)).tolist()
    for epoch in range(len(order) // ROWS):
        assert sorted(order[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))


def test_a_layout_may_change_between_any_two_steps(place: str) -> None:
    """As the policy does: the same workers, and what was made ahead is for another layout."""
    settings_ = config(mode="streaming", window=3, ahead=2)
    source = Parquet(place, columns=("id",))
    batches = [Batches(open_dataset(source, settings_), 5, rank, settings_.data) for rank in range(2)]
    order: list[int] = []
    for micro, accumulation in [(4, 1), (4, 1), (2, 3), (8, 1), (8, 2), (1, 1), (30, 2), (4, 1)] * 3:
        layout, at = Layout(2, micro, accumulation), len(order)
        for worker in batches:
            order += np.concatenate([batch["id"] for batch in worker.at(at, layout)]).tolist()
    assert order == Stream.over(batches[0].dataset, 5).indices(0, len(order)).tolist()


# -- what is held ------------------------------------------------------------------------------


def streaming(files: Path, columns: Sequence[str] = ("id",), **data: Any) -> tuple[StreamingDataset, RunConfig]:
    settings_ = config(mode="streaming", **data)
    dataset = open_dataset(Parquet(str(files), columns=tuple(columns)), settings_)
    assert isinstance(dataset, StreamingDataset)
    return dataset, settings_


def test_two_windows_are_held_and_no_more(files: Path) -> None:
    dataset, settings_ = streaming(files, window=3, ahead=0)
    batches, layout, most = Batches(dataset, 0, 0, settings_.data), Layout(1, 4, 1), 0
    for step in range(2 * ROWS // 4):
        batches.at(step * 4, layout)
        most = max(most, len(dataset.groups.held))
    assert 3 <= most <= 9, "of 15: the window, the next, and at its end the one after"


def test_what_comes_next_is_read_before_it_is_asked_for(files: Path) -> None:
    dataset, settings_ = streaming(files, window=3, ahead=0)
    batches, layout = Batches(dataset, 0, 0, settings_.data), Layout(1, 4, 1)
    batches.at(0, layout)
    window = len(batches.stream.rest(0))
    following = batches.stream.rest(window)
    assert set(dataset.order.groups_of(following).tolist()) <= dataset.groups.held


def test_evaluation_reads_from_front_to_back(files: Path) -> None:
    dataset, _ = streaming(files)
    for start in range(0, ROWS, 10):
        positions = np.arange(start, min(start + 10, ROWS))
        assert dataset.take(positions)["id"].tolist() == positions.tolist()
        assert len(dataset.groups.held) <= 4


def test_auto_depends_on_the_size_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.training import data

    source = Parquet(str(files), columns=("id",))
    assert not isinstance(open_dataset(source, config()), StreamingDataset)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    assert isinstance(open_dataset(source, config()), StreamingDataset)
    assert not isinstance(open_dataset(source, config(mode="memory")), StreamingDataset)
