"""Whether Python and the packages are the ones that orchestrator needs, and can be imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from orchestrator.launching.doctor.finding import Finding, ok, problem, warning
from orchestrator.launching.doctor.probes import Frameworks

__all__ = ["CORE", "declared_requirements", "imports", "installed_version", "packages", "python"]

CORE = ("torch", "ray", "deepspeed", "pyarrow", "pydantic")
"""Packages whose versions are told even where they are as declared."""


def python() -> list[Finding]:
    """Which Python this is; an older one than 3.11 does not come this far."""
    return [ok("python", ".".join(map(str, sys.version_info[:3])))]


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def packages(
    declared: Sequence[str] | None = None, installed: Callable[[str], str | None] = installed_version
) -> list[Finding]:
    """Hold what is installed against the ranges this distribution declares; beyond the core only faults are named."""
    requirements = declared_requirements() if declared is None else declared
    if not requirements:
        detail = "orchestrator is not installed here, so the versions it needs are unknown"
        return [warning("package.orchestrator", detail, "pip install --editable .")]
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    findings = [_package(requirement, installed(requirement.name)) for requirement in needed]
    return [f for f in findings if f.status != "ok" or f.check.removeprefix("package.") in CORE]


def declared_requirements() -> list[str]:
    """Requirements from the installed metadata, or from the checkout this file lies in; empty without both."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.requires("orchestrator") or []
    checkout = Path(__file__).parents[3] / "pyproject.toml"
    with contextlib.suppress(FileNotFoundError, tomllib.TOMLDecodeError, KeyError):
        return list(tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]["dependencies"])
    return []


def _package(requirement: Requirement, version: str | None) -> Finding:
    check = f"package.{requirement.name.lower()}"
    wanted = str(requirement.specifier) or "any version"
    requirement.marker = None
    remedy = f"pip install {shlex.quote(str(requirement))}"
    if version is None:
        return problem(check, f"not installed: {wanted} is needed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return problem(check, f"{version}: {wanted} is needed", remedy)
    return ok(check, f"{version} ({wanted})")


def imports(frameworks: Frameworks) -> list[Finding]:
    """Whether torch and DeepSpeed can be imported, one after the other."""
    if not frameworks.torch:
        return [problem("import.torch", frameworks.failure, _reinstall("torch", frameworks.failure))]
    torch = ok("import.torch", f"torch {frameworks.torch} imports")
    if not frameworks.deepspeed:
        return [torch, problem("import.deepspeed", frameworks.failure, _reinstall("deepspeed", frameworks.failure))]
    return [torch, ok("import.deepspeed", f"DeepSpeed {frameworks.deepspeed} imports")]


def _reinstall(package: str, failure: str) -> str:
    if missing := re.search(r"No module named '(\w+)", failure):
        return f"pip install {missing[1]}"
    version = installed_version(package)
    pinned = f"{package}=={version.partition('+')[0]}" if version else package
    return f"pip install --force-reinstall --no-cache-dir {pinned}"
