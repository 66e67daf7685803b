"""A data set as text: what it holds, how a run would read it, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.telemetry import human

__all__ = ["counted", "inspection_lines"]

SHOWN = 20
"""Problems and classes named, at most."""


def inspection_lines(found: Mapping[str, Any]) -> list[str]:
    """The findings of an inspection as aligned lines, problems last; ``classes`` are listed with their labels."""
    rows = [
        ("rows", human.count(found["rows"])),
        ("files", f"{human.count(found['files'])}, {human.count(found['row_groups'])} row groups"),
        ("size", f"{human.size(found['size_bytes'])} uncompressed, {_largest(found)}"),
        ("read", found["held"]),
    ]
    rows += _each("columns", [f"{human.printable(name)}: {kind}" for name, kind in found["columns"].items()])
    rows += _each(
        "classes", [f"{label} {human.printable(name)}" for label, name in enumerate(found.get("classes", ()))]
    )
    rows += _each("advice", [human.printable(text) for text in found["advice"]])
    if found["problems"]:
        rows += _each("problems", [human.printable(text) for text in found["problems"]])
    elif found["verified"]:
        rows.append(("verified", "every row group was read"))
    return [human.printable(found["uri"]), *(f"  {label:<8} {text}" for label, text in rows)]


def counted(done: str, of: str, count: int, total: int | None, size_bytes: int | None) -> str:
    """How far something has come: ``checked 12 of 40 row groups``, ``written 3 files, 120 MiB``."""
    whole = f" of {human.count(total)}" if total is not None else ""
    size = f", {human.size(size_bytes)}" if size_bytes is not None else ""
    return f"{done} {human.count(count)}{whole} {of}{size}"


def _largest(found: Mapping[str, Any]) -> str:
    return f"the largest row group {human.size(found['largest_row_group_bytes'])}"


def _each(label: str, texts: list[str]) -> list[tuple[str, str]]:
    shown = texts[:SHOWN]
    if len(texts) > SHOWN:
        shown.append(f"... and {human.count(len(texts) - SHOWN)} more")
    return [(label if index == 0 else "", text) for index, text in enumerate(shown)]
