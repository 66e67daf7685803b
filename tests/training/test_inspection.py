"""What is found in a data set before a run would meet it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config import StorageConfig
from orchestrator.errors import DataError
from orchestrator.training import inspection
from orchestrator.training.inspection import inspect


def write(folder: Path, count: int = 2) -> None:
    for file in range(count):
        pixels = pa.FixedSizeListArray.from_arrays(np.arange(60, dtype=np.uint8), 6)
        table = pa.table({"image": pixels, "name": [f"n{n}" for n in range(10)], "png": [b"x"] * 10})
        pq.write_table(
            table, folder / f"{file}.parquet", row_group_size=4, write_page_checksum=True, compression="none"
        )


def test_a_sound_set(tmp_path: Path) -> None:
    write(tmp_path)
    told: list[tuple[int, int]] = []
    found = inspect(str(tmp_path), StorageConfig(), progress=lambda done, total: told.append((done, total)))
    assert (found.files, found.row_groups, found.rows, found.held) == (2, 6, 20, "in memory")
    assert found.columns == {"image": "uint8[6]", "name": "text", "png": "bytes"}
    assert (found.problems, found.verified) == ((), True)
    assert [line.split(":")[0] for line in found.advice] == ["column 'name' holds text", "column 'png' holds bytes"]
    assert told == [(n, 6) for n in range(1, 7)]


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    """In bytes that would read as other bytes: by the checksum of the page."""
    write(tmp_path, 1)
    path = tmp_path / "0.parquet"
    data, column = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(1).column(0)
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(bytes(data))
    found = inspect(str(tmp_path), StorageConfig())
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{path}, row group 1: cannot be read as Parquet (")
    assert inspect(str(tmp_path), StorageConfig(), verify=False).problems == ()


def test_large_row_groups_get_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(inspection, "LARGE_BYTES", 10)
    assert (
        inspect(str(tmp_path), StorageConfig())
        .advice[-1]
        .endswith("holds twice 16 of them: write smaller ones (`orchestrator data pack`), or set data.window")
    )


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*.parquet file in this folder"):
        inspect(str(tmp_path), StorageConfig())
