"""What the terminal shows, compared as a whole."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.progress import Display, Estimator, evaluation_line, progress_line, summary


def step(n: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": n, "samples": 64 * n, "progress": 64.0 * n, "length": 6400.0, "epoch": n / 20, "loss": 0.4321,
        "learning_rate": 0.0012, "global_batch": 64, "micro_batch": 32, "accumulation": 1, "workers": 2,
        "grad_norm": 1.0, "step_time_s": 0.5, "samples_per_s": 130.0, "skipped": False, "time": 1000 + n / 2,
        "attempt": 1,
    }  # fmt: skip
    return {**record, **changes}


EVALUATION = {"step": 40, "epoch": 2.0, "metrics": {"accuracy": 0.9, "loss": 0.31234}, "duration_s": 0.41}


def estimated(*records: dict[str, Any]) -> Estimator:
    estimator = Estimator()
    for record in records:
        estimator = estimator.after(record)
    return estimator


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# -- the estimator -----------------------------------------------------------------------------


@given(dt=st.floats(0.01, 100), batch=st.integers(1, 4096), steps=st.integers(2, 60))
def test_a_constant_speed_is_met_exactly(dt: float, batch: int, steps: int) -> None:
    rows = [step(n, time=n * dt, samples=n * batch, progress=n * batch / 2) for n in range(1, steps + 1)]
    estimator = estimated(*rows)
    assert estimator.samples_per_s == pytest.approx(batch / dt)
    left = 1000 * batch - rows[-1]["progress"]
    assert estimator.time_left_s(1000 * batch) == pytest.approx(left / (batch / 2 / dt))


def test_speed_follows_a_change_and_lies_between_old_and_new() -> None:
    slow = [step(n, time=float(n)) for n in range(1, 61)]
    fast = [step(60 + n, time=60 + n / 4) for n in range(1, 241)]
    speeds = [estimated(*slow, *fast[:n]).samples_per_s or 0 for n in (0, 40, 80, 240)]
    assert speeds == sorted(speeds)
    assert speeds[0] == pytest.approx(64)
    assert 220 < speeds[-1] < 256


def test_a_pause_between_steps_counts() -> None:
    decay = math.exp(-8 / 30)
    speed = (64 * decay + 64) / (1 * decay + 8)
    assert estimated(step(1, time=0.0), step(2, time=1.0), step(3, time=9.0)).samples_per_s == pytest.approx(speed)


def test_nothing_is_guessed_from_one_step_and_an_attempt_starts_afresh() -> None:
    estimator = estimated(step(1), step(2), step(3, attempt=2, time=5000.0))
    assert (estimator.samples_per_s, estimator.time_left_s(6400)) == (None, None)
    assert estimator.after(step(4, attempt=2, time=5001.0)).samples_per_s == pytest.approx(64)


def test_a_run_without_a_length_has_no_time_left_and_a_finished_one_none_to_go() -> None:
    assert estimated(step(1), step(2)).time_left_s(None) is None
    assert estimated(step(99), step(100)).time_left_s(6400) == 0


# -- lines -------------------------------------------------------------------------------------

LINES = {
    120: "step 40  2,560 samples  40.0 %  loss 0.4321  128 samples/s  batch 64  lr 1.2e-3  30.0 s left",
    80: "step 40  40.0 %  loss 0.4321  128 samples/s  batch 64  lr 1.2e-3  30.0 s left",
    66: "step 40  40.0 %  loss 0.4321  128 samples/s  30.0 s left",
    40: "step 40  40.0 %  loss 0.4321  30.0 s lef",
}


@pytest.mark.parametrize("width", LINES)
def test_progress_line(width: int) -> None:
    estimator = estimated(step(39), step(40))
    assert progress_line(step(40), now=9.0, started=0.0, width=width, estimator=estimator) == LINES[width]


def test_progress_line_without_length_speed_or_loss() -> None:
    record = step(1437, length=None, loss=None, samples_per_s=None)
    assert progress_line(record, now=245.0, started=0.0) == (
        "step 1,437  91,968 samples  loss not finite  n/a samples/s  batch 64  lr 1.2e-3  4 min 05 s so far"
    )


def test_a_skipped_step_shows() -> None:
    line = progress_line(step(40, skipped=True, loss=None), now=9.0, started=0.0)
    assert line == "step 40  2,560 samples  40.0 %  skipped (not finite)  130 samples/s  batch 64  lr 1.2e-3"


def test_evaluation_line() -> None:
    line = "evaluation at step 40, epoch 2:  accuracy 0.9000  loss 0.3123  (took 410 ms)"
    assert evaluation_line(EVALUATION) == line
    assert evaluation_line({"step": 40, "epoch": 2.0, "metrics": {"a\x1b": None}}) == (
        "evaluation at step 40, epoch 2:  a? n/a"
    )


def test_summary() -> None:
    result = {
        "name": "digits", "state": "finished", "step": 450, "samples": 28_740, "progress": 28_740.0, "loss": 0.0182,
        "metrics": {"accuracy": 0.9778, "loss": 0.0812}, "samples_per_s": 1234.5, "wall_s": 23.31,
        "checkpoint": "runs/digits/checkpoints/step-450", "folder": "runs/digits",
    }  # fmt: skip
    assert (
        summary(result)
        == """\
digits: finished
  accuracy       0.9778
  loss           0.0812
  training loss  0.0182
  steps          450 (28,740 samples)
  speed          1,234 samples/s, 23.3 s in all
  checkpoint     runs/digits/checkpoints/step-450
  metrics        runs/digits/metrics.jsonl
  report         runs/digits/report.html"""
    )


def test_summary_of_a_run_that_reached_nothing() -> None:
    result = {"name": "digits", "state": "failed", "step": 0, "samples": 0, "loss": None, "metrics": None}
    assert (
        summary(result)
        == """\
digits: failed
  training loss  n/a
  steps          0 (0 samples)
  speed          n/a samples/s, n/a in all
  checkpoint     none"""
    )


# -- display -----------------------------------------------------------------------------------


def test_a_pipe_gets_a_plain_line_per_interval_and_the_last_step() -> None:
    stream, clock = io.StringIO(), Clock()
    with Display(stream, interactive=False, interval_s=5.0, clock=clock) as display:
        display.note("attempt 1: 2 workers\nsecond line")
        for n in range(1, 25):
            clock.now = n / 2
            display.step(step(n, skipped=n == 16, loss=None if n == 16 else 0.4321))
            if n == 14:
                display.evaluation({**EVALUATION, "step": 14})
    assert (
        stream.getvalue()
        == """\
attempt 1: 2 workers
second line
step 1  64 samples  1.0 %  loss 0.4321  130 samples/s  batch 64  lr 1.2e-3
step 11  704 samples  11.0 %  loss 0.4321  128 samples/s  batch 64  lr 1.2e-3  44.5 s left
evaluation at step 14, epoch 2:  accuracy 0.9000  loss 0.3123  (took 410 ms)
step 16  1,024 samples  16.0 %  skipped (not finite)  128 samples/s  batch 64  lr 1.2e-3  42.0 s left
step 21  1,344 samples  21.0 %  loss 0.4321  128 samples/s  batch 64  lr 1.2e-3  39.5 s left
step 24  1,536 samples  24.0 %  loss 0.4321  128 samples/s  batch 64  lr 1.2e-3  38.0 s left
"""
    )


def test_another_run_on_the_same_display_is_timed_anew() -> None:
    stream, clock = io.StringIO(), Clock()
    with Display(stream, interactive=False, interval_s=0.0, clock=clock) as display:
        for run in range(2):
            display.restart()
            for n in (1, 2):
                display.step(step(n, time=100.0 * run + n))
    first, second = stream.getvalue().splitlines()[1], stream.getvalue().splitlines()[3]
    assert first == second
    assert " 64.0 samples/s" in first or " 64 samples/s" in first


def screen(text: str) -> list[str]:
    """The lines a terminal would show: enough of one for a display that only redraws its last line."""
    lines = [""]
    for part in re.split(r"(\r|\n|\x1b\[2K)", re.sub(r"\x1b\[(\?25[lh]|[\d;]*m)", "", text)):
        if part == "\n":
            lines.append("")
        elif part in ("\r", "\x1b[2K"):
            lines[-1] = ""
        else:
            lines[-1] += part
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [110, 60, 20])
def test_a_terminal_shows_one_live_line_below_what_stays(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, clock = io.StringIO(), Clock()
    with Display(stream, interactive=True, interval_s=99.0, clock=clock, width=width) as display:
        display.note("[bold]hello[/bold] :smile: \x1b[2J")
        for n in range(1, 25):
            clock.now = n / 2
            display.step(step(n))
        display.evaluation(EVALUATION)
    shown = screen(stream.getvalue())
    assert shown[:2] == ["[bold]hello[/bold] :smile: ?[2J", evaluation_line(EVALUATION)]
    assert "step 24" in shown[2]
    assert len(shown[2]) <= width
    assert len(shown) == 4
    assert shown[3] == ""
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    with Display(stream, interactive=True, interval_s=5.0, clock=Clock()) as display:
        display.step(step(1))
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_rich_is_loaded_only_for_a_terminal() -> None:
    code = (
        "import io, sys; from orchestrator.telemetry.progress import Display\n"
        "Display(io.StringIO(), interactive=False, interval_s=1, clock=lambda: 0.0).close()\n"
        "sys.exit('rich' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- where the time goes -----------------------------------------------------------------------

PARTS = {"data_wait": 0.05, "forward": 0.1, "backward": 0.2, "communication": 0.1, "other": 0.05, "evaluation": 0.001}


def test_shares_are_of_the_last_half_minute_and_of_this_attempt() -> None:
    slow = [step(n, parts={"data_wait": 0.5}) for n in range(1, 10)]
    later = [step(9 + n, parts={"forward": 0.5}, time=1100 + n / 2) for n in range(1, 240)]
    assert estimated(*slow).shares == {"data_wait": 1.0}
    assert estimated(*slow).goodput_ratio == 0.0
    assert estimated(*slow, *later).goodput_ratio == pytest.approx(1.0, abs=0.01)
    again = [step(3, attempt=2, time=5000.0), step(4, attempt=2, time=5000.5, parts={"backward": 0.5})]
    assert estimated(*slow, *again).shares == {"backward": 1.0}
    assert estimated(step(1), step(2)).goodput_ratio is None


def test_a_timed_step_shows_its_goodput_and_drops_it_before_its_speed() -> None:
    estimator = estimated(step(39, parts=PARTS), step(40, parts=PARTS))
    lines = {
        width: progress_line(step(40), now=9.0, started=0.0, width=width, estimator=estimator) for width in (130, 66)
    }
    assert lines[130] == (
        "step 40  2,560 samples  40.0 %  loss 0.4321  128 samples/s  batch 64  lr 1.2e-3  goodput 80 %  30.0 s left"
    )
    assert lines[66] == "step 40  40.0 %  loss 0.4321  128 samples/s  30.0 s left"


def test_a_terminal_shows_below_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, clock = io.StringIO(), Clock()
    with Display(stream, interactive=True, interval_s=99.0, clock=clock, width=110) as display:
        for n in (1, 2):
            clock.now = n / 2
            display.step(step(n, parts=PARTS))
    below = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", stream.getvalue())
    assert "backward 40 %  forward 20 %  communication 20 %  data wait 10 %  other 10 %" in below
    assert "evaluation" not in below, "too small to be worth a place"


def test_a_run_sets_how_often_its_lines_come() -> None:
    stream, clock = io.StringIO(), Clock()
    with Display(stream, interactive=False, interval_s=1000.0, clock=clock) as display:
        display.pace(5.0)
        for n in range(1, 25):
            clock.now = n / 2
            display.step(step(n))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1",
        "step 11",
        "step 21",
        "step 24",
    ]


def test_summary_tells_where_the_time_went_and_what_failed() -> None:
    result = {
        "name": "digits", "state": "finished", "step": 450, "samples": 28_740, "loss": 0.0182, "metrics": {},
        "samples_per_s": 1234.5, "wall_s": 23.31, "goodput_ratio": 0.812,
        "lost_s": {"startup": 3.0, "worker_lost": 9.0},
        "restarts": {"worker_lost": 2, "memory": 1}, "parts_s": {"forward": 3.0, "backward": 6.0, "data_wait": 1.0},
    }  # fmt: skip
    assert (
        summary(result)
        == """\
digits: finished
  training loss  0.0182
  steps          450 (28,740 samples)
  speed          1,234 samples/s, 23.3 s in all
  time           backward 60 %  forward 30 %  data wait 10 %
  goodput        81 % of the wall time; lost: worker lost 9.0 s, startup 3.0 s
  restarts       2 worker lost, 1 memory
  checkpoint     none"""
    )
