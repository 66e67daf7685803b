"""Whether a run is probed first, and what earlier probes of the same found."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.job import Job
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.costs import Profile
from orchestrator.planning.plan import Plan
from orchestrator.planning.probe import Probe
from orchestrator.storage.folder import RunFolder, read_json, write_json

__all__ = ["cache_key", "is_wanted", "keep", "known_probe"]

PACKAGES = ("torch", "deepspeed", "ray", "orchestrator")


def is_wanted(asked: bool | None, config: RunConfig, plan: Plan) -> bool:
    """Whether to probe: as asked, by default on accelerators wherever something is left to choose."""
    if asked is not None:
        return asked
    layout = config.layout
    choices = (
        layout.zero_stage,
        layout.offload,
        layout.activation_checkpointing,
        layout.micro_batch,
        layout.accumulation,
    )
    return plan.device == "cuda" and "auto" in choices


def cache_key(job: Job, identity: dict[str, Any], shape: ClusterShape, plan: Plan, profile: Profile | None) -> str:
    """Names everything that a probe's numbers depend on: job, model, recipe, layout, devices and versions."""
    config = job.config
    facts = {
        "job": identity,
        "optimizer": config.recipe.optimizer.model_dump(mode="json", exclude={"learning_rate"}),
        "batch": config.recipe.batch,
        "layout": config.layout.model_dump(mode="json"),
        "policy": config.policy.model_dump(mode="json"),
        "scale": config.scale.model_dump(mode="json"),
        "workers": plan.layout.workers,
        "shape": asdict(shape),
        "profile": None if profile is None else asdict(profile),
        "versions": {name: version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def known_probe(folder: RunFolder, key: str, *, resumes: bool) -> Probe | None:
    """What the run's own probe found, else an earlier one of the same, or None.

    A run that ``resumes`` keeps to its own, or to none: its plan must be what it was.
    """
    return _read(folder.probe) or (None if resumes else _read(_cache_folder() / f"{key}.json"))


def keep(key: str, found: Probe) -> None:
    """Remember ``found``; where that is not possible, the next run probes again."""
    try:
        _cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(_cache_folder() / f"{key}.json", found.to_dict())
    except OSError:
        return


def _read(path: Path) -> Probe | None:
    try:
        found = read_json(path)
        return None if found is None else Probe.from_dict(found)
    except (RunFolderError, TypeError, KeyError):  # damaged: it is found again
        return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator" / "probes"
