"""What every test shares: a marked test that cannot run on this machine is skipped, and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import settings

# The machine is shared: how long one example takes says nothing.
settings.register_profile("orchestrator", deadline=None)
settings.load_profile("orchestrator")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker, why_not in WHY_NOT.items():
            if item.get_closest_marker(marker) is None:
                continue
            if marker not in reasons:
                reasons[marker] = why_not()
            if reason := reasons[marker]:
                item.add_marker(pytest.mark.skip(reason=reason))


def no_gpu() -> str | None:
    import torch  # only when a test asks for a GPU: a second and a half that unit tests need not pay

    if torch.cuda.is_available():
        return None
    return f"no CUDA device here (torch {torch.__version__})"


WHY_NOT: dict[str, Callable[[], str | None]] = {"gpu": no_gpu}
