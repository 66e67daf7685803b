"""Checkpoints in a store: a run goes on from there bit for bit, whatever the store and the machine did."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import s3_server
from gloo import GlooGroup
from gloo_jobs import (
    Ended,
    Held,
    Noisy,
    Rows,
    Slow,
    Toy,
    dropped_blocks,
    mlp,
    new_run,
    run_loop,
    stored_loop,
    toy_config,
)
from orchestrator.config import AdamW, CheckpointConfig, FailureConfig, RunConfig, Stop, StorageConfig
from orchestrator.launching.places import Stored
from orchestrator.storage.claim import Claim
from orchestrator.storage.stored_run import StoredRun, files_of
from orchestrator.telemetry.records import read
from s3_server import BUCKET, Weed


def config_of(stage: int = 1, steps: int = 10, storage_budget_s: float = 60.0, **checkpoint: Any) -> RunConfig:
    config = toy_config(
        recipe={"optimizer": AdamW(learning_rate=0.01), "stop": Stop(steps=steps)},
        layout={"zero_stage": stage, "precision": "fp32", "micro_batch": 4},
        checkpoint=CheckpointConfig(**checkpoint),
    )
    return config.model_copy(update={"failures": FailureConfig(storage_budget_s=storage_budget_s)})


class Place:
    """A run in a store, and the machines that work on it: each has a disk of its own."""

    def __init__(self, uri: str, disks: Path, storage: StorageConfig | None = None) -> None:
        self.storage = storage or StorageConfig()
        self.run = StoredRun(uri, self.storage)
        self._disks = disks
        self._claim: Claim | None = None

    def order(self) -> Stored:
        """What a new driver hands to its workers."""
        if self._claim is not None:
            self._claim.release()
        self._claim = Claim.take(self.run.store, waiting=lambda _: None)
        return Stored(self.run.uri, self.storage, self._claim.number)

    def machine(self, name: str = "a") -> Mapping[str, str]:
        """Variables of the environment of the workers on a machine; with ``{rank}`` in its name each has its own."""
        return {"ORCHESTRATOR_CACHE": str(self._disks / name)} | {
            key: value for key, value in os.environ.items() if key.startswith("AWS_")
        }

    def losses(self) -> list[float]:
        copy = self._disks / f"copy-{secrets.token_hex(4)}"
        copy.mkdir()
        self.run.pull(copy)
        return [record["loss"] for record in read(copy / "metrics.jsonl")]

    def events(self) -> list[str]:
        copy = self._disks / f"copy-{secrets.token_hex(4)}"
        copy.mkdir()
        self.run.pull(copy)
        return [record["text"] for record in read(copy / "events.jsonl")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "store" / "toy"), tmp_path / "disks")


@pytest.fixture(scope="module")
def undisturbed(two: GlooGroup, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that most tests disturb."""
    root, driver = new_run(tmp_path_factory.mktemp("undisturbed") / "run")
    two.run(run_loop, config_of(), Toy(mlp), root, driver)
    return [record["loss"] for record in read(root / "metrics.jsonl")]


def alone(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"scale": config.scale.model_copy(update={"workers": 1})})


def no_error(ends: list[Ended]) -> None:
    assert {(end.error, end.message) for end in ends} == {("", "")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_goes_on_bit_for_bit_on_another_machine(two: GlooGroup, place: Place, tmp_path: Path, stage: int) -> None:
    task = Noisy(dropped_blocks, evaluation=Rows.made_up(21, seed=1))
    config = config_of(stage)
    two.run(run_loop, config, task, *new_run(tmp_path / "whole"))
    no_error(two.run(stored_loop, config, task, place.order(), place.machine("a"), 5))
    no_error(two.run(stored_loop, config, task, place.order(), place.machine("b")))
    assert place.losses() == [record["loss"] for record in read(tmp_path / "whole" / "metrics.jsonl")]
    assert [name.partition("-0")[0] for name in place.run.checkpoints()] == ["step", "step"]
    assert place.run.store.stat("attempts.jsonl") is not None


@pytest.mark.slow
def test_what_is_on_this_machines_disk_is_not_downloaded_again(
    two: GlooGroup, place: Place, undisturbed: list[float], tmp_path: Path
) -> None:
    no_error(two.run(stored_loop, config_of(), Toy(mlp), place.order(), place.machine(), 5))
    (name,) = place.run.checkpoints()
    for entry in list(place.run.store.list(f"checkpoints/{name}/state")):
        place.run.store.delete(entry.key)
    no_error(two.run(stored_loop, config_of(), Toy(mlp), place.order(), place.machine()))
    assert place.losses() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_machine_downloads_only_what_its_ranks_need(
    two: GlooGroup, one: GlooGroup, place: Place, tmp_path: Path, stage: int
) -> None:
    config = config_of(stage)
    no_error(two.run(stored_loop, config, Toy(mlp), place.order(), place.machine("a"), 5))
    (name,) = place.run.checkpoints()
    sizes = {entry.path: entry.size_bytes for entry in files_of(place.run.manifest(name))}
    no_error(two.run(stored_loop, config, Toy(mlp), place.order(), place.machine("b-{rank}")))
    for rank in (0, 1):
        there = downloaded(tmp_path / "disks" / f"b-{rank}", name)
        others = {f"rank-{1 - rank:05d}.pt"} | {path for path in sizes if f"zero_pp_rank_{1 - rank}_" in path}
        assert len(others) == (3 if stage == 3 else 2)
        assert there == {path: size for path, size in sizes.items() if path not in others}
    newest = place.run.checkpoints()[-1]
    no_error(one.run(stored_loop, alone(config_of(stage, 12)), Toy(mlp), place.order(), place.machine("c")))
    whole = {entry.path: entry.size_bytes for entry in files_of(place.run.manifest(newest))}
    assert "zero_to_fp32.py" in whole, "what DeepSpeed writes beside the shards is there too"
    assert downloaded(tmp_path / "disks" / "c", newest) == whole, "another number of workers needs everything"


def downloaded(disk: Path, name: str) -> dict[str, int]:
    """Size of every file of a checkpoint on a machine's disk."""
    (folder,) = disk.glob(f"runs/*/checkpoints/{name}")
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {path: size for path, size in files.items() if not path.startswith(".") and path != "manifest.json"}


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept(two: GlooGroup, place: Place) -> None:
    config = config_of(keep=2, interval_steps=2)
    place.run.store.write("checkpoints/step-00000099-0001.0001/state/orphan.pt", b"of a crash")
    no_error(two.run(stored_loop, config, Toy(mlp), place.order(), place.machine()))
    assert [name[:13] for name in place.run.checkpoints()] == ["step-00000008", "step-00000010"]
    folders = {entry.key.split("/")[1][:13] for entry in place.run.store.list("checkpoints/")}
    assert folders == {"step-00000008", "step-00000010"}, "orphans and notes are gone"
    assert not [entry for entry in place.run.store.list("checkpoints/") if ".parts" in entry.key]


@pytest.mark.slow
def test_a_corrupt_one_is_set_aside_and_the_one_before_used(
    two: GlooGroup, place: Place, undisturbed: list[float]
) -> None:
    no_error(two.run(stored_loop, config_of(interval_steps=3), Toy(mlp), place.order(), place.machine("a"), 7))
    newest = place.run.checkpoints()[-1]
    key = f"checkpoints/{newest}/state/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(place.run.store.read(key))
    data[len(data) // 2] ^= 1
    place.run.store.write(key, bytes(data))
    no_error(two.run(stored_loop, config_of(interval_steps=3), Toy(mlp), place.order(), place.machine("b-{rank}")))
    assert place.losses() == undisturbed
    (told,) = place.events()
    assert told.startswith(f"checkpoint {place.run.uri}/checkpoints/{newest} is corrupt: state/zero_pp_rank_1")
    assert told.endswith(f"set aside as {place.run.uri}/checkpoints/{newest}/set-aside.json")


@pytest.mark.slow
def test_with_none_left_the_run_refuses(two: GlooGroup, place: Place) -> None:
    no_error(two.run(stored_loop, config_of(), Toy(mlp), place.order(), place.machine("a"), 2))
    (name,) = place.run.checkpoints()
    place.run.store.write(f"checkpoints/{name}/manifest.json", b"{")
    ends = two.run(stored_loop, config_of(), Toy(mlp), place.order(), place.machine("b"))
    assert {end.error for end in ends} == {"CheckpointError"}
    assert ends[0].message.endswith("manifest.json cannot be read; no other is left: start anew with --fresh")


@pytest.mark.slow
def test_a_run_goes_on_with_one_worker(two: GlooGroup, one: GlooGroup, place: Place, undisturbed: list[float]) -> None:
    no_error(two.run(stored_loop, config_of(), Toy(mlp), place.order(), place.machine(), 5))
    no_error(one.run(stored_loop, alone(config_of()), Toy(mlp), place.order(), place.machine()))
    assert place.losses() == pytest.approx(undisturbed, rel=1e-4)


@pytest.mark.slow
def test_workers_that_were_superseded_stop(one: GlooGroup, place: Place) -> None:
    order = place.order()
    place.order()
    (end,) = one.run(stored_loop, alone(config_of()), Toy(mlp), order, place.machine())
    assert "a newer driver owns" in end.message


# -- a real store, and what becomes of it ------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Weed]:
    """A server of the test's own, to be killed."""
    server = Weed(tmp_path / "weed")
    server.start()
    values = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": s3_server.KEY}
    with s3_server.environment({**values, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}):
        yield server
    server.kill()


def stored_at(server: Weed, tmp_path: Path) -> Place:
    uri = f"s3://{BUCKET}/{secrets.token_hex(4)}/toy"
    return Place(uri, tmp_path / "disks", StorageConfig(endpoint_url=server.endpoint, retry_budget_s=0.5))


def killing(server: Weed, place: Place, then: Callable[[], None] = lambda: None) -> threading.Thread:
    """Kill the server once a checkpoint is there."""

    def kill() -> None:
        until(lambda: bool(place.run.checkpoints()))
        server.kill()
        then()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


NOT_UPLOADED = "checkpoint not uploaded, training goes on: "


@pytest.mark.s3
@pytest.mark.slow
def test_a_store_that_dies_holds_nobody_up(one: GlooGroup, mortal: Weed, tmp_path: Path) -> None:
    """Training goes on while nothing can be uploaded; once the store is back, everything is there."""
    place = stored_at(mortal, tmp_path)
    config = alone(config_of(steps=100, interval_s=0.2, storage_budget_s=400.0))
    away, back = tmp_path / "away", tmp_path / "back"

    def here(name: str) -> list[Any]:
        return [record for path in (tmp_path / "disks").rglob(name) for record in read(path)]

    def come_back() -> None:
        away.touch()
        until(lambda: any(event["text"].startswith(NOT_UPLOADED) for event in here("events.jsonl")))
        until(lambda: len(here("metrics.jsonl")) >= 40)
        mortal.start()
        back.touch()

    fate = killing(mortal, place, come_back)
    task = Held(mlp, until={40: away, 360: back})  # four to a step; a save is due long before the first
    no_error(one.run(stored_loop, config, task, place.order(), place.machine()))
    fate.join()
    assert len(place.losses()) == 100
    assert place.run.checkpoints()[-1].startswith("step-00000100")
    assert any(text.startswith(NOT_UPLOADED) for text in place.events())


@pytest.mark.s3
@pytest.mark.slow
def test_a_store_that_stays_away_ends_the_run_once_the_budget_is_spent(
    one: GlooGroup, mortal: Weed, tmp_path: Path
) -> None:
    place = stored_at(mortal, tmp_path)
    config = alone(config_of(steps=10_000, interval_s=0.2, storage_budget_s=2.0))
    fate = killing(mortal, place)
    (end,) = one.run(stored_loop, config, Slow(mlp, where="loss", rank=0), place.order(), place.machine())
    fate.join()
    assert end.error == "StorageLostError"
    assert "which is more than failures.storage_budget_s=2: " in end.message
    assert end.message.endswith("run the same command again: it goes on from the last checkpoint that is whole")
