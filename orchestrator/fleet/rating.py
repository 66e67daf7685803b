"""Every size a run could have, on every device type, with its best layout and the goodput that gives.

1. Goodput is ``B / T_step x eff(B)`` in reference samples per second (``scheduling.goodput``). For each size and micro
   batch the best accumulation is known in closed form: with ``u`` samples in one micro batch over all workers and
   ``T_step = c + a T_acc`` goodput is proportional to ``a / ((Bn + a u)(c + a T_acc))``, which rises up to
   ``a = sqrt(Bn c / (u T_acc))`` and falls from there, so that the better of its two neighbours is the best.
2. A size never tried is believed in, up to twice the largest one that was timed or is in use. Where the model has seen
   one node only, a step across nodes is taken to last ``FIRST_ACROSS`` times what it says: it knows no network but the
   one inside.
3. A type that a run was never timed on is believed to be as much faster or slower as it is for the other runs that were
   timed on both (median); where there are none, as fast.
4. A run that was never timed at all is believed to speed up as ``devices ** 0.85``. It keeps the reference batch.
5. A noise scale that is not known yet is taken to be the reference batch: twice the batch is then worth 4/3 of a step.

All runs are rated at once, in a few passes over flat arrays: a thousand runs on four types take a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.fleet.cluster import Fleet
from orchestrator.fleet.view import JobView
from orchestrator.planning.layout import Layout
from orchestrator.planning.step_time import StepTimeModel, step_parts

__all__ = ["Options", "options"]

Array = NDArray[np.float64]
Index = NDArray[np.intp]

UNTIMED_EXPONENT = 0.85
"""Assumption: optimistic, and yet a second device is not worth as much as a first one of another run."""
FIRST_ACROSS = 1.6
"""Chosen. Of three applications on four clusters 1.1 to 4.4 was recorded, median 1.9; from 2 on too few are tried."""
LARGEST_NOISE = 1e15
"""Stands for an infinite noise scale."""


@dataclass(frozen=True)
class Options:
    """One row [n] for each job, device type and size; those of a job stand together, in the order of type and size."""

    owner: Index
    """Which of the fleet's jobs."""
    kind: Index
    """Which of the fleet's types."""
    devices: Index
    goodput: Array
    """Reference samples per second; for a run that was never timed, relative to one device."""
    micro_batch: Index
    accumulation: Index
    starts: Index
    """First row of each job, and one past the last: [jobs + 1]."""
    timed: NDArray[np.bool_]
    """[jobs]: whether goodput is in reference samples per second."""

    def of(self, job: int) -> range:
        """The rows of a job."""
        return range(int(self.starts[job]), int(self.starts[job + 1]))

    def layout(self, row: int) -> Layout:
        """What a step looks like."""
        return Layout(int(self.devices[row]), int(self.micro_batch[row]), int(self.accumulation[row]))


@dataclass(frozen=True)
class _Part:
    """The sizes of one job on one type."""

    owner: int
    kind: int
    model: StepTimeModel | None
    borrowed: int
    """The type whose model stands in for this one's; ``kind`` itself where there is no need, -1 without any model."""
    sizes: tuple[int, ...]


def options(fleet: Fleet) -> Options:
    """Rate every size of every job of a fleet."""
    parts = [part for owner in range(len(fleet.jobs)) for part in _parts(fleet, owner)]
    timed = np.array([bool(_models(job)) for job in fleet.jobs], bool)
    if not parts:
        nothing = np.zeros(0, np.intp)
        starts = np.zeros(len(fleet.jobs) + 1, np.intp)
        return Options(nothing, nothing, nothing, nothing.astype(float), nothing, nothing, starts, timed)
    rows, layouts_each = _rows(fleet, parts)
    score, accumulation = _score(fleet, parts, rows)
    sizes = np.concatenate([part.sizes for part in parts]).astype(np.intp)
    part_of = np.repeat(np.arange(len(parts)), [len(part.sizes) for part in parts])
    owner, kind = (np.array([getattr(part, name) for part in parts])[part_of] for name in ("owner", "kind"))
    best = _best_of_each(score, layouts_each)
    goodput = score[best]
    usable = goodput > 0.0
    goodput = np.where(timed[owner], goodput, sizes**UNTIMED_EXPONENT)
    borrowed = np.where(timed[owner], np.array([part.borrowed for part in parts])[part_of], kind)
    goodput = _as_fast_as_others(goodput, owner, kind, borrowed, part_of)
    owner = owner[usable]
    starts = np.searchsorted(owner, np.arange(len(fleet.jobs) + 1))
    picked = best[usable]
    return Options(
        owner,
        kind[usable],
        sizes[usable],
        goodput[usable],
        rows.micro_batch[picked],
        accumulation[picked],
        starts,
        timed,
    )


def _models(job: JobView) -> dict[str, StepTimeModel]:
    return {kind: model for kind, model in (job.step_time or {}).items() if model is not None}


def _parts(fleet: Fleet, owner: int) -> list[_Part]:
    job, here = fleet.jobs[owner], fleet.current[owner]
    models = _models(job)
    most = _most_devices(job, models, 0 if here is None else here.devices)
    stand_in = next((kind for kind in fleet.types if kind in models), None)
    found = []
    for index, kind in enumerate(fleet.types):
        current = here.devices if here is not None and here.device_type == kind else 0
        sizes = fleet.sizes(job, index, most, current)
        if not sizes:
            continue
        if kind in models:
            found.append(_Part(owner, index, models[kind], index, sizes))
        elif stand_in is not None:
            found.append(_Part(owner, index, models[stand_in], fleet.types.index(stand_in), sizes))
        else:
            model = next(iter(models.values()), None)  # timed on types that are gone
            found.append(_Part(owner, index, model, index if model else -1, sizes))
    return found


def _most_devices(job: JobView, models: dict[str, StepTimeModel], current: int) -> int:
    """Twice what was tried."""
    low, high = job.workers_range
    if not models:
        return 2 * current or low
    timed = [getattr(model, "most_workers_timed", None) for model in models.values()]
    return high if None in timed else 2 * max(current, *(count or 0 for count in timed), low // 2)


@dataclass(frozen=True)
class _Rows:
    """One row for each part, size and micro batch."""

    part: Index
    nodes: Array
    workers: Array
    micro_batch: Index


def _rows(fleet: Fleet, parts: Sequence[_Part]) -> tuple[_Rows, Index]:
    grids = []
    for part in parts:
        job = fleet.jobs[part.owner]
        grids.append(_grid(part.sizes, fleet.node_size[part.kind], job.micro_batch_range, job.batch_range))
    part_of = np.repeat(np.arange(len(parts)), [grid.shape[1] for grid in grids])
    layouts_each = np.repeat(
        [grid.shape[1] // len(part.sizes) for grid, part in zip(grids, parts, strict=True)],
        [len(part.sizes) for part in parts],
    )
    nodes, workers, micro_batch = np.concatenate(grids, axis=1)
    return _Rows(part_of, nodes.astype(float), workers.astype(float), micro_batch), layouts_each


@lru_cache(maxsize=8192)
def _grid(sizes: tuple[int, ...], node_size: int, micro: tuple[int, int], batch: tuple[int, int]) -> NDArray[np.intp]:
    """Nodes, workers and micro batch of every layout worth a look: [3, sizes x micro batches].

    Micro batches are powers of two, both ends of their range, and a worker's share of the least and the largest batch.
    """
    low, high = micro
    usual = sorted({low, high} | {2**power for power in range(high.bit_length()) if low <= 2**power <= high})
    workers = np.array(sizes)[:, None]
    shares = [np.clip(share, low, high) for share in (batch[1] // workers, -(-batch[0] // workers))]
    micros = np.concatenate([np.broadcast_to(usual, (len(sizes), len(usual))), *shares], axis=1)
    whole = np.broadcast_to(workers, micros.shape)
    return np.array([-(-whole // node_size), whole, micros]).reshape(3, -1)


def _score(fleet: Fleet, parts: Sequence[_Part], rows: _Rows) -> tuple[Array, Index]:
    """Goodput of each row at its best accumulation; without a model, how near it comes to the reference batch."""
    jobs = [fleet.jobs[part.owner] for part in parts]
    facts = np.array([_facts(job) for job in jobs])[rows.part].T
    reference, noise, smallest, largest = facts
    unit = rows.workers * rows.micro_batch
    fewest, most = np.maximum(np.ceil(smallest / unit), 1.0), np.floor(largest / unit)
    possible = fewest <= most
    accumulated, step, known = _times(parts, rows)
    fixed = step - accumulated
    wanted = np.sqrt(noise * np.maximum(fixed, 0.0) / (unit * accumulated))
    wanted = np.where(known, wanted, reference / unit)
    below = np.clip(np.floor(wanted), fewest, np.maximum(most, fewest))
    above = np.minimum(below + 1.0, np.maximum(most, fewest))

    def goodput(count: Array) -> Array:
        batch = unit * count
        timed = batch / (fixed + count * accumulated) * (noise + reference) / (noise + batch)
        # Nearest to the reference batch, then the larger micro batch.
        near = np.exp(-np.abs(np.log(batch / reference))) * (1.0 + 1e-6 * np.log(unit))
        return np.asarray(np.where(known, timed, near))

    first, second = goodput(below), goodput(above)
    score = np.where(possible, np.maximum(first, second), 0.0)
    return score, np.where(second > first, above, below).astype(np.intp)


def _facts(job: JobView) -> tuple[float, float, float, float]:
    noise = job.reference_batch if job.noise_scale is None else min(max(job.noise_scale, 0.0), LARGEST_NOISE)
    return float(job.reference_batch), float(noise), float(job.batch_range[0]), float(job.batch_range[1])


def _times(parts: Sequence[_Part], rows: _Rows) -> tuple[Array, Array, NDArray[np.bool_]]:
    """T_acc and T_step of each row, and whether there is a model to say so."""
    models = [part.model for part in parts]
    known = np.array([model is not None for model in models], bool)[rows.part]
    accumulated, step = np.ones(len(rows.part)), np.ones(len(rows.part))
    fitted = [index for index, model in enumerate(models) if isinstance(model, StepTimeModel)]
    if fitted:
        position = np.full(len(models), -1)
        position[fitted] = np.arange(len(fitted))
        which = position[rows.part]
        mine = which >= 0
        found: list[Any] = [models[index] for index in fitted]
        accumulated[mine], step[mine] = step_parts(
            found, which[mine], rows.nodes[mine], rows.workers[mine], rows.micro_batch[mine].astype(float)
        )
    others = {index for index, model in enumerate(models) if model is not None} - set(fitted)
    for index in sorted(others):  # whatever else answers step_time_s
        _ask(models[index], rows, np.flatnonzero(rows.part == index), accumulated, step)
    inside = np.array([getattr(model, "most_nodes_timed", None) == 1 for model in models], bool)[rows.part]
    return accumulated, np.where(inside & (rows.nodes > 1.0), FIRST_ACROSS * step, step), known


def _ask(model: Any, rows: _Rows, mine: Index, accumulated: Array, step: Array) -> None:
    for workers in np.unique(rows.workers[mine]):
        here = mine[rows.workers[mine] == workers]
        one, two = (
            np.asarray(
                model.step_time_s(
                    nodes=int(rows.nodes[here[0]]),
                    workers=int(workers),
                    micro_batch=rows.micro_batch[here].astype(float),
                    accumulation=np.full(len(here), float(count)),
                )
            )
            for count in (1, 2)
        )
        accumulated[here], step[here] = np.maximum(two - one, 1e-9 * one), one


def _best_of_each(score: Array, counts: Index) -> Index:
    """The first row of the highest score in each run of ``counts`` rows."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    highest = np.repeat(np.maximum.reduceat(score, starts), counts)
    group = np.repeat(np.arange(len(counts)), counts)
    at_best = np.flatnonzero(score == highest)
    return np.asarray(at_best[np.searchsorted(group[at_best], np.arange(len(counts)))])


def _as_fast_as_others(goodput: Array, owner: Index, kind: Index, borrowed: Index, part: Index) -> Array:
    """Item 3: rows of borrowed models, put on the pace of their own type."""
    if (borrowed == kind).all():
        return goodput
    types = int(max(kind.max(), borrowed.max())) + 1
    first = np.unique(part, return_index=True)[1]  # the smallest size of each part
    own = first[(borrowed[first] == kind[first]) & (goodput[first] > 0.0)]
    pace = np.full((int(owner.max()) + 1, types), np.nan)
    pace[owner[own], kind[own]] = np.log(goodput[own])
    ratio = np.zeros((types, types))
    for source in range(types):
        for target in range(types):
            both = pace[:, target] - pace[:, source]
            both = both[~np.isnan(both)]
            ratio[source, target] = np.median(both) if len(both) else 0.0
    return np.asarray(goodput * np.exp(ratio[borrowed, kind]))
