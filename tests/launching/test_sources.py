"""What a source of data holds, how it is cut, and what of it is refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.errors import ConfigError, DataError
from orchestrator.launching import sources
from orchestrator.launching.sources import PackRequest, kind_named, pieces_of, read_piece


def png(value: int) -> bytes:
    """A grey image of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixel = zlib.compress(bytes([0, value]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def rows(source: Path, **options: Any) -> dict[str, list[Any]]:
    pieces, _ = pieces_of(PackRequest(str(source), "", **options))
    return pa.concat_tables([table for piece in pieces for table in read_piece(piece)]).to_pydict()


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows(source, **options)
    return str(caught.value)


def test_arrays_are_columns_of_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    images, labels = np.arange(5 * 12, dtype=np.float32).reshape(5, 3, 4), np.arange(5)
    np.save(tmp_path / "image.npy", images)
    np.save(tmp_path / "label.npy", labels)
    assert len(pieces_of(PackRequest(str(tmp_path), ""))[0]) > 1
    assert rows(tmp_path) == {"image": images.tolist(), "label": labels.tolist()}


def test_archives_are_pieces_of_the_same_columns(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([1, 2]), y=np.array([True, False]))
    np.savez(tmp_path / "b.npz", x=np.array([3]), y=np.array([True]))
    assert rows(tmp_path) == {"x": [1, 2, 3], "y": [True, False, True]}


def test_images_keep_their_bytes_and_get_the_class_of_their_folder(tmp_path: Path) -> None:
    for name, value in (("owl/a.png", 1), ("crow/x/b.png", 2), ("owl/.hidden.png", 3), ("owl/notes.txt", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(value))
    request = PackRequest(str(tmp_path), "", kind="images")
    assert pieces_of(request)[1] == ["crow", "owl"]
    assert rows(tmp_path, kind="images") == {"image": [png(2), png(1)], "label": [0, 1]}


def test_text_line_by_line_or_cut_to_one_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("drei")
    assert rows(tmp_path) == {"text": ["one", "two", "drei"]}
    cut = rows(tmp_path, length=5)["tokens"]
    assert b"".join(bytes(row) for row in cut) == b"\0one\n\ntwo\n\0drei"[:15]


def test_csv_files_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("x,name\n0.5,a\n1,b\n")
    (tmp_path / "2.csv").write_text("name,x\nc,2\n")
    assert rows(tmp_path) == {"x": [0.5, 1.0, 2.0], "name": ["a", "b", "c"]}


def test_what_is_no_source(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such file or folder"
    assert refusal(tmp_path).startswith(f"{tmp_path}: holds no file of a known kind: say which to pack with --as")
    np.save(tmp_path / "a.npy", np.zeros(2))
    (tmp_path / "a.csv").write_text("x\n1\n")
    assert refusal(tmp_path).startswith(f"{tmp_path}: holds 1 arrays and 1 csv: say which")
    assert refusal(tmp_path, kind="images").startswith(f"{tmp_path}: holds no images (.png")
    assert refusal(tmp_path, kind="csv", length=3).startswith("--length is for text")


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(2))
    np.save(tmp_path / "b.npy", np.zeros(3))
    assert refusal(tmp_path) == f"{tmp_path}: its arrays have different numbers of rows: a 2, b 3"
    np.save(tmp_path / "b.npy", np.array(["x", "y"]))
    assert refusal(tmp_path).startswith(f"{tmp_path / 'a.npy'}: array 'b' holds <U1[2]: rows of numbers are wanted")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'a.npy'}: cannot be read as an array (")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.png", b"no image", "does not begin as an image does"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("a.txt", b"a\0b", "holds a zero byte"),
        ("a.csv", b"x,y\n1,2\n1\n", "cannot be read as CSV"),
        ("a.csv", b"x,y\n1,2\n,3\n", "column 'x' has 1 empty values"),
        ("a.npy", b"\x93NUMPY", "cannot be read as an array"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: {problem}")


def test_kinds_have_names() -> None:
    assert kind_named("csv") == "csv"
    assert kind_named(None) is None
    with pytest.raises(ConfigError, match="--as 'imgaes'; did you mean 'images'"):
        kind_named("imgaes")
