"""Train jobs one after the other in this group of workers: the orchestrator's own loop, without a cluster around it.

Started by torchrun, one process per worker; ``--runs`` is a JSON list of ``{"job", "args", "overrides"}``, trained in
that order in one group, so that dozens of short runs need one start-up. Each run's folder is where its config says;
beside its records lies the processor time that each worker's process took for it, all its threads together.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from orchestrator.job import Job, load
from orchestrator.launching.hub import HubClient, HubSettings
from orchestrator.launching.preflight import run_root
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import make_plan
from orchestrator.scheduling.policy import make_policy
from orchestrator.storage.fence import DriverLock, Fence
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.publisher import Publisher
from orchestrator.training.checkpoint import Checkpoints
from orchestrator.training.data import open_dataset
from orchestrator.training.engine import Engine
from orchestrator.training.loop import Training, train
from orchestrator.training.memory import MemoryGauge
from orchestrator.training.recorder import Recorder
from orchestrator.training.scheduler import Scheduler
from orchestrator.training.tracing import Tracer

DEVICE = torch.device("cpu")


def main() -> None:
    """Train every run of ``--runs``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--hub", help="address of a Ray cluster whose hub is sent the runs' telemetry")
    options = parser.parse_args()
    if options.hub:
        import ray

        ray.init(address=options.hub, log_to_driver=False, logging_level="ERROR")
    torch.set_num_threads(1)  # what Ray gives a worker with one CPU
    dist.init_process_group("gloo")
    for run in json.loads(Path(options.runs).read_text()):
        job = load(run["job"], tuple(run["args"]), tuple(run["overrides"]))
        outcome = train_here(job, publishes=bool(options.hub) and job.config.telemetry.enabled)
        if dist.get_rank() == 0:
            name, state = job.config.name, outcome.state
            print(f"{name}: {state.step} steps, {state.train_time_s:.1f} s", file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def train_here(job: Job, *, publishes: bool = False) -> Any:
    """Train ``job`` as its workers would, and return the outcome."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    if rank == 0 and job.prepare is not None:
        job.prepare()
    folder = RunFolder(run_root(job.config))
    token: list[Any] = [None]
    if rank == 0:
        folder.create()
        lock = DriverLock(folder.control)
        token = [Fence.begin(folder.control, driver=lock.driver)]
    dist.broadcast_object_list(token, src=0)
    fence = Fence(folder.control, token[0])
    datasets = job.task.datasets()
    train_set = open_dataset(datasets.train, job.config)
    evaluation_set = None if datasets.evaluation is None else open_dataset(datasets.evaluation, job.config)
    plan = make_plan(
        job.config,
        ClusterShape(nodes=1, cpus=workers),
        train_samples=len(train_set),
        evaluation_samples=len(evaluation_set or ()),
    )
    policy = make_policy(job.config)
    memory = MemoryGauge(DEVICE, psutil.virtual_memory().total // workers)
    publisher = _publisher(job, rank, memory) if publishes else None
    run = Training(
        config=job.config,
        plan=plan,
        task=job.task,
        engine=Engine(job.task, job.config, plan, device=DEVICE),
        train_set=train_set,
        evaluation_set=evaluation_set,
        checkpoints=Checkpoints(folder.checkpoints, fence, 1, plan.layout_key),
        recorder=Recorder(folder, fence, plan, rank=rank, attempt=1, publisher=publisher),
        scheduler=Scheduler(policy=policy, config=job.config, plan=plan, memory=memory, decides=rank == 0),
        tracer=Tracer(None, folder.root, rank=rank),
        rank=rank,
        stop_requested=lambda: False,
    )
    busy_s = time.process_time()
    outcome = train(run)
    if publisher is not None:
        publisher.close()
    (folder.root / f"processor-{rank}.txt").write_text(str(time.process_time() - busy_s))
    fence.release()
    if rank == 0:
        lock.release()
    gc.collect()
    return outcome


def _publisher(job: Job, rank: int, memory: MemoryGauge) -> Publisher:
    client = HubClient(HubSettings.of(job.config.telemetry))
    return Publisher(client, run=job.config.name, source=str(rank), attempt=1, sample=memory.observe)


if __name__ == "__main__":
    main()
