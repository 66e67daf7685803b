"""The plan of a job: for this machine, a cluster or one that does not exist, and with what a probe measured."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from orchestrator.job import Job, arguments, load
from orchestrator.launching.cluster import RayCluster, address_of, embedded_shape
from orchestrator.launching.homes import stored_uri
from orchestrator.launching.preflight import RunRequest, identity, prepare, run_root
from orchestrator.launching.probe_cache import cache_key, is_wanted, keep, known_probe
from orchestrator.launching.profiling import Sizes, data_sizes, profile_job, sample_of
from orchestrator.launching.worker import Order
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.probe import Probe
from orchestrator.storage.folder import RunFolder, write_json
from orchestrator.training.checkpoint import list_checkpoints
from orchestrator.training.computing import require_compiler
from orchestrator.training.engine import require_precision

__all__ = ["Imagined", "make_job_plan", "plan_job", "probed"]

MOST_PROBES = 3
"""Of one run: each may show that another combination is the better one, which is then probed."""
SEQUENCE = ("sequence", "sequence_length", "context", "max_length")
"""Names that jobs give the length of their sequences."""


class Imagined(NamedTuple):
    """A cluster that does not exist, as the command line describes it; None: as the job or the table has it."""

    workers: int | None = None
    nodes: int | None = None
    accelerator: str | None = None
    network_gbit_per_s: float | None = None


def plan_job(request: RunRequest, imagined: Imagined | None = None) -> tuple[Job, Plan, str]:
    """The job, the plan that ``run`` would follow, and where the run's folder would be, without starting anything.

    With ``imagined`` the plan is for a cluster that does not exist: data need not be there, and nothing is written.
    """
    job, plan, root = _plan(request, imagined)
    if plan.costing is None or plan.costing.fits:
        return job, plan, root
    shorter = _shorter(request, lambda asked: _plan(asked, imagined)[1])
    costing = dataclasses.replace(plan.costing, changes=(*plan.costing.changes, *shorter))
    return job, dataclasses.replace(plan, costing=costing), root


def _plan(request: RunRequest, imagined: Imagined | None) -> tuple[Job, Plan, str]:
    job = load(request.job, request.args, request.overrides)
    root = stored_uri(job.config) or str(run_root(job.config))
    if imagined is not None and any(value is not None for value in imagined):
        return *_imagined_plan(job, imagined), root
    sizes = prepare(job)
    address = address_of(request.address)
    if address is None:
        shape = embedded_shape()
    else:
        with tempfile.TemporaryDirectory() as logs, RayCluster.connect(address, log=Path(logs) / "ray.log") as cluster:
            shape = cluster.shape
    profiled = profile_job(job, shape)
    plan = make_job_plan(job, shape, sizes, profiled, refuse=False)
    folder = RunFolder(Path(root))
    key = cache_key(job, identity(request), shape, plan, profiled[0])
    known = known_probe(folder, key, resumes=bool(list_checkpoints(folder.checkpoints)))
    return job, plan if known is None else make_job_plan(job, shape, sizes, profiled, probe=known, refuse=False), root


def _imagined_plan(job: Job, imagined: Imagined) -> tuple[Job, Plan]:
    scale = job.config.scale
    most = scale.workers[1] if isinstance(scale.workers, tuple) else scale.workers
    workers = imagined.workers or most
    accelerator = accelerator_named(imagined.accelerator or "cpu", job.config.planning.accelerator)
    scale = scale.model_copy(update={"workers": workers, "accelerators_per_worker": 0 if accelerator.is_cpu else 1})
    job = dataclasses.replace(job, config=job.config.model_copy(update={"scale": scale}))
    shape = ClusterShape.imagine(
        scale,
        accelerator,
        workers=workers,
        nodes=imagined.nodes,
        network_gbit_per_s=imagined.network_gbit_per_s or 0.0,
    )
    if not callable(getattr(job.task, "sample", None)):
        prepare(job)
    sizes = data_sizes(job, sample_of(job))
    return job, make_job_plan(job, shape, sizes, profile_job(job, shape), refuse=False)


def _shorter(request: RunRequest, plan: Callable[[RunRequest], Plan]) -> tuple[str, ...]:
    """The longest sequence with which it would fit, for a job that has a parameter of such a name."""
    given = arguments(request.job, request.args)
    name = next((name for name in SEQUENCE if isinstance(given.get(name), int)), None)
    if name is None:
        return ()
    others = tuple(arg for arg in request.args if arg.partition("=")[0].strip() != name)
    for length in (given[name] // 2, given[name] // 4, given[name] // 8):
        word = f"{name}={length}"
        if length < 1:
            break
        costing = plan(dataclasses.replace(request, args=(*others, word))).costing
        if costing is not None and costing.fits:
            return (f"--arg {word}",)
    return ()


def make_job_plan(
    job: Job,
    shape: ClusterShape,
    sizes: tuple[int, int] | Sizes,
    profiled: tuple[Profile | None, str],
    *,
    probe: Probe | None = None,
    refuse: bool = True,
) -> Plan:
    """``make_plan`` for a job whose model was traced, or was not, which the plan then says.

    Raises:
        RequestError: what ``make_plan`` refuses, and a precision that this machine has not.
    """
    profile, untraced = profiled
    plan = make_plan(
        job.config,
        shape,
        train_samples=sizes[0],
        evaluation_samples=sizes[1],
        profile=profile,
        probe=probe,
        refuse=refuse,
    )
    if untraced:
        plan = dataclasses.replace(plan, reasons=(*plan.reasons, f"memory and time not known: {untraced}"))
    if not shape.imagined:
        require_precision(plan)  # this machine speaks for the others; each worker asks again
        require_compiler(plan)
    return plan


def probed(
    request: RunRequest,
    order: Order,
    plan: Plan,
    sizes: tuple[int, int],
    profiled: tuple[Profile | None, str],
    note: Callable[[str], None],
    *,
    resumes: bool,
) -> tuple[Order, Plan]:
    """Order and plan with what a probe says: this run's earlier one, one of the same elsewhere, or a new one.

    A run that ``resumes`` is not probed anew: its plan is what it was.
    """
    from orchestrator.launching.probing import probe

    folder, job = RunFolder(order.root), order.job
    if request.probe is False:
        folder.probe.unlink(missing_ok=True)
        return order, plan
    key = cache_key(job, identity(request), order.shape, plan, profiled[0])
    found = known_probe(folder, key, resumes=resumes)
    if found is None and is_wanted(request.probe, job.config, plan) and not resumes:
        for _ in range(MOST_PROBES):
            found = probe(order, plan, note)
            plan = make_job_plan(job, order.shape, sizes, profiled, probe=found)
            if found.matches(plan):
                break
        assert found is not None
        keep(key, found)
    if found is None:
        return order, plan
    write_json(folder.probe, found.to_dict())  # a resumed run makes the same plan
    return dataclasses.replace(order, probe=found), make_job_plan(job, order.shape, sizes, profiled, probe=found)
