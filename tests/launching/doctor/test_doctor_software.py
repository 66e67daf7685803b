"""Versions and imports, held against declarations that the test makes."""

from __future__ import annotations

import dataclasses

from packaging.requirements import Requirement

from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.probes import Frameworks
from orchestrator.launching.doctor.software import CORE, declared_requirements, imports, packages
from orchestrator.planning.cluster import ClusterShape

CPU_ONLY = Frameworks(torch="2.13.0+cpu", embedded=ClusterShape(nodes=1, cpus=2.0), deepspeed="0.19.8")


def test_packages_are_held_against_the_declared_ranges() -> None:
    declared = [
        "torch>=2.13,<2.15",
        "ray[train,tune]>=2.60,<2.61",
        "pyarrow>=26",
        "numpy>=2",
        "typer>=0.20",
        'pywin32>=300; sys_platform == "win32"',
        'pytest>=8; extra == "dev"',
    ]
    installed = {"torch": "2.13.0+cpu", "ray": "2.59.1", "numpy": "2.4.0", "typer": "0.19"}
    assert packages(declared, installed.get) == [
        Finding("package.torch", "ok", "2.13.0+cpu (<2.15,>=2.13)"),
        Finding(
            "package.ray",
            "problem",
            "2.59.1: <2.61,>=2.60 is needed",
            "pip install 'ray[train,tune]<2.61,>=2.60'",
        ),
        Finding("package.pyarrow", "problem", "not installed: >=26 is needed", "pip install 'pyarrow>=26'"),
        Finding("package.typer", "problem", "0.19: >=0.20 is needed", "pip install 'typer>=0.20'"),
    ]


def test_without_a_declaration_the_versions_are_unknown() -> None:
    assert packages([]) == [
        Finding(
            "package.orchestrator",
            "warning",
            "orchestrator is not installed here, so the versions it needs are unknown",
            "pip install --editable .",
        )
    ]


def test_the_declaration_names_the_core_wherever_this_runs() -> None:
    assert {Requirement(text).name for text in declared_requirements()} >= {*CORE}


def test_imports_that_work() -> None:
    assert imports(CPU_ONLY) == [
        Finding("import.torch", "ok", "torch 2.13.0+cpu imports"),
        Finding("import.deepspeed", "ok", "DeepSpeed 0.19.8 imports"),
    ]


def test_an_import_that_fails_says_what_to_install() -> None:
    failed = dataclasses.replace(CPU_ONLY, deepspeed="", failure="ModuleNotFoundError: No module named 'hjson'")
    assert imports(failed) == [
        Finding("import.torch", "ok", "torch 2.13.0+cpu imports"),
        Finding("import.deepspeed", "problem", "ModuleNotFoundError: No module named 'hjson'", "pip install hjson"),
    ]
