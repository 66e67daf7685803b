"""Bring the chart's copies up to date: rules and dashboards from ``cluster/``, and the table of values in its README.

Run by ``make chart-files``. Helm packs only what lies inside the chart, so these are copies; tests hold them equal.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

CHART = Path(__file__).parent / "orchestrator"
CLUSTER = Path(__file__).parents[1] / "cluster"
COPIED = ("prometheus/rules.yml", "grafana/*.json")
BEGIN, END = "<!-- values: make chart-files -->\n", "<!-- end of values -->\n"
LINE = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z0-9_]+):(?: (?P<value>.*))?")


def sources(cluster: Path = CLUSTER) -> list[Path]:
    """The files of ``cluster/`` that belong into the chart, relative to it."""
    return sorted(path.relative_to(cluster) for pattern in COPIED for path in cluster.glob(pattern))


def copy_files(cluster: Path = CLUSTER, chart: Path = CHART) -> None:
    """Make ``files/`` of the chart hold these and nothing else."""
    shutil.rmtree(chart / "files", ignore_errors=True)
    for path in sources(cluster):
        (chart / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cluster / path, chart / "files" / path)


def table(values: str) -> str:
    """The table of values, from the comments that begin with ``# --``; a key without one only leads to others."""
    rows = [f"| `{path}` | `{value}` | {text} |" for path, value, text in _rows(values.splitlines())]
    return "\n".join(["| value | default | what it is |", "| --- | --- | --- |", *rows]) + "\n"


def _rows(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    path: list[str] = []
    text = ""
    for number, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith("# -- "):
            text = stripped.removeprefix("# -- ")
        elif match := LINE.fullmatch(line):
            path = [*path[: len(match["indent"]) // 2], match["key"]]
            if text:
                yield ".".join(path), match["value"] or _nested(lines[number + 1]), text.replace("|", "\\|")
            text = ""


def _nested(line: str) -> str:
    return "{" + line.strip() + "}"


def with_table(readme: str, values: str) -> str:
    """``readme`` with its table of values renewed."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + table(values) + END + rest.partition(END)[2]


if __name__ == "__main__":
    copy_files()
    readme = CHART / "README.md"
    readme.write_text(
        with_table(readme.read_text(encoding="utf-8"), (CHART / "values.yaml").read_text(encoding="utf-8"))
    )
