"""The profile of a job's model: one sample of its data, and the trace, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.job import Job
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import planned_precision

__all__ = ["Sizes", "data_sizes", "profile_job", "sample_of"]


class Sizes(NamedTuple):
    """Numbers of samples; 0 training samples where the data are not there."""

    train: int
    evaluation: int


def sample_of(job: Job) -> Mapping[str, Any]:
    """One sample's columns: the task's own ``sample()`` where it has one, else the first of its training set.

    Raises:
        DataError: the task has no ``sample``, and its data are not there.
    """
    from orchestrator.training.data import open_dataset

    own = getattr(job.task, "sample", None)
    if callable(own):
        return own()  # type: ignore[no-any-return]
    return open_dataset(job.task.datasets().train, job.config).take(np.zeros(1, dtype=np.int64))


def data_sizes(job: Job, sample: Mapping[str, Any]) -> Sizes:
    """Sizes of the data if they are there and hold samples like ``sample``; nothing is written."""
    from orchestrator.training.data import open_dataset

    try:
        datasets = job.task.datasets()
        train = open_dataset(datasets.train, job.config)
        evaluation = None if datasets.evaluation is None else open_dataset(datasets.evaluation, job.config)
        first = train.take(np.zeros(1, dtype=np.int64)) if len(train) else {}
    except (DataError, OSError):
        return Sizes(0, 0)
    if {name: column.shape[1:] for name, column in first.items()} != {
        name: column.shape[1:] for name, column in sample.items()
    }:
        return Sizes(0, 0)
    return Sizes(len(train), 0 if evaluation is None else len(evaluation))


def profile_job(job: Job, shape: ClusterShape) -> tuple[Profile | None, str]:
    """The profile of the job's model in the precision planned for ``shape``, or why there is none."""
    import torch

    from orchestrator.planning.profile import profile_model
    from orchestrator.training.precision import DTYPES, compute_in
    from orchestrator.training.recompute import checkpoint_blocks

    config: RunConfig = job.config
    precision = planned_precision(config, shape)
    torch.manual_seed(config.seed % 2**63)
    try:
        profile = profile_model(
            job.task.model,
            job.task.loss,
            sample_of(job),
            fit_out=lambda model: compute_in(model, DTYPES[precision]),
            recompute=checkpoint_blocks,
            precision=precision,
            on_accelerator=shape.accelerators_per_worker(config.scale) > 0,
        )
    except (ConfigError, DataError) as error:
        return None, str(error)
    return profile, ""
