"""Runs that all tests of this folder make smaller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.vision import digits
from trained_runs import GROUPS, train


@pytest.fixture(scope="session", autouse=True)
def _groups() -> Iterator[None]:
    yield
    for group in GROUPS.values():
        group.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The digits ResNet of half the usual width, trained for six epochs: about 98 %."""
    args = {"data": str(data), "epochs": 6.0, "width": 16}
    root = tmp_path_factory.mktemp("runs") / "digits"
    return train(root, digits(**args), "jobs.vision:digits", [f"{name}={value}" for name, value in args.items()])
