"""From what a run records to the metrics of the table: each function folds one thing into a meter."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.scheduling.noise_scale import NoiseScale, statistical_efficiency
from orchestrator.scheduling.observation import KINDS
from orchestrator.telemetry.accounting import NAMED, Account
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.metrics import RESTARTS, STATES
from orchestrator.telemetry.progress import Estimator

__all__ = [
    "RunFacts",
    "RunObserver",
    "observe_account",
    "observe_blocked",
    "observe_checkpoint_failure",
    "observe_health",
    "observe_memory",
    "observe_parts",
    "observe_place",
    "observe_requests",
    "observe_run",
    "observe_state",
    "observe_storage",
]

SPEED_MEMORY_S = 10.0
OWN = ("data_wait", "forward", "backward")
"""Parts of a step in which a rank works by itself."""
BESIDE_STEPS = ("checkpoint", "evaluation")


@dataclass(frozen=True)
class RunFacts:
    """What is the same for all steps of an attempt. FLOPs are those of forward and backward pass, where known."""

    reference_batch: int
    tokens_per_sample: float = 0.0
    flops_per_sample: float | None = None
    peak_flops_per_s: float | None = None


class RunObserver:
    """Folds what rank 0 records of the run; it remembers the last step, for speed and goodput."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._estimator = Estimator(SPEED_MEMORY_S)
        self._progress: float | None = None
        self._repeated = (0, 0)

    def begin(self, meter: Meter, start: Mapping[str, Any], *, repeated: tuple[int, int]) -> None:
        """An attempt begins: what can be counted is there from the start, so that a first event is a rise from 0.

        Args:
            meter: Where to.
            start: ``step``, ``samples`` and ``progress`` from which it goes on.
            repeated: Steps and samples of all attempts so far that were lost and are taken again.
        """
        self._progress, self._repeated = start["progress"], repeated
        self._taken(meter, start)
        meter.total("orchestrator_repeated_samples_total", repeated[1])
        for name in ("evaluations", "skipped_steps", "checkpoints", "checkpoint_failures"):
            meter.count(f"orchestrator_{name}_total", 0.0)
        meter.count("orchestrator_checkpoint_blocked_seconds_total", 0.0)
        for kind in KINDS:
            meter.count("orchestrator_decisions_total", 0.0, kind)
        observe_storage(meter, "checkpoint", retries=0, errors=0)
        meter.set("orchestrator_checkpoint_timestamp_seconds", time.time())

    def step(self, meter: Meter, record: Mapping[str, Any], loss_scale: float) -> None:
        """One record of ``metrics.jsonl``."""
        batch = record["global_batch"]
        self._taken(meter, record)
        meter.count("orchestrator_skipped_steps_total", float(record["skipped"]))
        loss = record["loss"]
        meter.set("orchestrator_loss", math.nan if loss is None else loss)
        meter.set("orchestrator_gradient_norm", record["grad_norm"])
        meter.set("orchestrator_learning_rate", record["learning_rate"])
        meter.set("orchestrator_loss_scale", loss_scale)
        meter.set("orchestrator_global_batch_samples", batch)
        meter.set("orchestrator_micro_batch_samples", record["micro_batch"])
        meter.set("orchestrator_accumulation_micro_batches", record["accumulation"])
        meter.set("orchestrator_workers", record["workers"])
        self._position(meter, record)
        self._speed(meter, record)
        self._worth(meter, record)
        self._times(meter, record.get("parts"))

    def evaluation(self, meter: Meter, record: Mapping[str, Any]) -> None:
        """One record of ``evaluations.jsonl``."""
        meter.count("orchestrator_evaluations_total")
        meter.set("orchestrator_evaluation_seconds", record["duration_s"])
        for name, value in record["metrics"].items():
            meter.set("orchestrator_evaluation", math.nan if value is None else value, name)

    def decision(self, meter: Meter, record: Mapping[str, Any]) -> None:
        """One record of ``decisions.jsonl``."""
        meter.count("orchestrator_decisions_total", 1.0, record["kind"])
        meter.set("orchestrator_predicted_goodput_samples_per_second", (record.get("then") or {}).get("goodput"))

    def checkpoint(self, meter: Meter, *, duration_s: float, size_bytes: int | None) -> None:
        """A checkpoint is whole: how long it took, and how large it is; None where it is gone again already."""
        meter.count("orchestrator_checkpoints_total")
        meter.set("orchestrator_checkpoint_seconds", duration_s)
        meter.set("orchestrator_checkpoint_bytes", size_bytes)
        meter.set("orchestrator_checkpoint_timestamp_seconds", time.time())

    def rest(self, meter: Meter, parts: Mapping[str, float]) -> None:
        """What came after the last step: the last evaluation and checkpoint."""
        self._times(meter, parts, a_step=False)

    def _taken(self, meter: Meter, at: Mapping[str, Any]) -> None:
        """Counted from where the run stands: what a killed rank had not told any more is in its records."""
        steps, samples = at["step"] + self._repeated[0], at["samples"] + self._repeated[1]
        meter.total("orchestrator_steps_total", steps)
        meter.total("orchestrator_samples_total", samples)
        meter.total("orchestrator_tokens_total", samples * self._facts.tokens_per_sample)

    def _position(self, meter: Meter, record: Mapping[str, Any]) -> None:
        meter.set("orchestrator_run_step", record["step"])
        meter.set("orchestrator_run_samples", record["samples"])
        meter.set("orchestrator_run_epoch", record["epoch"])
        meter.set("orchestrator_run_progress_samples", record["progress"])
        meter.set("orchestrator_last_step_timestamp_seconds", record["time"])
        if length := record["length"]:
            meter.set("orchestrator_run_progress_ratio", min(1.0, record["progress"] / length))

    def _speed(self, meter: Meter, record: Mapping[str, Any]) -> None:
        self._estimator = self._estimator.after(record)
        if (speed := self._estimator.samples_per_s) is None:
            return
        each = speed / record["workers"]
        meter.set("orchestrator_samples_per_second", speed)
        meter.set("orchestrator_device_samples_per_second", each)
        meter.set("orchestrator_eta_seconds", self._estimator.time_left_s(record["length"]))
        if (flops := self._facts.flops_per_sample) is not None:
            meter.set("orchestrator_model_flops_per_second", flops * each)
            if (peak := self._facts.peak_flops_per_s) is not None:
                meter.set("orchestrator_mfu_ratio", flops * each / peak)

    def _worth(self, meter: Meter, record: Mapping[str, Any]) -> None:
        if self._progress is not None and record["step_time_s"] > 0:
            moved = record["progress"] - self._progress
            meter.average("orchestrator_goodput_samples_per_second", moved / record["step_time_s"])
        self._progress = record["progress"]
        if "noise_scale" not in record:
            return
        known = NoiseScale(*(_infinite(record[f"noise_scale{end}"]) for end in ("", "_low", "_high")))
        for name, value in (("", known.value), ("low_", known.low), ("high_", known.high)):
            meter.set(f"orchestrator_noise_scale_{name}samples", value)
        worth = statistical_efficiency(known.counted, self._facts.reference_batch, record["global_batch"])
        meter.set("orchestrator_statistical_efficiency_ratio", worth)

    def _times(self, meter: Meter, parts: Mapping[str, float] | None, *, a_step: bool = True) -> None:
        if not parts:
            return
        if a_step:
            own = sum(seconds for part, seconds in parts.items() if part not in BESIDE_STEPS)
            meter.observe("orchestrator_step_seconds", own)
        for part, seconds in parts.items():
            meter.observe("orchestrator_step_part_seconds", seconds, part)


def observe_parts(meter: Meter, parts: Mapping[str, float], *, a_step: bool = True) -> None:
    """A rank's wall time since the step before, by part."""
    for part, seconds in parts.items():
        meter.count("orchestrator_rank_seconds_total", seconds, part)
    if a_step:
        meter.average("orchestrator_rank_step_seconds", sum(parts.get(part, 0.0) for part in OWN))


def observe_place(meter: Meter, host: str, device: str) -> None:
    """Where a rank runs."""
    meter.set("orchestrator_rank_info", 1.0, host, device)
    meter.count("orchestrator_pushes_failed_total", 0.0)


def observe_health(meter: Meter, figures: Mapping[str, Any]) -> None:
    """What a rank measured of itself before its first step; a rate that was not measured is left out."""
    for name in ("matmul_flops_per_s", "link_bytes_per_s", "all_reduce_bytes_per_s"):
        if (value := figures[name]) is not None:
            meter.set(f"orchestrator_rank_{name}econd", value)
    meter.set("orchestrator_rank_clock_offset_seconds", figures["clock_offset_s"])
    meter.set("orchestrator_rank_disk_free_bytes", figures["disk_free_bytes"])


def observe_memory(meter: Meter, *, used: int, reserved: int, peak: int, limit: int) -> None:
    """A rank's memory, in bytes."""
    for name, value in (("used", used), ("reserved", reserved), ("peak", peak), ("limit", limit)):
        meter.set(f"orchestrator_device_memory_{name}_bytes", value)


def observe_storage(meter: Meter, operation: str, *, retries: int, errors: int) -> None:
    """Requests of one operation that had to be tried again, and that failed."""
    meter.count("orchestrator_storage_retries_total", retries, operation)
    meter.count("orchestrator_storage_errors_total", errors, operation)


def observe_blocked(meter: Meter, seconds: float) -> None:
    """For how long training waited for a checkpoint."""
    meter.count("orchestrator_checkpoint_blocked_seconds_total", seconds)


def observe_checkpoint_failure(meter: Meter, *, of_storage: bool) -> None:
    """A checkpoint failed, with ``of_storage`` because the store did."""
    meter.count("orchestrator_checkpoint_failures_total")
    observe_storage(meter, "checkpoint", retries=0, errors=int(of_storage))


def observe_run(meter: Meter, info: Mapping[str, str]) -> None:
    """What the run is; ``info`` has the labels of ``orchestrator_run_info``."""
    meter.set("orchestrator_run_info", 1.0, *(info[name] for name in sorted(info)))


def observe_state(meter: Meter, state: str) -> None:
    """What the run is doing."""
    assert state in STATES, state
    for each in STATES:
        meter.set("orchestrator_run_state", float(each == state), each)


@dataclass(frozen=True)
class FleetFacts:
    """How a fleet stands, and what it has done since its service began."""

    runs: tuple[tuple[str, str, int, float], ...] = ()
    """Name, queue, devices, and for how many seconds it has waited for some, of each run."""
    capacity: int = 0
    earned: float = 0.0
    decisions: int = 0
    moves: int = 0
    move_s: float = 0.0


MOST_FLEET_RUNS = 400
"""That are told of one by one: a snapshot holds at most a thousand series."""


def observe_fleet(meter: Meter, facts: FleetFacts) -> None:
    """Who shares the cluster, and what that cost."""
    for name in ("orchestrator_fleet_devices", "orchestrator_fleet_waiting_seconds"):
        meter.forget(name)
    for run, queue, devices, waiting_s in facts.runs[:MOST_FLEET_RUNS]:
        meter.set("orchestrator_fleet_devices", devices, run, queue)
        meter.set("orchestrator_fleet_waiting_seconds", waiting_s, run, queue)
    meter.set("orchestrator_fleet_capacity_devices", facts.capacity)
    meter.set("orchestrator_fleet_used_devices", sum(devices for _, _, devices, _ in facts.runs))
    meter.set("orchestrator_fleet_earned_devices", facts.earned)
    meter.reach("orchestrator_fleet_decisions_total", facts.decisions)
    meter.reach("orchestrator_fleet_moves_total", facts.moves)
    meter.reach("orchestrator_fleet_move_seconds_total", facts.move_s)


def observe_requests(meter: Meter, operation: str, *, retries: int, errors: int) -> None:
    """The same, as this process counts them elsewhere since it began."""
    meter.reach("orchestrator_storage_retries_total", retries, operation)
    meter.reach("orchestrator_storage_errors_total", errors, operation)


def observe_account(meter: Meter, found: Account) -> None:
    """What became of the wall time so far."""
    now = time.time()
    meter.set("orchestrator_goodput_ratio", found.goodput_ratio(now))
    meter.set("orchestrator_run_start_timestamp_seconds", found.began)
    meter.total("orchestrator_attempts_total", found.attempts)
    for cause in ("startup", *NAMED, "repeated", "other"):
        meter.total("orchestrator_lost_seconds_total", found.lost_s.get(cause, 0.0), cause)
    for cause, seconds in found.lost_s.items():
        meter.total("orchestrator_lost_seconds_total", seconds, cause)
    for cause, count in {**dict.fromkeys(RESTARTS, 0), **found.restarts}.items():
        meter.total("orchestrator_restarts_total", count, cause)


def _infinite(bound: float | None) -> float:
    return math.inf if bound is None else bound
