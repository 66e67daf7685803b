"""A torch profiler trace of chosen steps, left in the run's folder for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Tracer"]


class Tracer:
    """Traces steps ``first`` to ``last``, both included; with no steps it does nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, *, rank: int) -> None:
        self._steps = steps
        self._path = folder / f"steps-{steps[0]}-{steps[1]}-rank-{rank}.json.gz" if steps else None
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Called before ``step``: begin when it is the first, and write the file once the last is over."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and first <= step <= last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        elif step > last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if a trace is under way."""
        if self._profile is not None and self._path is not None:
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile, self._steps = None, None
