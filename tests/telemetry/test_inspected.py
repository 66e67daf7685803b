"""A data set as text."""

from __future__ import annotations

from orchestrator.telemetry.inspected import counted, inspection_lines

FOUND = {
    "uri": "s3://bucket/birds",
    "files": 2,
    "row_groups": 40,
    "rows": 12345,
    "size_bytes": 300 * 2**20,
    "largest_row_group_bytes": 8 * 2**20,
    "columns": {"image": "bytes", "label": "int64"},
    "held": "in memory",
    "verified": True,
    "problems": (),
    "advice": ("column 'image' holds bytes",),
}


def test_what_a_set_holds() -> None:
    assert inspection_lines({**FOUND, "classes": ["crow", "owl\x1b[2J"]}) == [
        "s3://bucket/birds",
        "  rows     12,345",
        "  files    2, 40 row groups",
        "  size     300 MiB uncompressed, the largest row group 8 MiB",
        "  read     in memory",
        "  columns  image: bytes",
        "           label: int64",
        "  classes  0 crow",
        "           1 owl?[2J",
        "  advice   column 'image' holds bytes",
        "  verified every row group was read",
    ]


def test_many_problems_are_counted() -> None:
    lines = inspection_lines({**FOUND, "advice": (), "problems": tuple(f"group {n}" for n in range(25))})
    assert lines[-21] == "  problems group 0"
    assert lines[-1] == "           ... and 5 more"
    assert not any("verified" in line for line in lines)


def test_progress() -> None:
    assert counted("checked", "row groups", 12, 4000, None) == "checked 12 of 4,000 row groups"
    assert counted("written", "files", 3, None, 5 * 2**20) == "written 3 files, 5 MiB"
