"""What Ray Tune is told to run next in a search: a trial's way to its next rung (``scheduling.halving``).

Each such way is a trial of its own to Ray Tune, which runs to its end: nothing is killed while it trains. What has come
of them lies in the search's folder alone, so that a search that was interrupted goes on by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from orchestrator.launching.trials import Trials
from orchestrator.scheduling.halving import FACTOR, SHARES, Standing, goes_on, goes_on_at_last

__all__ = ["Halving"]


class Halving(Searcher):
    """Hands out trials, those first that go on, then those that have not begun; ``more`` draws further ones.

    ``count`` is how many there are to be, and ``more`` a searcher of Ray Tune that has all it needs to know.
    """

    def __init__(self, trials: Trials, count: int, more: Any, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._trials = trials
        self._count = count
        self._more = more
        self._tell = tell
        self._running: dict[str, tuple[str, int]] = {}
        self._drawn: set[str] = set()
        self._waits = False

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes it down for a restore of its own, which a search does not need; nobody listens there."""
        return {**self.__dict__, "_tell": None}

    def suggest(self, trial_id: str) -> Any:
        """A trial's name and the share of its length to run it to; None where that hangs on those that run."""
        if self._waits:
            return None
        standings = self._standings()
        if (found := goes_on(standings)) is not None:
            came = sum(len(one.losses) >= len(found.losses) for one in standings)
            self._tell(f"{found.name} goes on: in the best {came // FACTOR} of {came} so far")
            return self._run(trial_id, found)
        if (fresh := next((one for one in standings if not one.losses and one.may_go_on), None)) is not None:
            return self._run(trial_id, fresh)
        if len(standings) < self._count:
            return self._draw(trial_id)
        if self._running:
            self._waits = True  # until one ends: Ray Tune asks many times a second
            return None
        if (found := goes_on_at_last(standings)) is not None:
            self._tell(f"{found.name} goes on: the best of all")
            return self._run(trial_id, found)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        """Say what came of it, to the searcher as well that drew it."""
        name, rung = self._running.pop(trial_id)
        self._waits = False
        judged = self._trials.judged(name, SHARES[rung])
        if error:
            self._trials.end(name, "lost", f"its process failed: see {self._trials.folder / 'ray' / 'search'}")
        elif judged is None and self._trials.why(name, "failed", "lost") is None:
            if self._trials.state(name) == "finished":
                self._trials.end(name, "failed", "it was never evaluated")
            else:
                self._trials.end(name, "lost", "it was stopped")
        broke = self._trials.why(name, "failed", "lost")
        value = None if broke is not None or judged is None else judged.best
        if broke is not None:
            self._tell(f"{name} ended: {broke.splitlines()[0]}")
        elif judged is not None:
            said = "no value" if value is None else f"{self._trials.metric} {value:.4g}"
            self._tell(f"{name}: {said} after {judged.share:.0%} of its length")
        if trial_id in self._drawn:
            self._more.on_trial_complete(trial_id, None if value is None else {"value": value}, value is None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all lies in the search's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""

    def _standings(self) -> list[Standing]:
        running = {name for name, _ in self._running.values()}
        return [self._trials.standing(name, running=name in running) for name in self._trials.names()]

    def _run(self, trial_id: str, found: Standing) -> dict[str, Any]:
        rung = len(found.losses)
        self._running[trial_id] = (found.name, rung)
        return {"trial": found.name, "share": SHARES[rung]}

    def _draw(self, trial_id: str) -> Any:
        settings = self._more.suggest(trial_id)
        if not isinstance(settings, dict):
            return settings  # it has no more, or not yet
        name = f"trial-{len(self._trials.names()):03d}"
        self._trials.keep(name, settings)
        self._drawn.add(trial_id)
        return self._run(trial_id, Standing(name, ()))
