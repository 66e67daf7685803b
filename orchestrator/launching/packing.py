"""The working directory as one zip: what git would keep, always the same bytes for the same files."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from orchestrator.errors import RequestError
from orchestrator.telemetry.human import size

__all__ = ["Package", "files_to_pack", "pack"]

LIMIT_BYTES = 512 * 2**20  # Ray keeps packages in the head's memory and refuses larger ones
IGNORE_FILES = (".gitignore", ".rayignore")
# Ray leaves these out too, whatever .gitignore says.
NEVER = (".git", ".venv", "venv", "__pycache__")
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """A packed working directory: the zip, how many files are in it, and its size in bytes."""

    path: Path
    files: int
    size_bytes: int


def pack(root: Path, target: Path, *, limit_bytes: int = LIMIT_BYTES) -> Package:
    """Pack what ``files_to_pack`` finds into ``target``.

    Raises:
        RequestError: nothing to pack, something unreadable, or a zip above ``limit_bytes``; says what is large.
    """
    files = sorted(files_to_pack(root))
    if not files:
        raise RequestError(
            f"{root} has no files to send: .gitignore leaves none; give another folder with --working-dir"
        )
    packed: Counter[str] = Counter()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            packed[path.relative_to(root).parts[0]] += _add(archive, root, path)
            if sum(packed.values()) > limit_bytes:
                raise RequestError(_too_large(root, packed, limit_bytes))
    return Package(path=target, files=len(files), size_bytes=target.stat().st_size)


def files_to_pack(root: Path) -> Iterator[Path]:
    """Files below ``root`` that no .gitignore or .rayignore on the way to them excludes. Links are not followed."""
    yield from _below(root, [])


def _below(folder: Path, rules: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[Path]:
    lines = [line for name in IGNORE_FILES for line in _lines(folder / name)]
    rules = [*rules, (folder, GitIgnoreSpec.from_lines(lines))] if lines else rules
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name in NEVER or _ignored(path, is_folder, rules):
            continue
        if is_folder:
            yield from _below(path, rules)
        elif entry.is_file():
            yield path


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _ignored(path: Path, is_folder: bool, rules: list[tuple[Path, GitIgnoreSpec]]) -> bool:
    """What git does: the innermost file with a pattern for this path decides, and a ``!`` takes it back."""
    for folder, spec in reversed(rules):
        name = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
        include = spec.check_file(name).include
        if include is not None:
            return include
    return False


def _add(archive: zipfile.ZipFile, root: Path, path: Path) -> int:
    """Write one file without its time; returns its size in the archive, in bytes."""
    info = zipfile.ZipInfo(path.relative_to(root).as_posix(), EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
    try:
        with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
            while chunk := source.read(2**20):
                target.write(chunk)
    except OSError as error:
        raise RequestError(
            f"cannot pack {path}: {error.strerror or error}; make it readable, or exclude it in .rayignore"
        ) from None
    return info.compress_size


def _too_large(root: Path, packed: Counter[str], limit_bytes: int) -> str:
    largest = ", ".join(f"{name} ({size(number)})" for name, number in packed.most_common(3))
    return (
        f"{root} packs to more than {size(limit_bytes)}, the most that Ray takes; largest so far: {largest}. Exclude "
        "data and results in .gitignore or .rayignore and let the job read them from shared storage, or put a zip "
        "there and give its address: --working-dir s3://BUCKET/code.zip"
    )
