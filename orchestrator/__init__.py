"""Distributed training that keeps your recipe's progress and chooses the rest.

Importing this package costs nothing: each public name is fetched from the module that defines it on first use,
so neither torch, ray, deepspeed nor pydantic is loaded before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.job import Job, Task, load

__all__ = ["Job", "RunConfig", "Task", "load"]
__version__ = "0.1.0"

_HOME = {
    "Job": "orchestrator.job",
    "RunConfig": "orchestrator.config",
    "Task": "orchestrator.job",
    "load": "orchestrator.job",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
