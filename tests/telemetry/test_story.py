"""The story of a run's decisions, as lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from orchestrator.scheduling.replay import Decided, Replayed
from orchestrator.telemetry.progress import decision_line
from orchestrator.telemetry.report import RunData, render
from orchestrator.telemetry.story import decisions_told, replay_lines, story_lines


def layout(micro_batch: int, accumulation: int = 1) -> dict[str, int]:
    return {"workers": 2, "micro_batch": micro_batch, "accumulation": accumulation}


def alternative(micro_batch: int, goodput: float) -> dict[str, Any]:
    return {"layout": layout(micro_batch), "step_time_s": 0.025, "efficiency": 0.8, "goodput": goodput}


GROWN: dict[str, Any] = {
    "event": "decided", "step": 405, "progress": 40_000.0, "kind": "grow", "before": layout(32), "layout": layout(64),
    "reason": "goodput 700 -> 900", "now": alternative(32, 700.0), "then": alternative(64, 900.0),
    "alternatives": [alternative(64, 900.0), alternative(32, 700.0)],
    "seen": {"noise_scale": {"value": 300.0, "low": 200.0, "high": None}, "ambition": 0.5, "timings": []},
}  # fmt: skip
MEASURED: dict[str, Any] = {
    "event": "measured",
    "step": 420,
    "progress": 42_000.0,
    "layout": layout(64),
    "goodput": 880.0,
}
STAYED = {**GROWN, "step": 500, "kind": "settle", "before": layout(64), "then": None, "alternatives": [], "seen": {}}


def told(fake_run: Callable[..., RunData], *decisions: dict[str, Any]) -> RunData:
    return dataclasses.replace(fake_run(), decisions=decisions)


def test_a_whole_story(fake_run: Callable[..., RunData]) -> None:
    lines = story_lines(told(fake_run, GROWN, MEASURED, STAYED))
    assert lines[:10] == [
        "digits: policy fixed, learning-rate rule none, reference batch 64",
        "step 405: grow, batch 64 (2x32x1) -> 128 (2x64x1)",
        "  because   goodput 700 -> 900",
        "  seen      noise scale at least 200, ambition 0.5",
        "  promised  900 reference samples/s, measured 880",
        "  weighed   128 (2x64x1): 25 ms, a sample worth 80%, 900 reference samples/s",
        "            64 (2x32x1): 25 ms, a sample worth 80%, 700 reference samples/s",
        "step 500: settle, batch stays at 128 (2x64x1)",
        "  because   goodput 700 -> 900",
        lines[9],
    ]
    assert lines[9].startswith("in all: 2 decisions in 900 steps, batch 64 to 128 (largest 128), ")
    assert lines[10].startswith("at the reference batch, at its own steps' median time, ")


def test_a_run_without_steps_or_decisions(fake_run: Callable[..., RunData]) -> None:
    assert story_lines(RunData()) == ["no steps yet: there is nothing to explain"]
    assert story_lines(fake_run())[1].startswith("in all: 0 decisions in 900 steps")


def test_what_was_measured_belongs_to_the_decision_before_it() -> None:
    assert [one[4:] for one in decisions_told([GROWN, MEASURED, STAYED])] == [("900", "880"), ("", "")]
    assert decisions_told([MEASURED]) == []


def test_a_decision_is_one_line_and_what_the_user_wrote_cannot_break_it() -> None:
    line = decision_line({**GROWN, "reason": "two\nlines"})
    assert line.startswith("step 405: grow: batch 64 (2x32x1) -> 128 (2x64x1): two")
    assert "\n" not in line


def test_the_report_draws_noise_and_goodput_and_lists_the_decisions(fake_run: Callable[..., RunData]) -> None:
    run = told(fake_run, {**GROWN, "reason": "<b>because</b>"}, MEASURED)
    noisy = [{**r, "noise_scale": 300.0, "noise_scale_low": 200.0, "noise_scale_high": None} for r in run.metrics]
    html = render(dataclasses.replace(run, metrics=noisy))
    for wanted in ("Noise scale", "Goodput", "<h2>Decisions</h2>", "&lt;b&gt;because", "880"):
        assert wanted in html
    assert "Noise scale" not in render(fake_run())
    assert "<h2>Decisions</h2>" not in render(fake_run())


def test_a_replay_as_lines() -> None:
    replayed = Replayed(1000, 16_000, 16_000.0, 20.0, (Decided(40, 640.0, "grow", 32, "why"),))
    assert replay_lines(replayed, 30.0) == [
        "step 40: grow, batch 32: why",
        "1,000 steps, 16,000 samples, 20.0 s predicted; recorded: 30.0 s",
    ]
