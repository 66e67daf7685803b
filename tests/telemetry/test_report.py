"""The report holds together whatever the run's folder holds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RunFolderError
from orchestrator.telemetry.report import RunData, load_run, render

Maker = Callable[..., RunData]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"
VOID = {"meta", "path", "br", "img", "link"}


class Page(HTMLParser):
    """A strict reader: tags must nest; keeps tags, attributes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.points = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.points = self.points or data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def titles(page: Page) -> list[str]:
    return [v or "" for k, v in page.attributes if k == "aria-label"]


def test_a_finished_run(run_folder: Path) -> None:
    page = Page(render(load_run(run_folder)))
    curves = ["Loss", "Accuracy", "Speed", "Global batch", "Learning rate", "Gradient norm"]
    assert titles(page) == ["Progress", "Curves", *curves]
    assert page.tags.count("title") == page.tags.count("desc") + 1 == 7
    for text in (
        "digits finished", "started 2025-10-09 08:53:20 UTC", "runs/digits", "1 restart", "Accuracy, held-out 0.9848",
        "2 workers × 32 micro batch × 2 accumulated", "held-out", "(log scale)", "attempt 2", "memory 298 MiB",
        "step time 31 ms", "stop epochs 60",
        "worker 1 died (SIGKILL)", "Evaluations (12)", "learning_rate 2e-3", "workers 2, 8",
    ):  # fmt: skip
        assert text in page.text
    assert page.attributes.count(("class", "skipped")) == 1
    assert page.attributes.count(("class", "attempt")) == len(curves)


def test_the_file_asks_for_nothing_outside(run_folder: Path) -> None:
    html = render(load_run(run_folder))
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|import\(", html)
    assert not {"src", "href", "action", "data"} & {name for name, _ in page.attributes}
    assert "default-src 'none'" in html


def test_hostile_names_stay_text(fake_run: Maker) -> None:
    run = fake_run(60, name=HOSTILE, restart_at=30)
    evil: dict[str, Any] = {HOSTILE: HOSTILE, "list": [HOSTILE], "deep": {HOSTILE: {HOSTILE: [{"a": HOSTILE}]}}}
    run = dataclasses.replace(
        run,
        config={**run.config, **evil},
        plan={**run.plan, **evil},
        evaluations=[{**e, "metrics": {HOSTILE: 0.5}} for e in run.evaluations],
        attempts=[{**a, "reason": HOSTILE, "workers": HOSTILE, "attempt": HOSTILE} for a in run.attempts],
        failures=[failure(cause=HOSTILE, node=HOSTILE, message=HOSTILE, action=HOSTILE, reason=HOSTILE)],
        summary={**run.summary, "state": HOSTILE, "folder": HOSTILE, "metrics": {HOSTILE: 0.5}},
    )
    page = Page(render(run))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count(HOSTILE) > 10
    names = [curve["name"] for chart in json.loads(page.points)["charts"] for curve in chart["curves"]]
    assert HOSTILE in names


def test_an_empty_run() -> None:
    page = Page(render(RunData()))
    assert "unnamed run not started not started yet" in page.text
    assert "No steps yet" in page.text
    assert json.loads(page.points) == {"domain": [0, 1], "charts": []}


def test_a_run_that_goes_has_no_summary_yet(fake_run: Maker) -> None:
    run = fake_run(120, restart_at=50)
    going = dataclasses.replace(run, summary={}, attempts=run.attempts[:-1])
    text = Page(render(going)).text
    assert "digits running" in text
    assert "running, or lost" in text
    assert "Accuracy, held-out" in text
    assert "Training loss" in text


def test_an_attempt_that_was_killed_says_so(fake_run: Maker) -> None:
    run = fake_run(120, restart_at=50)
    text = Page(render(dataclasses.replace(run, attempts=[run.attempts[0], *run.attempts[2:]]))).text
    assert "lost: its workers ended without a word" in text
    again = {**run.attempts[2], "cause": "memory"}
    text = Page(render(dataclasses.replace(run, attempts=[run.attempts[0], again, *run.attempts[3:]]))).text
    assert "lost: memory" in text


def failure(**fields: Any) -> dict[str, Any]:
    """A line of failures.jsonl."""
    known = {"time": 1_760_000_060.0, "driver": "d", "cause": "worker_lost", "step": 1200, "node": "10.0.0.7"}
    told = {"message": "killed by SIGKILL", "action": "restart", "reason": "workers were lost: restart 1 of 3"}
    return {**known, **told, **fields}


def test_failures_are_told_with_what_was_done_about_them(run_folder: Path) -> None:
    assert "Failures" not in Page(render(load_run(run_folder))).text
    long = f"CUDA out of memory\nby {300 * 'x'} END <b>"
    memory = failure(
        cause="memory", rank=1, step=0, node=None, message=long, action="change", reason="out of memory with 8"
    )
    (run_folder / "failures.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (failure(), memory)))
    text = Page(render(load_run(run_folder))).text
    assert "Failures When Cause Node Message Newest checkpoint What was done" in text
    assert (
        "2025-10-09 08:54:20 UTC worker lost 10.0.0.7 killed by SIGKILL step 1,200 "
        "restart: workers were lost: restart 1 of 3"
    ) in text
    assert "memory rank 1: CUDA out of memory by xxx" in text
    assert "xxx… none yet change: out of memory with 8" in text


def test_of_many_failures_the_last_are_shown(fake_run: Maker) -> None:
    many = [failure(step=step) for step in range(1, 151)]
    text = Page(render(dataclasses.replace(fake_run(20, restart_at=None), failures=many))).text
    assert "Failures (last 100 of 150)" in text
    assert "step 51 restart" in text
    assert "step 50 restart" not in text


def test_a_run_between_attempts_is_stopped(fake_run: Maker) -> None:
    run = fake_run(20, restart_at=None)
    assert "digits stopped" in Page(render(dataclasses.replace(run, summary={}))).text


def test_one_record_is_a_dot(fake_run: Maker) -> None:
    html = render(fake_run(1, restart_at=None))
    Page(html)
    assert html.count('class="spots') == 7  # training and held-out loss, and five charts of one curve


def test_null_losses_leave_a_gap(fake_run: Maker) -> None:
    run = fake_run(30, restart_at=None)
    blank = [{**r, "loss": None, "grad_norm": None, "skipped": True} for r in run.metrics]
    no_loss = dataclasses.replace(run, metrics=blank, evaluations=[], summary={"name": "x", "loss": None})
    page = Page(render(no_loss))
    assert "no values" in page.text
    assert "Training loss n/a" in page.text
    assert "Gradient norm" not in titles(page)
    assert page.attributes.count(("class", "skipped")) == 30


def test_a_failed_run_is_marked(fake_run: Maker) -> None:
    run = fake_run(20, restart_at=None)
    html = render(dataclasses.replace(run, summary={**run.summary, "state": "failed"}))
    assert '<span class="state bad">failed</span>' in html


def test_a_metric_that_comes_and_goes_has_its_own_points(fake_run: Maker) -> None:
    run = fake_run(120, restart_at=None)
    evaluations = [{**e, "metrics": {"f1": 0.5} if i % 2 else {}} for i, e in enumerate(run.evaluations)]
    page = Page(render(dataclasses.replace(run, evaluations=evaluations)))
    charts = json.loads(page.points)["charts"]
    assert [len(c["curves"][0]["x"]) for c in charts if c["curves"][0]["name"] == "f1"] == [6]


def test_the_page_of_a_long_run_is_no_longer_than_that_of_a_shorter_one(fake_run: Maker) -> None:
    html = render(fake_run(100_000))
    assert len(html) < 1.1 * len(render(fake_run(10_000)))
    page = Page(html)
    curves = [curve for chart in json.loads(page.points)["charts"] for curve in chart["curves"]]
    assert max(len(c["x"]) for c in curves) <= 800
    assert all(c["step"][-1] == 100_000 for c in curves)


def test_load_run_of_an_empty_folder(tmp_path: Path) -> None:
    assert load_run(tmp_path) == RunData({}, {}, [], [], [], {}, [], [])


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_corrupt_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"plan\.json.*restore it from a copy"):
        load_run(tmp_path)
