"""Groups of worker processes that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gloo import GlooGroup


@pytest.fixture(scope="session")
def two() -> Iterator[GlooGroup]:
    """Two workers."""
    group = GlooGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def three() -> Iterator[GlooGroup]:
    """Three workers."""
    group = GlooGroup(3)
    yield group
    group.close()


@pytest.fixture(scope="session")
def one() -> Iterator[GlooGroup]:
    """One worker."""
    group = GlooGroup(1)
    yield group
    group.close()
