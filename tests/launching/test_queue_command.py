"""What the queue's commands and a run with a queue refuse, before anything is started."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("queue", "--address", "http://127.0.0.1:1"), "no Ray job server answers at http://127.0.0.1:1"),
        (("queue", "move", "a"), "say where to, with --queue QUEUE or --priority N"),
        (("queue", "move", "a", "--queue", "Team A"), "queue='Team A': use 1 to 47 lower-case letters"),
        (("queue", "quota", "team-a", "many"), "give a whole number of devices, or none"),
        (("queue", "quota", "../a", "1"), "use 1 to 47 lower-case letters"),
        (("queue", "pause", "a", "--address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert said in refuse(*words)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--queue", "team-a"), "fleet.queue='team-a' needs a cluster that runs share: give --address"),
        (("--queue", "Team A"), "fleet.queue='Team A': use 1 to 47 lower-case letters"),
        (("--set", "fleet.policy=lottery"), "fleet.policy='lottery': should be 'goodput', 'fair' or 'fifo'"),
        (("--set", "fleet.priority=11"), "fleet.priority=11: should be at most 10"),
    ],
)
def test_a_run_with_a_queue_is_refused(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], said: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert said in refuse("run", "jobs.vision:mlp", *more)
