"""The thread that folds what a process noted into its meter and sends the hub one snapshot a second.

The training thread only appends to a queue. A hub that is slow, dead or not there costs it nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, ParamSpec

from orchestrator.telemetry.meter import Counted, Meter, Snapshot

__all__ = ["Publisher", "Send"]

Send = Callable[[Snapshot], Counted]
"""Hands a snapshot to the hub and returns what it holds of earlier incarnations. It may block or raise ``OSError``."""
P = ParamSpec("P")
log = logging.getLogger(__name__)
INTERVAL_S = 1.0
FAREWELL_S = 2.0
NOTED = 100_000
"""Notes that are kept while the thread does not come to fold them; the oldest go first."""


class Publisher:
    """Takes notes without waiting, and sends what they amount to from a thread of its own."""

    def __init__(
        self,
        send: Send,
        *,
        run: str,
        source: str,
        attempt: int,
        sample: Callable[[Meter], None] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """``sample`` is called before each snapshot, in the publisher's thread, for what is only read, never noted."""
        self._send = send
        self._about: dict[str, Any] = {"run": run, "source": source, "attempt": attempt, "started": time.time()}
        self._sample = sample
        self._interval_s = interval_s
        self._meter = Meter()
        self._notes: deque[Callable[[], None]] = deque(maxlen=NOTED)
        self._before: Counted | None = None
        self._complained = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def note(self, observe: Callable[Concatenate[Meter, P], None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Have ``observe`` called with the meter and these values, which nobody may change afterwards."""
        self._notes.append(lambda: observe(self._meter, *args, **kwargs))

    def close(self) -> None:
        """Send the last snapshot; give up after a moment."""
        self._end.set()
        self._thread.join(FAREWELL_S)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._end.wait(max(0.0, due - time.monotonic())):
            # A hub that did not answer for a while is not sent the snapshots that were missed meanwhile.
            due = max(due + self._interval_s, time.monotonic())
            self._push()
        self._push(leaving=True)

    def _push(self, *, leaving: bool = False) -> None:
        while self._notes:
            self._guarded(self._notes.popleft())
        if self._sample is not None:
            self._guarded(partial(self._sample, self._meter))
        snapshot = Snapshot(
            **self._about,
            own=self._meter.counted(),
            totals=self._meter.totals(),
            gauges=self._meter.gauges(),
            before=self._before,
            leaving=leaving,
        )
        try:
            self._before = self._send(snapshot)
        except OSError:
            if self._about["source"].isdigit():
                self._meter.count("orchestrator_pushes_failed_total")

    def _guarded(self, observe: Callable[[], None]) -> None:
        """A note that cannot be folded costs itself alone; the first of them is told of in the process' log."""
        try:
            observe()
        except Exception:  # a thread of its own: what ended it would end these metrics unseen
            if not self._complained:
                self._complained = True
                log.warning("metrics: a note cannot be folded and is left out; so are others like it", exc_info=True)
