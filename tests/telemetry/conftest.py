"""A believable run, made from a seed: warm-up, noise, a restart, a skipped step and a batch that grows."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.telemetry.report import RunData

START = 1_760_000_000.0


def make_run(steps: int = 900, name: str = "digits", restart_at: int | None = 400) -> RunData:
    """A finished run of ``steps`` optimizer steps on two workers."""
    rng, length = random.Random(7), steps * 96.0
    metrics: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    samples, progress, time = 0, 0.0, START + 4
    for step in range(1, steps + 1):
        attempt = 2 if restart_at is not None and step > restart_at else 1
        batch = 64 if step < steps * 0.45 else 128
        share, skipped = progress / length, step == steps // 3
        took = (0.031 if batch == 64 else 0.048) * rng.uniform(0.9, 1.25)
        samples, progress, time = samples + batch, progress + batch * 0.98, time + took
        loss = 0.018 + 2.4 * math.exp(-9 * share) * rng.lognormvariate(0, 0.25)
        warm = min(1.0, share / 0.05)
        metrics.append(
            {
                "step": step, "samples": samples, "progress": progress, "length": length, "epoch": samples / 1437,
                "loss": None if skipped else loss, "learning_rate": 2e-3 * warm * (1 + math.cos(math.pi * share)) / 2,
                "global_batch": batch, "micro_batch": 32, "accumulation": batch // 64, "workers": 2,
                "grad_norm": None if skipped else 3 * math.exp(-4 * share) * rng.lognormvariate(0, 0.3),
                "step_time_s": took, "samples_per_s": batch / took, "skipped": skipped, "time": time,
                "attempt": attempt,
            }
        )  # fmt: skip
        if step % max(1, steps // 12) == 0 or step == steps:
            scores = {"accuracy": 0.985 - 0.8 * math.exp(-8 * share), "loss": 0.06 + 2.1 * math.exp(-8 * share)}
            evaluations.append(
                {"step": step, "samples": samples, "progress": progress, "epoch": samples / 1437, "metrics": scores,
                 "duration_s": 0.21, "time": time, "attempt": attempt}
            )  # fmt: skip
    return RunData(
        _config(name),
        _plan(),
        metrics,
        evaluations,
        _attempts(metrics, restart_at),
        _summary(name, metrics, evaluations),
    )


def _config(name: str) -> dict[str, Any]:
    optimizer = {"name": "adamw", "learning_rate": 0.002, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    stop = {"steps": None, "epochs": 20.0, "samples": None, "wall_time_s": None, "metric": None}
    recipe = {"batch": 64, "optimizer": optimizer, "schedule": {"name": "cosine", "warmup": 0.05}, "stop": stop}
    scale = {"workers": [2, 8], "cpus_per_worker": 1.0}
    return {
        "name": name,
        "seed": 0,
        "recipe": recipe,
        "scale": scale,
        "checkpoint": {"uri": "runs", "interval_s": 60.0},
    }


def _plan() -> dict[str, Any]:
    return {
        "name": "digits", "global_batch": 64, "workers": 2, "micro_batch": 32, "accumulation": 1, "reference_batch": 64,
        "zero_stage": 1, "offload": "none", "activation_checkpointing": False, "precision": "fp32", "device": "cpu",
        "train_samples": 1437, "evaluation_samples": 360, "length": 86_400.0, "evaluate_every": 7185.0,
        "stop": {"epochs": 60.0}, "memory_bytes": 312_475_648, "step_time_s": 0.0312,
        "reasons": ["zero stage 1: optimizer state is shared by 2 workers", "fp32: the CPU gains nothing from bf16"],
    }  # fmt: skip


def _attempts(metrics: list[dict[str, Any]], restart_at: int | None) -> list[dict[str, Any]]:
    first = {"attempt": 1, "event": "started", "step": 0, "workers": 2, "reason": "", "time": START}
    last = {**first, "event": "ended", "step": len(metrics), "reason": "finished", "time": metrics[-1]["time"] + 1}
    if restart_at is None or restart_at >= len(metrics):
        return [first, last]
    at = metrics[restart_at - 1]["time"]
    ended = {**first, "event": "ended", "step": restart_at + 9, "reason": "worker 1 died (SIGKILL)", "time": at + 0.4}
    again = {**first, "attempt": 2, "step": restart_at, "reason": "restart", "time": at + 3.2}
    return [first, ended, again, {**last, "attempt": 2}]


def _summary(name: str, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    last = metrics[-1]
    return {
        "name": name, "state": "finished", "step": last["step"], "samples": last["samples"],
        "progress": last["progress"], "loss": last["loss"], "metrics": evaluations[-1]["metrics"],
        "samples_per_s": 2143.7, "wall_s": last["time"] - START,
        "checkpoint": f"runs/{name}/checkpoints/step-{last['step']}",
        "folder": f"runs/{name}",
    }  # fmt: skip


def write_run(folder: Path, run: RunData) -> Path:
    """Write a run's folder as the driver and the workers would."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config", "plan", "summary"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(run, name)))
    for name in ("metrics", "evaluations", "attempts"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in getattr(run, name)))
    return folder


@pytest.fixture
def fake_run() -> Callable[..., RunData]:
    """``make_run``: a believable run."""
    return make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a believable run."""
    return write_run(tmp_path / "digits", make_run())
