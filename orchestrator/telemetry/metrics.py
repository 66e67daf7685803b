"""The one table of metrics: name, type, labels, unit and help of everything a run exports, and who measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ASKED_FOR",
    "KNOWN",
    "PARTS",
    "PLANNED_RESTARTS",
    "RESTARTS",
    "STATES",
    "TABLE",
    "Metric",
    "markdown",
    "rows",
]

PREFIX = "orchestrator_"
PARTS = ("data_wait", "forward", "backward", "communication", "optimizer", "checkpoint", "evaluation", "other")
"""Where a worker's time goes; together they are its wall time."""
STATES = ("waiting", "starting", "running", "restarting", "finished", "stopped", "failed")
"""What a run is doing, as its driver sees it; it waits while its fleet gives it no devices any more."""
ASKED_FOR = ("stopped", "resized", "preempted_by_the_fleet")
"""What ends an attempt on purpose: its user, its own elasticity, or the fleet."""
PLANNED_RESTARTS = (*ASKED_FOR, "preempted")
"""What ends an attempt without anything having failed: one of those, or whoever takes nodes back."""
RESTARTS = (
    *PLANNED_RESTARTS,
    *("worker_lost", "start", "hang", "slow", "memory", "storage", "user", "request", "run", "unknown"),
)
"""All that may have ended the attempt before."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of a time, in s."""

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["rank 0", "every rank", "driver", "hub", "fleet"]


@dataclass(frozen=True)
class Metric:
    """One metric, named as Prometheus shows it: a counter ends in ``_total``, a histogram grows ``_bucket``."""

    name: str
    kind: Kind
    unit: str
    source: Source
    help: str
    labels: tuple[str, ...] = ()
    """What its reporter says of it, beside ``run`` and, for every rank, ``rank``, which the hub adds; the hub itself
    and the fleet say all of it."""

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Labels as they are exported."""
        if self.source in ("hub", "fleet"):
            return self.labels
        return ("run", *(("rank",) if self.source == "every rank" else ()), *self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """Names that a query may use."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}{suffix}" for suffix in ("_bucket", "_sum", "_count"))


def _counter(name: str, unit: str, text: str, source: Source = "rank 0", labels: tuple[str, ...] = ()) -> Metric:
    return Metric(f"{PREFIX}{name}", "counter", unit, source, text, labels)


def _gauge(name: str, unit: str, text: str, source: Source = "rank 0", labels: tuple[str, ...] = ()) -> Metric:
    return Metric(f"{PREFIX}{name}", "gauge", unit, source, text, labels)


def _histogram(name: str, text: str, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(f"{PREFIX}{name}", "histogram", "seconds", "rank 0", text, labels)


TABLE: tuple[Metric, ...] = (
    # Is it learning?
    _gauge("loss", "1", "Training loss of the last step, the mean over its global batch; NaN where it is not finite."),
    _gauge("evaluation", "1", "Held-out metrics of the last evaluation.", labels=("metric",)),
    _counter("evaluations_total", "evaluations", "Evaluations that were run."),
    _gauge("evaluation_seconds", "seconds", "Time of the last evaluation."),
    _gauge("gradient_norm", "1", "Norm of the last step's gradient, before clipping."),
    _gauge("learning_rate", "1", "Learning rate of the last step."),
    _gauge("loss_scale", "1", "What fp16 multiplies the loss by; 1 in other precisions."),
    _counter("skipped_steps_total", "steps", "Steps discarded because their loss or gradient was not finite."),
    # How far, and how fast?
    _counter("steps_total", "steps", "Optimizer steps taken, those repeated after a restart included."),
    _counter("samples_total", "samples", "Samples trained on, those repeated after a restart included."),
    _counter("tokens_total", "tokens", "Tokens trained on; 0 where telemetry.tokens_per_sample is not given."),
    _counter("repeated_samples_total", "samples", "Samples whose steps were lost with an attempt and taken again."),
    _gauge("run_step", "steps", "Optimizer steps that the run's state has behind it."),
    _gauge("run_samples", "samples", "The data cursor: samples that the run's state has behind it."),
    _gauge("run_epoch", "epochs", "Passes over the training set."),
    _gauge("run_progress_samples", "samples", "Progress in reference samples."),
    _gauge("run_progress_ratio", "ratio", "Progress as a share of the run's length, where it has one."),
    _gauge("eta_seconds", "seconds", "Time left at the present speed, where the run has a length."),
    _gauge("last_step_timestamp_seconds", "seconds", "Unix time at which the last step ended."),
    _gauge("samples_per_second", "samples/s", "Samples per second on the wall clock, over about the last 10 s."),
    _gauge("device_samples_per_second", "samples/s", "Samples per second and worker, over about the last 10 s."),
    _gauge("model_flops_per_second", "FLOP/s", "Model FLOP/s per worker, where the FLOPs of a sample are known."),
    _gauge("mfu_ratio", "ratio", "Model FLOP/s as a share of the device's peak, where both are known."),
    # Where does the time go?
    _histogram("step_seconds", "Wall time from step to step, without evaluations and checkpoints."),
    _histogram("step_part_seconds", "Parts of the wall time between steps, as rank 0 sees them.", ("part",)),
    _counter("rank_seconds_total", "seconds", "Wall time by part.", "every rank", ("part",)),
    _gauge(
        "rank_step_seconds",
        "seconds",
        "The rank's own time per step, over the last second: data wait, forward and backward, without waiting for "
        "others where that can be told apart.",
        "every rank",
    ),
    _gauge("straggler_ratio", "ratio", "Own step time of the slowest rank over the median rank's.", "hub", ("run",)),
    # What did the scheduler decide?
    _gauge("global_batch_samples", "samples", "Samples per optimizer step."),
    _gauge("micro_batch_samples", "samples", "Samples per worker, forward and backward pass."),
    _gauge("accumulation_micro_batches", "micro batches", "Micro batches per worker and optimizer step."),
    _gauge("workers", "workers", "Workers of the present attempt."),
    _gauge("noise_scale_samples", "samples", "Gradient noise scale, where it is measured."),
    _gauge("noise_scale_low_samples", "samples", "Lower bound of the noise scale."),
    _gauge("noise_scale_high_samples", "samples", "Upper bound of the noise scale; infinite while it has none."),
    _gauge("statistical_efficiency_ratio", "ratio", "What a sample is worth at this batch, in reference samples."),
    _gauge("goodput_samples_per_second", "samples/s", "Reference samples per second of step time, as measured."),
    _gauge(
        "predicted_goodput_samples_per_second",
        "samples/s",
        "Reference samples per second of step time that the last decision promised.",
    ),
    _counter("decisions_total", "decisions", "Decisions of the policy.", labels=("kind",)),
    # Is it safe?
    _counter("checkpoints_total", "checkpoints", "Checkpoints that were completed."),
    _counter("checkpoint_failures_total", "checkpoints", "Checkpoints that failed."),
    _gauge("checkpoint_seconds", "seconds", "Time from the begin of the last checkpoint to its being whole."),
    _counter("checkpoint_blocked_seconds_total", "seconds", "Time for which checkpoints kept training waiting."),
    _gauge("checkpoint_bytes", "bytes", "Size of the last checkpoint."),
    _gauge(
        "checkpoint_timestamp_seconds",
        "seconds",
        "Unix time of the last checkpoint, or of the attempt's start before there is one.",
    ),
    _counter(
        "storage_retries_total",
        "requests",
        "Requests to storage that were tried again; those of pyarrow, with which columns are read, are not seen.",
        "every rank",
        ("operation",),
    ),
    _counter(
        "storage_errors_total",
        "requests",
        "Requests to storage that were given up or refused: read, write, list, delete; and, as checkpoint, "
        "checkpoints that failed because their storage did.",
        "every rank",
        ("operation",),
    ),
    _gauge("run_info", "1", "What the run is.", "driver", ("device", "policy", "precision", "version", "zero_stage")),
    _gauge("run_state", "1", "1 for the state that the run is in, else 0.", "driver", ("state",)),
    _gauge("run_start_timestamp_seconds", "seconds", "Unix time of the run's first attempt.", "driver"),
    _counter("attempts_total", "attempts", "Starts of the worker group since the run began.", "driver"),
    _counter(
        "restarts_total", "restarts", "Starts after the first, by what had ended the one before.", "driver", ("cause",)
    ),
    _counter(
        "lost_seconds_total", "seconds", "Wall time since the first attempt that was no use.", "driver", ("cause",)
    ),
    _gauge("goodput_ratio", "ratio", "Time of steps that count over wall time since the first attempt.", "driver"),
    # Who shares the cluster?
    _gauge("fleet_devices", "devices", "Devices that the run is given; 0 while it waits.", "fleet", ("run", "queue")),
    _gauge(
        "fleet_waiting_seconds",
        "seconds",
        "For how long the run has waited for devices; 0 while it has some.",
        "fleet",
        ("run", "queue"),
    ),
    _gauge(
        "fleet_capacity_devices", "devices", "Devices that runs in queues may share; others' are left out.", "fleet"
    ),
    _gauge("fleet_used_devices", "devices", "Devices that are given to runs.", "fleet"),
    _gauge(
        "fleet_earned_devices",
        "devices",
        "Goodput of all runs, each in devices of its own smallest size: what the devices in use are worth.",
        "fleet",
    ),
    _counter("fleet_decisions_total", "decisions", "Decisions on who gets how many devices.", "fleet"),
    _counter("fleet_moves_total", "moves", "Runs that were given other devices, or none, while they ran.", "fleet"),
    _counter(
        "fleet_move_seconds_total",
        "seconds",
        "What those moves cost, as each run has measured its restarts.",
        "fleet",
    ),
    # The hardware, and telemetry itself
    _gauge("rank_info", "1", "Where the rank runs.", "every rank", ("host", "device")),
    _gauge(
        "device_memory_used_bytes",
        "bytes",
        "Device memory in use by tensors; resident memory of the process on a CPU.",
        "every rank",
    ),
    _gauge(
        "device_memory_reserved_bytes",
        "bytes",
        "Device memory held by the allocator; resident memory of the process on a CPU.",
        "every rank",
    ),
    _gauge("device_memory_peak_bytes", "bytes", "Most memory that was in use.", "every rank"),
    _gauge("device_memory_limit_bytes", "bytes", "Memory that the rank may take.", "every rank"),
    _gauge(
        "rank_matmul_flops_per_second",
        "FLOP/s",
        "Rate of matrix products before the attempt's first step.",
        "every rank",
    ),
    _gauge(
        "rank_link_bytes_per_second",
        "bytes/s",
        "Exchange with a neighbour rank, the better of two, before the attempt's first step.",
        "every rank",
    ),
    _gauge(
        "rank_all_reduce_bytes_per_second",
        "bytes/s",
        "Bus bandwidth of the group's all-reduce before the attempt's first step, as the rank saw it.",
        "every rank",
    ),
    _gauge(
        "rank_clock_offset_seconds",
        "seconds",
        "How far the clock of the rank's host was ahead of the median rank's before the attempt's first step.",
        "every rank",
    ),
    _gauge("rank_disk_free_bytes", "bytes", "Free disk for checkpoints before the attempt's first step.", "every rank"),
    _counter("pushes_failed_total", "snapshots", "Snapshots that the hub did not take.", "every rank"),
    _gauge("hub_sources", "sources", "Workers and drivers that report at present.", "hub"),
    _counter("hub_snapshots_total", "snapshots", "Snapshots taken.", "hub"),
    _counter("hub_refused_total", "snapshots", "Snapshots refused as malformed or outdated.", "hub"),
    _gauge("hub_start_timestamp_seconds", "seconds", "Unix time at which the hub started.", "hub"),
)

KNOWN: Mapping[str, Metric] = {metric.name: metric for metric in TABLE}


def rows() -> list[tuple[str, str, str, str, str, str]]:
    """Name, type, labels, unit, source and help of every metric."""
    return [(m.name, m.kind, ", ".join(m.all_labels), m.unit, m.source, m.help) for m in TABLE]


def markdown() -> str:
    """The page ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Generated from `orchestrator/telemetry/metrics.py` by `orchestrator metrics --markdown`.",
        "Names and units follow Prometheus' conventions. Parts of the wall time: "
        + ", ".join(f"`{part}`" for part in PARTS)
        + ".",
        "",
        "| name | type | labels | unit | measured by | meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in rows()]
    return "\n".join(lines) + "\n"
