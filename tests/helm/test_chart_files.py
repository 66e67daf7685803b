"""What is copied or generated in the chart is up to date: `make chart-files`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from kube import CHART, REPOSITORY


@pytest.fixture(scope="module")
def chart_files() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_files", REPOSITORY / "helm" / "chart_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rules_and_dashboards_are_those_of_the_cluster_folder(chart_files: ModuleType) -> None:
    """Byte for byte, none missing and none left over."""
    wanted = {str(path): (REPOSITORY / "cluster" / path).read_bytes() for path in chart_files.sources()}
    assert files_below(CHART / "files") == wanted, "run `make chart-files`"


def test_copying_takes_rules_and_dashboards_and_drops_what_is_gone(chart_files: ModuleType, tmp_path: Path) -> None:
    cluster, chart = tmp_path / "cluster", tmp_path / "chart"
    for name in ("prometheus/rules.yml", "prometheus/prometheus.yml", "grafana/a.json", "Dockerfile"):
        (cluster / name).parent.mkdir(parents=True, exist_ok=True)
        (cluster / name).write_text(name)
    (chart / "files").mkdir(parents=True)
    (chart / "files" / "old.json").write_text("")
    chart_files.copy_files(cluster, chart)
    assert files_below(chart / "files") == {
        "prometheus/rules.yml": b"prometheus/rules.yml",
        "grafana/a.json": b"grafana/a.json",
    }


def test_the_readme_has_the_table_of_values(chart_files: ModuleType) -> None:
    readme, values = (CHART / "README.md").read_text(), (CHART / "values.yaml").read_text()
    assert chart_files.with_table(readme, values) == readme, "run `make chart-files`"


def test_every_value_has_a_line_in_the_table(chart_files: ModuleType) -> None:
    values = (CHART / "values.yaml").read_text()
    listed = {line.split("`")[1] for line in chart_files.table(values).splitlines()[2:]}
    leaves = set(leaf_paths(yaml.safe_load(values), listed))
    assert leaves == listed


def leaf_paths(values: dict[str, Any], listed: set[str], above: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        path = f"{above}{key}"
        deeper = isinstance(value, dict) and value and path not in listed
        found += leaf_paths(value, listed, f"{path}.") if deeper else [path]
    return found
