"""What Ray Tune asks during a search: which trial is next, and whether one goes on.

Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) is Ray Tune's own; here it is told what an earlier
search of the same name came to, and what it decides is written down and said. It ends a trial by killing its process,
which is why a trial is judged only while its run is at rest (``tuning.run_trial``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.launching.trials import FACTOR, SHARES, Judged, Trials

__all__ = ["PARTS", "RULE", "WORST", "Halving", "Settings", "result_of"]

PARTS = round(1 / SHARES[0])
"""The shortest share that is judged is one of so many."""
RULE: dict[str, Any] = {"time_attr": "parts", "max_t": PARTS, "grace_period": 1, "reduction_factor": FACTOR}
"""Ray Tune's ASHA as a search has it; time counts in parts of a trial's length."""
WORST = 1e300
"""Of a trial that measured nothing. Ranks take part in percentiles, which infinity would turn into NaN."""


def result_of(trials: Trials, name: str, judged: Judged) -> dict[str, Any]:
    """As a trial reports it to Ray Tune."""
    worst = -WORST if trials.grows else WORST
    return {
        "trial": name,
        "parts": round(PARTS * judged.share, 6),  # a third of three is to be one
        "value": worst if judged.best is None else judged.best,
        "went_on": judged.share < trials.progress(name),
    }


class Halving(ASHAScheduler):
    """Ray Tune's ASHA, which begins with what is known of trials that are done, and keeps to what it once decided."""

    def __init__(self, trials: Trials, tell: Callable[[str], None]) -> None:
        super().__init__(metric="value", mode="max" if trials.grows else "min", **RULE)
        self._trials = trials
        self._tell = tell
        nobody: Any = None  # ASHA asks nothing of the controller
        for name in filter(trials.is_done, trials.names()):
            known: Any = SimpleNamespace(trial_id=name)
            super().on_trial_add(nobody, known)
            for judged in dict.fromkeys(trials.judged(name, share) for share in SHARES):
                if judged is not None:
                    super().on_trial_result(nobody, known, result_of(trials, name, judged))

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes it down for a restore of its own, which a search does not need; nobody listens there."""
        return {**self.__dict__, "_tell": None}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial that has just been judged goes on."""
        action = str(super().on_trial_result(tune_controller, trial, result))
        if result["went_on"]:  # before the search was interrupted
            return str(TrialScheduler.CONTINUE)
        name, share = result["trial"], result["parts"] / PARTS
        broke = self._trials.why(name, "failed", "lost")
        best = "no value" if abs(result["value"]) == WORST else f"{self._trials.metric} {result['value']:.4g}"
        if broke is not None:
            said = f"ended: {broke.splitlines()[0]}"
        elif share >= 1.0:
            said = f"{best}, at its end"
        elif action == TrialScheduler.CONTINUE:
            said = f"{best} after {share:.0%}, goes on"
        else:
            self._trials.end(name, "left", "others were better")
            said = f"{best} after {share:.0%}, ends here"
        self._tell(f"{name}: {said}")
        return action


class Settings(Searcher):
    """Hands out trials: those that are written down, and then, with ``more``, what that searcher draws."""

    def __init__(self, due: Sequence[str], trials: Trials, more: Any = None) -> None:
        super().__init__(metric="value", mode="max" if trials.grows else "min")
        self._due = deque(due)
        self._trials = trials
        self._more = more
        self._drawn: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """The config of one trial: its name."""
        if self._due:
            return {"trial": self._due.popleft()}
        if self._more is None:
            return Searcher.FINISHED
        drawn = self._more.suggest(trial_id)
        if not isinstance(drawn, dict):
            return drawn  # it has no more, or not yet
        name = f"trial-{len(self._trials.names()):03d}"
        self._trials.keep(name, drawn)
        self._drawn.add(trial_id)
        return {"trial": name}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Tell the searcher what came of what it drew."""
        if trial_id in self._drawn:
            self._more.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known lies in the trials' own folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""
