"""What rank 0 writes down of a run: one record per step and evaluation, none twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from orchestrator.errors import StorageError, StorageLostError
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.observation import Decision
from orchestrator.storage.fence import Guard
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry import observing
from orchestrator.telemetry.accounting import useful_s
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.observing import RunFacts, RunObserver
from orchestrator.telemetry.publisher import Publisher
from orchestrator.telemetry.records import JsonLines, read, truncate_after
from orchestrator.training.health import Health
from orchestrator.training.state import StepStats, TrainState

__all__ = ["Recorder"]


class Recorder:
    """Appends to the run folder's records, and tells ``publisher`` what becomes a metric.

    Ranks other than 0 write nothing and publish only what is about themselves. ``cause`` is what ended the attempt
    before this one; ``nodes`` is the node of each rank, where that is known; ``keep`` brings the records to where they
    outlive this machine.
    """

    def __init__(
        self,
        folder: RunFolder,
        fence: Guard,
        plan: Plan,
        *,
        rank: int,
        attempt: int,
        cause: str = "",
        facts: RunFacts | None = None,
        nodes: Sequence[str] = (),
        publisher: Publisher | None = None,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._fence = fence
        self._plan = plan
        self._writes = rank == 0
        self._attempt = attempt
        self._cause = cause
        self._nodes = list(nodes)
        self._publisher = publisher
        self._keep = keep
        self._observer = RunObserver(facts or RunFacts(plan.reference_batch))
        self._metrics = JsonLines(folder.metrics)
        self._evaluations = JsonLines(folder.evaluations)
        self._decisions = JsonLines(folder.decisions)
        self._events = JsonLines(folder.events)
        self._one_event = threading.Lock()
        self._checked_at = 0.0
        self.last_step = 0
        """The last optimizer step that this worker took part in."""

    def begin(self, state: TrainState, parts: Mapping[str, float] | None = None) -> None:
        """Drop records of steps after ``state``: they were lost with the attempt that took them and are taken again.

        ``parts`` are the seconds that making the engine and restoring took.
        """
        self.last_step = state.step
        if self._publisher is not None and parts is not None:
            self._publisher.note(observing.observe_parts, parts, a_step=False)
        if not self._writes:
            return
        self._fence.check()
        lost = [r for r in read(self._folder.metrics) if r["step"] > state.step] if self._attempt > 1 else []
        repeated = sum(record["global_batch"] for record in lost)
        truncate_after(self._folder.metrics, state.step)
        truncate_after(self._folder.evaluations, state.step)
        truncate_after(self._folder.decisions, state.step)
        record: dict[str, object] = {
            "event": "started",
            "step": state.step,
            "workers": self._plan.layout.workers,
            "reason": "",
        }
        record["startup_s"] = sum((parts or {}).values())
        record["nodes"] = self._nodes
        if self._attempt > 1:
            repeated_s = sum(useful_s(record) for record in lost if not record["skipped"])
            record |= {"cause": self._cause, "repeated_samples": repeated, "repeated_s": repeated_s}
            record["repeated_steps"] = len(lost)
        self._attempts(record)
        self._keep()
        if self._publisher is not None:
            start = {"step": state.step, "samples": state.samples, "progress": state.progress}
            self._publisher.note(self._observer.begin, start, repeated=_repeated(self._folder))

    def step(
        self,
        state: TrainState,
        stats: StepStats,
        parts: Mapping[str, float] | None = None,
        loss_scale: float = 1.0,
        skipped_samples: int = 0,
    ) -> None:
        """Record one optimizer step.

        ``parts`` are seconds of the wall time since the step before, where known; ``skipped_samples`` those of row
        groups that this rank could not read until now.
        """
        self.last_step = state.step
        if self._publisher is not None and parts is not None:
            self._publisher.note(observing.observe_parts, parts)
        if not self._writes:
            return
        self._check_now_and_then()
        batch = state.layout.global_batch
        record = {
            **self._where(state),
            "length": self._plan.length,
            "loss": stats.loss,
            "learning_rate": stats.learning_rate,
            "global_batch": batch,
            "micro_batch": state.layout.micro_batch,
            "accumulation": state.layout.accumulation,
            "workers": state.layout.workers,
            "grad_norm": stats.grad_norm,
            "step_time_s": stats.step_time_s,
            "samples_per_s": batch / stats.step_time_s,
            "skipped": not stats.finite,
            "skipped_samples": skipped_samples,
            **({} if parts is None else {"parts": {part: round(seconds, 6) for part, seconds in parts.items()}}),
            **_scheduling(state, stats),
        }
        self._metrics.append(record)
        if self._publisher is not None:
            self._publisher.note(self._observer.step, record, loss_scale)

    def decision(self, state: TrainState, decision: Decision | None) -> None:
        """Record a decision that acts from the next step on; rank 0 knows its reasons."""
        if self._writes and decision is not None:
            self._fence.check()
            known = state.history.noise_scale
            seen = {
                "noise_scale": None if known is None else asdict(known),
                "loss": state.loss,
                "ambition": state.history.ambition_at(state.progress),
                "timings": [asdict(timing) for timing in state.history.times.timings()],
            }
            record = {"event": "decided", "before": asdict(state.layout), **asdict(decision), "seen": seen}
            self._decisions.append({**self._where(state), **record})
            if self._publisher is not None:
                self._publisher.note(self._observer.decision, record)

    def measured(self, state: TrainState, goodput: float, step_time_s: float) -> None:
        """Record what the last decision turned out to be worth, in reference samples/s and s per step."""
        if self._writes and state.history.change is not None:
            decided = state.history.change.step
            found = {"decided_at": decided, "goodput": goodput, "step_time_s": step_time_s}
            self._decisions.append({**self._where(state), "event": "measured", "layout": asdict(state.layout), **found})

    def evaluation(self, state: TrainState, duration_s: float) -> None:
        """Record one evaluation."""
        if self._writes:
            self._fence.check()
            record = {**self._where(state), "metrics": state.evaluation, "duration_s": duration_s}
            self._evaluations.append(record)
            if self._publisher is not None:
                self._publisher.note(self._observer.evaluation, record)

    @contextmanager
    def watching_a_checkpoint(self) -> Iterator[None]:
        """Count a checkpoint that fails; the error goes on its way."""
        try:
            yield
        except Exception as error:
            if self._writes and self._publisher is not None:
                of_storage = isinstance(error, OSError | StorageError | StorageLostError)
                self._publisher.note(observing.observe_checkpoint_failure, of_storage=of_storage)
            raise

    def checkpoint(self, saved: Path | None, duration_s: float) -> None:
        """Tell of a save for which training waited ``duration_s``; None: ``checkpoint_whole`` tells of the rest."""
        if self._writes and self._publisher is not None:
            self._publisher.note(observing.observe_blocked, duration_s)
            if saved is not None:
                self._publisher.note(_observe_checkpoint, self._observer, saved, duration_s)

    def checkpoint_whole(self, size_bytes: int, duration_s: float) -> None:
        """Tell of a checkpoint that has reached its store, ``duration_s`` after its save began."""
        if self._writes and self._publisher is not None:
            self._publisher.note(self._observer.checkpoint, duration_s=duration_s, size_bytes=size_bytes)

    def checkpoint_trouble(self, text: str) -> None:
        """Raise the alarm: a checkpoint does not reach its store. Training goes on."""
        self.event("checkpoint_trouble", text)
        if self._writes and self._publisher is not None:
            self._publisher.note(observing.observe_checkpoint_failure, of_storage=True)

    def health(self, rank: int, found: Health) -> None:
        """Record what the ranks found out about themselves, and tell of what is not as it should be."""
        if self._publisher is not None:
            self._publisher.note(observing.observe_health, asdict(found.ranks[rank]))
        if self._writes:
            with JsonLines(self._folder.health) as lines:
                lines.append({"attempt": self._attempt, "time": time.time(), **found.to_dict()})
            for kind in dict.fromkeys(finding.kind for finding in found.findings):
                texts = [finding.text for finding in found.findings if finding.kind == kind]
                self.event(f"health_{kind}", "; ".join(texts))

    def event(self, kind: str, text: str) -> None:
        """Record something that a person should hear of."""
        if self._writes:
            with self._one_event:
                step = {"step": self.last_step, "attempt": self._attempt}
                self._events.append({"event": kind, "text": text, **step, "time": time.time()})

    def rest(self, parts: Mapping[str, float] | None) -> None:
        """Tell of the time after the last step."""
        if self._publisher is None or parts is None:
            return
        self._publisher.note(observing.observe_parts, parts, a_step=False)
        if self._writes:
            self._publisher.note(self._observer.rest, parts)

    def end(self, state: TrainState, reason: str) -> None:
        """Record how this attempt ended."""
        if self._writes:
            self._attempts({"event": "ended", "step": state.step, "workers": state.layout.workers, "reason": reason})

    def _attempts(self, record: dict[str, object]) -> None:
        lines = JsonLines(self._folder.attempts)
        lines.append({"attempt": self._attempt, **record, "time": time.time()})
        lines.close()

    def _where(self, state: TrainState) -> dict[str, object]:
        epoch = state.samples / self._plan.train_samples
        where = {"step": state.step, "samples": state.samples, "progress": state.progress, "epoch": epoch}
        return {**where, "time": time.time(), "attempt": self._attempt}

    def _check_now_and_then(self) -> None:
        # A look at the fence costs a file read: once a second is enough, since the kernel's lock stands before it.
        if time.monotonic() - self._checked_at > 1.0:
            self._fence.check()
            self._checked_at = time.monotonic()


def _repeated(folder: RunFolder) -> tuple[int, int]:
    """Steps and samples that all attempts lost and took again, this one's included."""
    starts = read(folder.attempts)
    steps, samples = (sum(start.get(f"repeated_{what}", 0) for start in starts) for what in ("steps", "samples"))
    return steps, samples


def _observe_checkpoint(meter: Meter, observer: RunObserver, saved: Path, duration_s: float) -> None:
    """In the publisher's thread: looking at every file takes a while, and a newer save may delete it meanwhile."""
    try:
        size: int | None = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    except FileNotFoundError:
        size = None
    observer.checkpoint(meter, duration_s=duration_s, size_bytes=size if saved.is_dir() else None)


def _scheduling(state: TrainState, stats: StepStats) -> dict[str, object]:
    """What a replay needs of a step: its times, and the gradient noise where it was measured."""
    found: dict[str, object] = {"learning_rate_factor": state.learning_rate_factor}
    if stats.micro_batch_time_s is not None:
        found["micro_batch_time_s"] = stats.micro_batch_time_s
    if stats.noise_cost_s:
        found["noise_cost_s"] = stats.noise_cost_s
    if stats.noise is not None:
        found["noise"] = asdict(stats.noise)
    if (known := state.history.noise_scale) is not None:
        found |= {"noise_scale": known.value, "noise_scale_low": known.low, "noise_scale_high": known.high}
    return found
