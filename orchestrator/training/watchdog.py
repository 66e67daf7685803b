"""Notices that no step has been taken for far longer than steps usually take, and has that told and ended.

A hang is silent: a rank that waits in a collective for one that never comes uses no CPU and raises nothing. So a thread
looks at the clock. What usually takes long, an evaluation, a save, is no step: the watchdog rests meanwhile.
"""

from __future__ import annotations

import faulthandler
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Watchdog", "stacks"]

REMEMBERED = 50


class Watchdog:
    """Calls ``on_hang`` with what it saw once no ``beat`` has come for ``factor`` usual steps, and ``least_s``.

    It is awake from the first ``beat`` on, and asleep from a ``rest`` to the next ``beat``. Without ``on_hang`` it
    never wakes.
    """

    def __init__(
        self, on_hang: Callable[[str], None] | None = None, *, factor: float = 50.0, least_s: float = 600.0
    ) -> None:
        self._on_hang = on_hang
        self._factor = factor
        self._least_s = least_s
        self._beat_at: float | None = None
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """A step begins, and the one before it, if there was one, has ended."""
        now, before = time.monotonic(), self._beat_at
        if before is not None:
            self._steps.append(now - before)
        self._beat_at = now
        if self._thread is None and self._on_hang is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Something else than a step begins, which may take as long as it takes."""
        self._beat_at = None

    def close(self) -> None:
        """Watch no more."""
        self._end.set()

    def _watch(self) -> None:
        assert self._on_hang is not None
        while not self._end.wait(min(1.0, self._least_s / 4)):
            began, usual_s = self._beat_at, statistics.median(self._steps or (0.0,))
            if began is None:
                continue
            silent_s = time.monotonic() - began
            if silent_s > max(self._least_s, self._factor * usual_s) and self._beat_at == began:
                self._on_hang(f"no step for {silent_s:.0f} s, where {usual_s:.3g} s are usual")
                return


def stacks() -> str:
    """Where each thread of this process stands."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
