"""What a run says in the terminal: pure functions that render lines, and the display that writes them to a stream."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.telemetry import human
from orchestrator.telemetry.accounting import USEFUL
from orchestrator.telemetry.story import layout_change

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Display",
    "Estimator",
    "breakdown_line",
    "decision_line",
    "evaluation_line",
    "progress_line",
    "summary",
]

SEPARATOR = "  "


@dataclass(frozen=True)
class Estimator:
    """Smoothed speed, time left and time by part, from the records of the current attempt.

    Speed is measured on the wall clock between records, so that evaluation and checkpoints count. Weights decay
    with age: a sum of samples and a sum of seconds, each multiplied by exp(-dt / memory_s) per step, and the speed
    is their ratio. A constant speed is thus met exactly from the second record on; the first step of an attempt,
    slowed by warm-up, is left out.
    """

    memory_s: float = 30.0
    """Seconds after which a step's weight has fallen to 1/e."""
    last: tuple[int, float, float, float] | None = None
    """Attempt, unix time, samples and progress of the last record."""
    elapsed_s: float = 0.0
    """Decayed sum of seconds."""
    samples: float = 0.0
    """Decayed sum of samples."""
    progress: float = 0.0
    """Decayed sum of progress, in reference samples."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Decayed sums of seconds by part, where steps were timed."""

    def after(self, record: Mapping[str, Any]) -> Estimator:
        """The estimator with one more step record; a new attempt starts afresh."""
        now = (int(record.get("attempt") or 0), record["time"], record["samples"], record["progress"])
        if self.last is None or self.last[0] != now[0]:
            return Estimator(self.memory_s, now)
        _, time, samples, progress = self.last
        dt = max(0.0, now[1] - time)
        decay = math.exp(-dt / self.memory_s)
        return replace(
            self,
            last=now,
            elapsed_s=self.elapsed_s * decay + dt,
            samples=self.samples * decay + now[2] - samples,
            progress=self.progress * decay + now[3] - progress,
            parts=_decayed(self.parts, decay, record.get("parts") or {}),
        )

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the time, the largest first; empty where steps were not timed."""
        total = sum(self.parts.values())
        shares = {part: seconds / total for part, seconds in self.parts.items()} if total > 0 else {}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    @property
    def goodput_ratio(self) -> float | None:
        """Share of the time that went into steps themselves; None where steps were not timed."""
        return sum(self.shares.get(part, 0.0) for part in USEFUL) if self.parts else None

    @property
    def samples_per_s(self) -> float | None:
        """Samples per second; None before the second record of an attempt."""
        return self.samples / self.elapsed_s if self.elapsed_s > 0 else None

    def time_left_s(self, length: float | None) -> float | None:
        """Seconds to progress ``length`` (reference samples) at the current speed; None when it cannot be told."""
        if length is None or self.last is None or self.elapsed_s <= 0 or self.progress <= 0:
            return None
        return max(0.0, length - self.last[3]) * self.elapsed_s / self.progress


def _decayed(sums: Mapping[str, float], decay: float, more: Mapping[str, float]) -> dict[str, float]:
    return {part: sums.get(part, 0.0) * decay + more.get(part, 0.0) for part in {**sums, **more}}


def progress_line(
    record: Mapping[str, Any],
    *,
    now: float,
    started: float,
    width: int | None = None,
    estimator: Estimator | None = None,
) -> str:
    """One line for a step record, at most ``width`` characters: what matters least is left out first.

    ``now`` and ``started`` are seconds on one clock; a run without a length shows the time since ``started``.
    Speed and time left come from ``estimator``, or else the record's own speed is shown.
    """
    fields = _fields(record, estimator or Estimator(), now - started)
    for dropped in ("samples", "batch", "rate", "goodput", "speed"):
        if width is None or len(SEPARATOR.join(fields.values())) <= width:
            break
        fields.pop(dropped, None)
    return SEPARATOR.join(fields.values())[:width]


def _fields(record: Mapping[str, Any], estimator: Estimator, elapsed_s: float) -> dict[str, str]:
    length, progress = record.get("length"), record["progress"]
    speed = estimator.samples_per_s
    fields = {
        "step": f"step {human.count(record['step'])}",
        "samples": f"{human.count(record['samples'])} samples",
        "progress": f"{min(1.0, progress / length):.1%}".replace("%", " %") if length else "",
        "loss": "skipped (not finite)" if record.get("skipped") else f"loss {_loss(record.get('loss'))}",
        "speed": human.rate(record.get("samples_per_s") if speed is None else speed, "samples"),
        "batch": f"batch {human.count(record['global_batch'])}",
        "rate": f"lr {human.number(record.get('learning_rate'), digits=3)}",
        "goodput": "" if estimator.goodput_ratio is None else f"goodput {_percent(estimator.goodput_ratio)}",
        "time": _time(length, estimator.time_left_s(length), elapsed_s),
    }
    return {name: text for name, text in fields.items() if text}


def _loss(value: float | None) -> str:
    return "not finite" if value is None else human.number(value, trim=False)


def breakdown_line(shares: Mapping[str, float], *, width: int | None = None) -> str:
    """One line on where the time goes, the largest part first; what is under half a percent is left out."""
    named = [f"{part.replace('_', ' ')} {_percent(share)}" for part, share in shares.items() if share >= 0.005]
    return SEPARATOR.join(named)[:width]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(length: float | None, left_s: float | None, elapsed_s: float) -> str:
    if length is None:
        return f"{human.duration(elapsed_s)} so far"
    return "" if left_s is None else f"{human.duration(left_s)} left"


def evaluation_line(record: Mapping[str, Any]) -> str:
    """One line for an evaluation record: every metric, in the order the task gave them."""
    metrics = [f"{human.printable(k)} {human.number(v, trim=False)}" for k, v in record["metrics"].items()]
    took = record.get("duration_s")
    where = f"evaluation at step {human.count(record['step'])}, epoch {human.number(record['epoch'], digits=3)}:"
    return SEPARATOR.join([where, *metrics, *([f"(took {human.duration(took)})"] if took is not None else [])])


def decision_line(record: Mapping[str, Any]) -> str:
    """One line for a decision: what changes at which step, and why; a measurement of what came of one is left out."""
    change, reason = layout_change(record), human.printable(record["reason"])
    return f"step {human.count(record['step'])}: {record['kind']}: batch {change}: {reason}"


def summary(result: Mapping[str, Any]) -> str:
    """The closing lines of a run, from ``summary.json``: how it ended, what it reached and where everything is."""
    rows = [(human.printable(k), human.number(v)) for k, v in (result.get("metrics") or {}).items()]
    rows.append(("training loss", human.number(result.get("loss"))))
    if (steps := result.get("step")) is None:  # it was stopped while it waited in its queue
        rows.append(("steps", "none"))
    else:
        rows.append(("steps", f"{human.count(steps)} ({human.count(result['samples'])} samples)"))
    speed = human.rate(result.get("samples_per_s"), "samples")
    rows.append(("speed", f"{speed}, {human.duration(result.get('wall_s'))} in all"))
    rows += _useful(result)
    rows.append(("checkpoint", human.printable(result.get("checkpoint") or "none")))
    if folder := result.get("folder"):
        rows.append(("metrics", human.printable(PurePath(folder) / "metrics.jsonl")))
        rows.append(("report", human.printable(PurePath(folder) / "report.html")))
    wide = max(len(label) for label, _ in rows)
    head = f"{human.printable(result['name'])}: {human.printable(result['state'])}"
    return "\n".join([head, *(f"  {label:<{wide}}  {text}" for label, text in rows)])


def _useful(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the time went, what share of it became steps that count, what took the most of the rest, and restarts."""
    rows, parts = [], result.get("parts_s") or {}
    if (total := sum(parts.values())) > 0:
        largest = sorted(parts.items(), key=lambda item: -item[1])
        rows.append(("time", breakdown_line({part: seconds / total for part, seconds in largest})))
    if (ratio := result.get("goodput_ratio")) is not None:
        lost = sorted((result.get("lost_s") or {}).items(), key=lambda item: -item[1])
        rest = ", ".join(f"{cause.replace('_', ' ')} {human.duration(seconds)}" for cause, seconds in lost[:3])
        rows.append(("goodput", f"{_percent(ratio)} of the wall time" + (f"; lost: {rest}" if rest else "")))
    if restarts := result.get("restarts"):
        causes = (f"{count} {human.printable(cause).replace('_', ' ')}" for cause, count in restarts.items())
        rows.append(("restarts", ", ".join(causes)))
    return rows


class Display:
    """Shows a run on ``stream`` as it goes: live lines on a terminal, else a plain line every ``interval_s``.

    Live are the progress and, where steps are timed, what the time of the last half minute went into.
    Writes only to the stream it was handed. ``clock`` returns seconds and never goes back (``time.monotonic``).
    Close it, or use it in a ``with`` statement: a terminal's cursor is hidden while the live line is there.
    """

    REDRAW_S = 0.1

    def __init__(
        self,
        stream: TextIO,
        *,
        interactive: bool,
        interval_s: float,
        clock: Callable[[], float],
        width: int | None = None,
    ) -> None:
        self._clock = clock
        self._started = clock()
        # A dumb terminal cannot redraw a line.
        live = interactive and os.environ.get("TERM") != "dumb"
        self._screen: _PlainLines | _LiveLine = _LiveLine(stream, width) if live else _PlainLines(stream)
        self._interval_s = self.REDRAW_S if live else interval_s
        self._estimator = Estimator()
        self._due = -math.inf
        self._pending: Mapping[str, Any] | None = None

    def restart(self) -> None:
        """Forget the steps of the run before: another begins, and its steps count from 1 again."""
        self._estimator = Estimator()
        self._pending = None

    def pace(self, interval_s: float) -> None:
        """From now on a plain line comes every ``interval_s``; a terminal is redrawn as before."""
        if isinstance(self._screen, _PlainLines):
            self._interval_s = interval_s

    def step(self, record: Mapping[str, Any]) -> None:
        """Take a step record; shown when it is time, and at once, to stay, when the step was skipped."""
        self._estimator = self._estimator.after(record)
        self._pending = record
        if record.get("skipped"):
            self._screen.write(self._line(record, None))
            self._pending = None
        elif self._clock() >= self._due:
            self._show()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation record."""
        self._screen.write(evaluation_line(record))

    def decision(self, record: Mapping[str, Any]) -> None:
        """Show a decision of the policy."""
        if record.get("event") == "decided":
            self._screen.write(decision_line(record))

    def note(self, text: str) -> None:
        """Show a line, or lines, of text."""
        for line in text.splitlines() or [""]:
            self._screen.write(human.printable(line))

    def close(self) -> None:
        """Show the last step, if it is not yet, and leave the stream as it was."""
        self._show()
        self._screen.close()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _show(self) -> None:
        if self._pending is not None:
            room = self._screen.room(self._pending)
            self._screen.draw(self._line(self._pending, room), self._pending, self._estimator.shares)
            self._pending = None
            self._due = self._clock() + self._interval_s

    def _line(self, record: Mapping[str, Any], width: int | None) -> str:
        return progress_line(record, now=self._clock(), started=self._started, width=width, estimator=self._estimator)


class _PlainLines:
    """A pipe or a log file: every line stays."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def room(self, _record: Mapping[str, Any]) -> int | None:
        return None

    def write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def draw(self, line: str, _record: Mapping[str, Any], _shares: Mapping[str, float]) -> None:
        self.write(line)

    def close(self) -> None:
        self._stream.flush()


class _LiveLine:
    """A terminal: the last lines are redrawn, the first of them with a bar; other lines scroll above them."""

    def __init__(self, stream: TextIO, width: int | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(
            file=stream, force_terminal=True, width=width, highlight=False, markup=False, emoji=False
        )
        # No refresh thread: the driver's poll draws, so nothing is written from behind its back.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def room(self, record: Mapping[str, Any]) -> int:
        bar = self._bar_width(record)
        return max(1, self._console.width - 1 - (bar + len(SEPARATOR) if bar else 0))

    def write(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def draw(self, line: str, record: Mapping[str, Any], shares: Mapping[str, float]) -> None:
        from rich.console import Group
        from rich.text import Text

        if not self._live.is_started:
            self._live.start()
        rows: list[Table | Text] = [self._row(line, record)]
        if below := breakdown_line(shares, width=self._console.width - 1):
            rows.append(Text(below, style="dim", no_wrap=True, overflow="crop"))
        self._live.update(Group(*rows), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _bar_width(self, record: Mapping[str, Any]) -> int:
        return min(24, self._console.width // 6) if record.get("length") and self._console.width >= 60 else 0

    def _row(self, line: str, record: Mapping[str, Any]) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, len(SEPARATOR), 0, 0))
        cells: list[ProgressBar | Text] = [Text(line, no_wrap=True, overflow="crop")]
        if bar := self._bar_width(record):
            done = min(record["progress"], record["length"])
            cells.insert(
                0,
                ProgressBar(
                    total=record["length"], completed=done, width=bar, complete_style="cyan", finished_style="green"
                ),
            )
        row.add_row(*cells)
        return row
