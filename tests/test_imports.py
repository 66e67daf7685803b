"""Starting is cheap: nothing heavy is imported before it is needed, and pure modules never import a framework."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import orchestrator

HEAVY = {"boto3", "deepspeed", "prometheus_client", "pyarrow", "ray", "sklearn", "torch"}
MOST_MODULES = {"-c": 10, "-m": 400}
"""That a start imports beside Python's own: a measure of its half a second that no machine's speed changes."""
PURE = ["fleet", "planning", "scheduling"]
EXEMPT = {"orchestrator.planning.profile"}  # traces the model with torch


def test_importing_the_package_loads_nothing_else() -> None:
    loaded = loaded_after("-c", "import orchestrator")
    assert not loaded & (HEAVY | {"pydantic", "numpy", "typer", "rich"})


def test_help_loads_no_framework() -> None:
    assert not loaded_after("-m", "orchestrator", "--help") & HEAVY


@pytest.mark.parametrize("arguments", [("-c", "import orchestrator"), ("-m", "orchestrator", "--help")], ids=" ".join)
def test_a_start_imports_little(arguments: tuple[str, ...]) -> None:
    own = len(imported_by("-c", "pass"))  # and those of other packages' .pth files
    assert len(imported_by(*arguments)) - own < MOST_MODULES[arguments[0]]


def test_the_config_and_the_job_load_no_framework() -> None:
    assert not loaded_after("-c", "import orchestrator.config, orchestrator.job") & HEAVY


def test_the_parts_that_only_compute_load_no_framework() -> None:
    modules = pure_modules()
    assert modules, "found none of the pure packages"
    assert not loaded_after("-c", f"import {', '.join(modules)}") & HEAVY


def loaded_after(*arguments: str) -> set[str]:
    """Top-level names of every module that ``python ARGUMENTS`` imported."""
    return {name.partition(".")[0] for name in imported_by(*arguments)}


def imported_by(*arguments: str) -> list[str]:
    """Every module that ``python ARGUMENTS`` imported."""
    stderr = run("-X", "importtime", *arguments).stderr
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return [line.rsplit("|", 1)[1].strip() for line in lines]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done


def pure_modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(orchestrator.__path__, prefix="orchestrator.")]
    return sorted(name for name in names if name.split(".")[1] in PURE and name not in EXEMPT)
