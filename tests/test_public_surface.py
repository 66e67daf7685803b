"""The public surface is a list; adding to it or taking from it is a decision that shows up here."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import orchestrator

EXPORTED = ["Job", "RunConfig", "Task", "load"]


def test_the_exported_names_are_these() -> None:
    assert orchestrator.__all__ == EXPORTED
    assert set(EXPORTED) <= set(dir(orchestrator))


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_is_the_one_its_module_defines(name: str) -> None:
    exported = getattr(orchestrator, name)
    assert exported is getattr(importlib.import_module(exported.__module__), name)
    assert exported.__module__.startswith("orchestrator.")


def test_type_checkers_see_the_names_that_the_lazy_import_serves() -> None:
    tree = ast.parse(Path(orchestrator.__file__).read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orchestrator.")
        for alias in node.names
    }
    assert homes == orchestrator._HOME


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(AttributeError, match="it exports Job, RunConfig, Task, load"):
        orchestrator.job_config  # noqa: B018


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", orchestrator.__version__)


OPTIONS = {
    "compress": [
        "--calibrate",
        "--epochs",
        "--int8-aware",
        "--json",
        "--max-latency",
        "--max-size",
        "--metric",
        "--min-accuracy",
        "--pattern",
        "--prune",
        "--student",
        "--to",
        "run",
    ],
    "dashboards": ["--json", "--output"],
    "data check": ["--endpoint-url", "--json", "--quick", "uri"],
    "data pack": [
        "--address",
        "--as",
        "--endpoint-url",
        "--json",
        "--length",
        "--overwrite",
        "--row-group-mib",
        "--seed",
        "--shuffle",
        "destination",
        "source",
    ],
    "doctor": ["--address", "--folder", "--json", "job"],
    "export": ["--calibrate", "--json", "--out", "--to", "run"],
    "explain": ["--json", "run"],
    "export-weights": ["--json", "--overwrite", "file", "run"],
    "jobs": ["--address", "--json"],
    "logs": ["--address", "--follow", "--json", "run"],
    "metrics": ["--json", "--markdown"],
    "monitor down": ["--folder", "--json"],
    "monitor up": ["--folder", "--hub", "--interval", "--json", "--port"],
    "plan": [
        "--accelerator",
        "--address",
        "--arg",
        "--deepspeed-config",
        "--explain",
        "--json",
        "--network",
        "--nodes",
        "--set",
        "--workers",
        "job",
    ],
    "queue move": ["--address", "--json", "--priority", "--queue", "--working-dir", "name"],
    "queue pause": ["--address", "--json", "--working-dir", "name"],
    "queue quota": ["--address", "--json", "--working-dir", "devices", "queue"],
    "queue resume": ["--address", "--json", "--working-dir", "name"],
    "replay": ["--json", "--policy", "--set", "run"],
    "run": [
        "--address",
        "--arg",
        "--force-config",
        "--fresh",
        "--from-checkpoint",
        "--json",
        "--priority",
        "--probe",
        "--profile",
        "--queue",
        "--set",
        "job",
    ],
    "status": ["--address", "--json", "run"],
    "stop": ["--address", "--json", "--wait", "run"],
    "submit": [
        "--address",
        "--arg",
        "--context",
        "--driver-cpus",
        "--dry-run",
        "--env",
        "--follow",
        "--force-config",
        "--fresh",
        "--json",
        "--kubernetes",
        "--namespace",
        "--pip",
        "--priority",
        "--queue",
        "--release",
        "--set",
        "--working-dir",
        "job",
    ],
    "wait": ["--address", "--json", "--timeout-s", "run"],
    "tune": [
        "--address",
        "--arg",
        "--json",
        "--metric",
        "--mode",
        "--optuna",
        "--range-test",
        "--search",
        "--set",
        "--trials",
        "job",
    ],
}


def test_the_commands_and_their_options_are_these() -> None:
    from typer.main import get_command

    from orchestrator.cli import app

    commands: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        commands |= {f"{name} {sub}": c for sub, c in getattr(command, "commands", {}).items()} or {name: command}
    found = {
        name: sorted(
            parameter.name if parameter.param_type_name == "argument" else parameter.opts[0]
            for parameter in command.params
        )
        for name, command in commands.items()
    }
    assert found == OPTIONS
