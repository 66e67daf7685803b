"""Whether a search finds a good learning rate for a quarter of a grid's work, and whether it holds at four batches.

    python benchmarks/tuning.py --folder FOLDER             # both tasks, a few minutes
    python benchmarks/tuning.py --folder FOLDER --write     # the result into benchmarks/results/

**Search.** A fine grid of learning rates from 1e-4 to 1, a factor of 1.41 apart, each trained to the end; then the
search of `orchestrator tune` over the same range: its draws, its rungs (after 1/9, 1/3 and all of the length) and its
choice of who goes on, here one trial at a time. There is a grid of the same seed: what differs is where the rates lie
and how far they run. Wanted: a rate within a factor of 2 of that grid's best, for at most a quarter of the grid's
samples.

**Transfer.** The same grid at four times the batch, against the best rate of the small batch carried over by the rule
that belongs to the optimizer. Where the two agree within a factor of 2, trials at the small batch stand for the large.

Every trial trains in this process, on the job's own loss, data, optimizer and schedule, at a fixed batch and without
Ray: what is compared is which rates are found and for how many samples.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from jobs.recommender import clicks
from jobs.vision import mlp
from orchestrator.job import Job
from orchestrator.scheduling.halving import SHARES, Standing, goes_on, goes_on_at_last
from orchestrator.scheduling.learning_rate import scale
from orchestrator.scheduling.schedule import factor
from orchestrator.scheduling.search_space import draw, parse_search
from orchestrator.training.data import Stream, open_dataset
from orchestrator.training.evaluation import MetricSums
from orchestrator.training.optimizer import add_penalties, build_optimizer, rescale, set_learning_rate

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
LOW, HIGH, APART = 1e-4, 1.0, math.sqrt(2)
GRID = [LOW * APART**n for n in range(1 + round(math.log(HIGH / LOW, APART)))]
TRIALS = 24
LARGER = 4
EVALUATIONS = 9
"""Of a whole trial, evenly spread: at each a search may see how far it is."""


class Trial:
    """One rate's run, which can be taken a little further each time."""

    def __init__(self, job: Job, rate: float, *, seed: int, larger: int = 1) -> None:
        self._job, self._seed, self._rate = job, seed, rate
        recipe = job.config.recipe
        torch.manual_seed(seed)
        self._model = job.task.model()
        self._optimizer = build_optimizer(self._model, recipe, fused=False)
        add_penalties(self._optimizer)
        if larger > 1:  # the rate is given; what goes with it follows
            scaling = scale("auto", recipe.optimizer, None, recipe.batch, larger * recipe.batch)
            rescale(self._optimizer, recipe, scaling, carry=False)
        sets = job.task.datasets()
        self._train, self._held_out = open_dataset(sets.train), open_dataset(sets.evaluation)
        self._stream = Stream(len(self._train), seed)
        self._batch = larger * recipe.batch
        self._steps = round(recipe.stop.epochs * len(self._train) / self._batch)
        self._step = 0
        self.losses: list[float] = []
        self.samples = 0

    @property
    def best(self) -> float:
        """The lowest held-out loss on the way, by which `tune` chooses."""
        return min(self.losses, default=math.inf)

    def run_to(self, share: float) -> Trial:
        """Train on to ``share`` of the length."""
        recipe = self._job.config.recipe
        while self._step < round(share * self._steps):
            start, end = (n / self._steps for n in (self._step, self._step + 1))
            set_learning_rate(self._optimizer, self._rate * factor(recipe.schedule, start, end))
            columns = self._train.take(self._stream.indices(self._step * self._batch, self._batch))
            self._model.train()
            self._optimizer.zero_grad()
            loss = self._job.task.loss(self._model, {n: torch.as_tensor(c) for n, c in columns.items()})
            loss.backward()
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), recipe.clip_norm)
            self._optimizer.step()
            self._step += 1
            self.samples += self._batch
            if math.floor(EVALUATIONS * end + 1e-9) > math.floor(EVALUATIONS * start + 1e-9):
                self.losses.append(self._evaluate())
        return self

    def _evaluate(self) -> float:
        sums, count = MetricSums(self._job.task), len(self._held_out)
        self._model.eval()
        with torch.inference_mode():
            for start in range(0, count, 1024):
                columns = self._held_out.take(np.arange(start, min(start + 1024, count)))
                batch = {name: torch.as_tensor(column) for name, column in columns.items()}
                sums.add(self._job.task.metrics(self._model, batch), len(next(iter(batch.values()))))
        found = sums.metrics(count)["loss"]
        return found if math.isfinite(found) else math.inf


@dataclass
class Searched:
    """What a search found, and what it took."""

    rate: float
    samples: int


@dataclass
class Found:
    """One task's part of the result."""

    name: str
    grids: list[dict[float, float]]
    """Of each seed: rate to best loss."""
    large: dict[float, float]
    """Rate to the mean best loss over the seeds, at the larger batch."""
    carried: float = math.nan
    searched: list[Searched] = field(default_factory=list)
    grid_samples: int = 0
    """Of one grid."""

    @property
    def grid(self) -> dict[float, float]:
        """Rate to the mean best loss over the seeds."""
        return _mean(self.grids)

    @property
    def off(self) -> list[float]:
        """Factor between each search's rate and the best of its seed's grid."""
        bests = [min(grid, key=grid.__getitem__) for grid in self.grids]
        return [max(one.rate / best, best / one.rate) for one, best in zip(self.searched, bests, strict=True)]


def _mean(grids: list[dict[float, float]]) -> dict[float, float]:
    return {rate: statistics.fmean(grid[rate] for grid in grids) for rate in GRID}


def search(job: Job, seed: int) -> Searched:
    """Asynchronous successive halving, as `tune` does it."""
    (space,) = parse_search([f"optimizer.learning_rate=loguniform({LOW},{HIGH})"], job.config)
    rates = [float(drawn[space.field]) for drawn in draw([space], TRIALS, seed)]
    trials = {rate: Trial(job, rate, seed=seed) for rate in rates}
    standings = {str(rate): Standing(str(rate), ()) for rate in rates}

    def due() -> Standing | None:
        found = list(standings.values())
        return goes_on(found) or next((one for one in found if not one.losses), None) or goes_on_at_last(found)

    while (one := due()) is not None:
        loss = trials[float(one.name)].run_to(SHARES[len(one.losses)]).best
        standings[one.name] = Standing(one.name, (*one.losses, loss))
    return Searched(min(rates, key=lambda rate: trials[rate].best), sum(trial.samples for trial in trials.values()))


def grid(job: Job, seed: int, larger: int = 1) -> tuple[dict[float, float], int]:
    """Best loss of each rate, and the samples that the whole grid took."""
    trials = {rate: Trial(job, rate, seed=seed, larger=larger).run_to(1.0) for rate in GRID}
    return {rate: trial.best for rate, trial in trials.items()}, sum(trial.samples for trial in trials.values())


def measure(name: str, job: Job, seeds: int) -> Found:
    """Both parts on one task."""
    assert job.prepare is not None
    job.prepare()
    small = [grid(job, seed) for seed in range(seeds)]
    large = [grid(job, seed, LARGER)[0] for seed in range(seeds)]
    found = Found(name, [losses for losses, _ in small], _mean(large), grid_samples=small[0][1])
    recipe, means = job.config.recipe, found.grid
    carried = scale("auto", recipe.optimizer, None, recipe.batch, LARGER * recipe.batch).learning_rate
    found.carried = min(means, key=means.__getitem__) * carried
    found.searched = [search(job, seed) for seed in range(seeds)]
    return found


def report(results: list[Found], seeds: int, took_s: float) -> str:
    """The result as Markdown."""
    where = f"{platform.machine()} with {os.cpu_count()} CPUs, torch {torch.__version__}, {took_s:.0f} s"
    lines = [
        f"# Searching a learning rate, {datetime.now(UTC).date()}",
        "",
        f"`python benchmarks/tuning.py`, {seeds} seeds, {where}.",
        f"Grid: {len(GRID)} rates from {LOW:g} to {HIGH:g}; search: {TRIALS} trials. Losses are of what is held out.",
        "",
        "| task | best of the means | best of each seed's grid | found with that seed | off | samples of the grid's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in results:
        best = min(found.grid, key=found.grid.__getitem__)
        bests = ", ".join(f"{min(grid, key=grid.__getitem__):.2g}" for grid in found.grids)
        off = ", ".join(f"{off:.2f} x" for off in found.off)
        share = max(one.samples for one in found.searched) / found.grid_samples
        rates = ", ".join(f"{one.rate:.2g}" for one in found.searched)
        lines.append(
            f"| {found.name} | {best:.2g} (loss {found.grid[best]:.4f}) | {bests} | {rates} | {off} | {share:.0%} |"
        )
    lines += [
        "",
        f"At {LARGER} times the batch, the same samples:",
        "",
        "| task | best there | carried over | off | loss at the best | at the carried rate | at the rate as it was |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in results:
        best = min(found.large, key=found.large.__getitem__)
        off = max(found.carried / best, best / found.carried)
        rates = (best, found.carried, min(found.grid, key=found.grid.__getitem__))
        losses = " | ".join(f"{found.large[_nearest(found.large, rate)]:.4f}" for rate in rates)
        lines.append(f"| {found.name} | {best:.2g} | {found.carried:.2g} | {off:.2f} x | {losses} |")
    return "\n".join(lines)


def _nearest(rates: Iterable[float], wanted: float) -> float:
    return min(rates, key=lambda rate: abs(math.log(rate / wanted)))


def main() -> None:
    """Run both tasks and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="for the jobs' data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-tuning.md")
    given = parser.parse_args()
    folder = Path(given.folder).absolute()
    torch.set_num_threads(1)  # models as small as these are no faster with more
    started = time.monotonic()
    jobs = {
        "digits MLP": mlp(data=str(folder / "digits")),
        "clicks DLRM": clicks(data=str(folder / "clicks"), epochs=0.3),
    }
    results = []
    for name, job in jobs.items():
        results.append(measure(name, job, given.seeds))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    text = report(results, given.seeds, time.monotonic() - started)
    print(text)
    if given.write:
        (RESULTS / f"{datetime.now(UTC).date()}-tuning.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
