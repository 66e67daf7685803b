"""What became of a run's wall time since its first attempt: steps that count, and what was lost, by cause.

A fold over the records of ``attempts.jsonl`` and ``metrics.jsonl``, in the order of their times: the driver folds them
as they come, the report all at once. Useful and lost time together are the wall time up to the last record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.telemetry.metrics import PARTS

__all__ = ["USEFUL", "Account", "account", "time_by_part", "useful_s"]

USEFUL = ("forward", "backward", "communication", "optimizer")
NAMED = ("data_wait", "checkpoint", "evaluation")
"""Parts of the wall time between steps that are lost by a cause of their own; the rest goes to ``other``."""


@dataclass(frozen=True)
class Account:
    """Where the time went. Times are s, ``began`` and ``last`` are unix times."""

    began: float | None = None
    last: float = 0.0
    attempts: int = 0
    step: int = 0
    useful_s: float = 0.0
    lost_s: Mapping[str, float] = field(default_factory=dict)
    """By cause: ``startup``, a part, ``repeated`` and ``skipped`` steps, or what ended the attempt before."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Starts after the first, by what had ended the attempt before."""
    starting: bool = False

    def after_attempt(self, record: Mapping[str, Any]) -> Account:
        """With one record of ``attempts.jsonl``: an attempt started or ended."""
        now = record["time"]
        if record["event"] != "started":
            return self.until(now, "ended" if self.starting else "other")
        if self.began is None:
            began = now - (record.get("startup_s") or 0.0)
            first = replace(self, began=began, last=began, attempts=1, step=record["step"], starting=True)
            return first.until(now, "startup")
        cause, repeated_s = record.get("cause") or "unknown", record.get("repeated_s") or 0.0
        # Of steps that this fold has seen the time moves; of steps that are gone from the records it lies in the gap.
        seen = min(repeated_s, self.useful_s) if self.step > record["step"] else 0.0
        moved = replace(self, useful_s=self.useful_s - seen, last=self.last + repeated_s - seen)
        lost = moved.losing("repeated", repeated_s).until(now, cause)
        restarts = {**self.restarts, cause: self.restarts.get(cause, 0) + 1}
        return replace(lost, attempts=self.attempts + 1, step=record["step"], restarts=restarts, starting=True)

    def after_step(self, record: Mapping[str, Any]) -> Account:
        """With one record of ``metrics.jsonl``."""
        if self.began is None:
            return self
        gap = max(0.0, record["time"] - self.last)
        useful = min(gap, useful_s(record))
        lost, left = dict(self.lost_s), gap - useful
        counts = not record.get("skipped")
        if not counts:
            _add(lost, "skipped", useful)
        if not self.starting and (parts := record.get("parts")):
            for part in NAMED:
                _add(lost, part, named := min(left, parts.get(part, 0.0)))
                left -= named
        _add(lost, "startup" if self.starting else "other", left)
        return replace(
            self,
            useful_s=self.useful_s + useful * counts,
            lost_s=lost,
            last=max(self.last, record["time"]),
            step=record["step"],
            starting=False,
        )

    def goodput_ratio(self, now: float) -> float | None:
        """Time of steps that count over wall time since the first attempt; None before there was one."""
        return self.useful_s / (now - self.began) if self.began is not None and now > self.began else None

    def until(self, now: float, cause: str) -> Account:
        return replace(self.losing(cause, now - self.last), last=max(now, self.last))

    def losing(self, cause: str, seconds: float) -> Account:
        """With so much time lost by ``cause``."""
        lost = dict(self.lost_s)
        _add(lost, cause, seconds)
        return replace(self, lost_s=lost)


def account(attempts: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]) -> Account:
    """The account of a run from all its records."""
    events = sorted([*attempts, *metrics], key=lambda record: record["time"])
    found = Account()
    for record in events:
        found = found.after_attempt(record) if "event" in record else found.after_step(record)
    return found


def time_by_part(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the wall time between steps by part, as rank 0 saw them; empty where they were not timed."""
    found = dict.fromkeys(PARTS, 0.0)
    for record in metrics:
        for part, seconds in (record.get("parts") or {}).items():
            found[part] = found.get(part, 0.0) + seconds
    return {part: seconds for part, seconds in found.items() if seconds > 0}


def useful_s(record: Mapping[str, Any]) -> float:
    """Seconds of a step that moved it on: what was measured in parts, else the step's own time."""
    parts = record.get("parts")
    return sum(parts.get(part, 0.0) for part in USEFUL) if parts else float(record["step_time_s"])


def _add(lost: dict[str, float], cause: str, seconds: float) -> None:
    if seconds > 0:
        lost[cause] = lost.get(cause, 0.0) + seconds
