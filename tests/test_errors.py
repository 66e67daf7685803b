"""The exception tree is the one its module draws."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from orchestrator import errors
from orchestrator.errors import OrchestratorError, RequestError, RunError, did_you_mean, explain_oserror


def drawn(docstring: str) -> list[tuple[int, str]]:
    """Return (depth, name) of every exception in a drawing."""
    found = re.findall(r"^((?:[│ ] {3})*)([├└]── )?(\w+Error)\b", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return [(len(bars) // 4 + bool(branch), name) for bars, branch, name in found]


def real(kind: type[Exception], depth: int = 0) -> list[tuple[int, str]]:
    rest = [line for child in kind.__subclasses__() for line in real(child, depth + 1)]
    return [(depth, kind.__name__), *rest]


def test_the_drawing_is_the_tree():
    assert drawn(errors.__doc__ or "") == real(OrchestratorError)


def test_every_exception_is_exported():
    functions = {"did_you_mean", "explain_oserror"}
    assert {name for _, name in real(OrchestratorError)} | functions == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize("kind", [getattr(errors, name) for _, name in real(OrchestratorError)])
def test_a_wrong_request_exits_with_2_and_all_else_with_1(kind):
    assert kind.exit_code == (2 if issubclass(kind, RequestError) else 1)
    assert not issubclass(kind, RequestError) or not issubclass(kind, RunError)


def test_did_you_mean_offers_the_nearest_name_and_all_valid_ones():
    assert did_you_mean("epoch", ["steps", "epochs"]) == "did you mean 'epochs'? valid: epochs, steps"
    assert did_you_mean("zzz", ["steps", "epochs"]) == "valid: epochs, steps"


def test_an_oserror_is_explained_by_path_and_reason():
    assert explain_oserror(Path("/x"), PermissionError(13, "Permission denied")) == "/x: Permission denied"
    assert explain_oserror(Path("/x"), OSError("odd")) == "/x: odd"
