"""The trials of a search: their settings, how far each has come and what came of it, as its folder holds them.

``FOLDER/settings/NAME.json`` holds what was set, ``FOLDER/runs/NAME`` the run. What broke a trial lies beside its
settings: in ``NAME.failed.json`` where these or the job's code did not work, in ``NAME.lost.json`` where the machine
failed it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.scheduling.halving import SHARES, Standing
from orchestrator.storage.folder import RunFolder, read_json, write_json
from orchestrator.telemetry.records import Record, read

__all__ = ["Judged", "Trial", "Trials"]

How = Literal["failed", "lost"]


@dataclass(frozen=True)
class Trial:
    """One run of a search: what was set, how far it came, and the best of the metric on the way."""

    name: str
    settings: Mapping[str, str]
    state: str
    progress: float
    best: float | None


@dataclass(frozen=True)
class Judged:
    """What a trial is judged by: the share of its length that it had run, and the best of the metric until then."""

    share: float
    best: float | None


@dataclass(frozen=True)
class Trials:
    """All trials of the search in ``folder``, by the metric ``metric``, of which more is better if ``grows``."""

    folder: Path
    metric: str
    grows: bool

    def names(self) -> list[str]:
        """All whose settings are written down."""
        return sorted(path.stem for path in (self.folder / "settings").glob("trial-*.json") if "." not in path.stem)

    def run(self, name: str) -> RunFolder:
        """The run of a trial."""
        return RunFolder(self.folder / "runs" / name)

    def settings(self, name: str) -> dict[str, str]:
        """What was set, field to value."""
        return read_json(self._path(name)) or {}

    def keep(self, name: str, settings: Mapping[str, Any]) -> None:
        """Write down what is set in a trial, as ``--set`` takes it, which makes it one."""
        write_json(self._path(name), {field: _text(value) for field, value in settings.items()})

    def end(self, name: str, how: How, why: str) -> None:
        """Write down that a trial broke."""
        write_json(self._path(name, how), {"error": why})

    def begin(self, name: str) -> None:
        """A trial that was lost is tried again."""
        self._path(name, "lost").unlink(missing_ok=True)

    def why(self, name: str, *hows: How) -> str | None:
        """Why a trial broke in one of those ways; None if it did not."""
        found = (read_json(self._path(name, how)) for how in hows)
        return next((str(one["error"]) for one in found if one is not None), None)

    def state(self, name: str) -> str:
        """``failed``, ``lost``, ``finished`` or, where others were better, ``ended early``."""
        for how in ("failed", "lost"):
            if self._path(name, how).exists():
                return how
        return "finished" if self._finished(name) else "ended early"

    def standing(self, name: str, *, running: bool = False) -> Standing:
        """How it stands by the metric, where more of that is better by its negative.

        One evaluation past two rungs counts at both, so that a trial that is evaluated seldom need not be among the
        best twice by the same value. One without a value, or that failed on its way to a rung, is the worst there.
        """
        broke = self.why(name, "failed", "lost") is not None
        losses = []
        for share in SHARES:
            judged = self.judged(name, share)
            if judged is None:
                break
            losses.append(math.inf if judged.best is None else -judged.best if self.grows else judged.best)
        if self.why(name, "failed") is not None and len(losses) < len(SHARES):
            losses.append(math.inf)
        return Standing(name, tuple(losses), may_go_on=not (broke or running))

    def judged(self, name: str, share: float) -> Judged | None:
        """What a trial is judged by after ``share`` of its length; None if it has not come so far.

        That is its first evaluation from there on, whose own share may be larger; of one that finished, its last.
        """
        records = self._evaluations(name)
        if share >= 1.0 and self._finished(name):  # it may have reached its target before its length
            return Judged(1.0, self._best(records))
        length = self._length(name)
        for index, record in enumerate(records):
            if record["progress"] >= share * length:
                return Judged(min(1.0, record["progress"] / length), self._best(records[: index + 1]))
        return None

    def progress(self, name: str) -> float:
        """The share of its length at its last evaluation."""
        records = self._evaluations(name)
        return min(1.0, records[-1]["progress"] / self._length(name)) if records else 0.0

    def ranked(self) -> tuple[Trial, ...]:
        """From best to worst; those that measured nothing last."""
        found = [
            Trial(name, self.settings(name), self.state(name), self.progress(name), self._best(self._evaluations(name)))
            for name in self.names()
        ]
        sign = -1.0 if self.grows else 1.0
        return tuple(sorted(found, key=lambda trial: math.inf if trial.best is None else sign * trial.best))

    def points(self, name: str) -> tuple[tuple[float, float, int], ...]:
        """Progress, metric and step of each evaluation."""
        return tuple(
            (record["progress"], record["metrics"][self.metric], record["step"])
            for record in self._evaluations(name)
            if self.metric in record["metrics"]
        )

    def _path(self, name: str, how: How | None = None) -> Path:
        return self.folder / "settings" / (f"{name}.json" if how is None else f"{name}.{how}.json")

    def _length(self, name: str) -> float:
        """In units of progress; of a run without one no share can be said."""
        return float((read_json(self.run(name).plan) or {}).get("length") or math.inf)

    def _finished(self, name: str) -> bool:
        return (read_json(self.run(name).summary) or {}).get("state") == "finished"

    def _best(self, records: list[Record]) -> float | None:
        """Of values that are numbers: a run that diverged is judged by what it had been."""
        values = [value for r in records if math.isfinite(value := r["metrics"].get(self.metric, math.nan))]
        return (max if self.grows else min)(values, default=None)

    def _evaluations(self, name: str) -> list[Record]:
        return read(self.run(name).evaluations)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
