"""How often requests to storage were tried again, and how often they failed for good, in this process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["OPERATIONS", "REQUESTS", "Operation", "Tally", "Trouble"]

Operation = Literal["read", "write", "list", "delete"]
OPERATIONS: tuple[Operation, ...] = ("read", "write", "list", "delete")


@dataclass(frozen=True)
class Trouble:
    """What became of the requests of one operation since the process began."""

    retries: int
    errors: int


class Tally:
    """Counts from any thread; empty until the process has a store that can fail for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._retries: Counter[Operation] = Counter()
        self._errors: Counter[Operation] = Counter()

    def open(self) -> None:
        """There is such a store: from now on also what did not happen is told."""
        self._open = True

    def retried(self, operation: Operation) -> None:
        """A request is made again."""
        with self._lock:
            self._retries[operation] += 1

    def failed(self, operation: Operation) -> None:
        """A request was given up, or refused."""
        with self._lock:
            self._errors[operation] += 1

    def troubles(self) -> Mapping[Operation, Trouble]:
        """Every operation's counts."""
        with self._lock:
            told = OPERATIONS if self._open else tuple({**self._retries, **self._errors})
            return {each: Trouble(self._retries[each], self._errors[each]) for each in told}


REQUESTS = Tally()
"""Of this process: stores are made where they are needed, and their trouble is told in one place."""
