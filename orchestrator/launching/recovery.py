"""What to do when an attempt has ended before its time: a policy that answers, and never acts.

Causes have budgets of their own, and a budget is whole again once the run has come further: what is counted is how
often in a row it was stopped without a newer checkpoint in between.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.config import FailureConfig

__all__ = ["Answer", "Trouble", "answer"]

Cause = Literal["user", "request", "run", "memory", "worker_lost", "start", "preempted", "storage", "hang", "slow"]

SUSPECT_AFTER = 2
"""So many failures in a row that began on one node are the node's."""
HOPELESS: dict[Cause, str] = {
    "user": "the job's own code raised: it would again",
    "request": "the request is wrong: it would be again",
    "run": "the run cannot go on from here",
}


@dataclass(frozen=True)
class Trouble:
    """How one attempt ended: why, the newest checkpoint's step, and the node where it began, as far as is known."""

    cause: Cause
    step: int
    node: str | None = None


@dataclass(frozen=True)
class Answer:
    """What is to be done.

    "stop" ends the run. "restart" lets the workers be replaced as they were. "change" starts them anew with another
    ``micro_batch`` or without the nodes to ``avoid``.
    """

    action: Literal["stop", "restart", "change"]
    reason: str
    micro_batch: int | None = None
    avoid: tuple[str, ...] = ()


def answer(
    troubles: Sequence[Trouble], config: FailureConfig, *, micro_batch: int, avoidable: Collection[str] = ()
) -> Answer:
    """What to do about the last of ``troubles``, which are all since the driver began, oldest first.

    ``micro_batch`` is the one in use; ``avoidable`` are the nodes without any one of which the workers have room.
    """
    last = troubles[-1]
    if last.cause in HOPELESS:
        return Answer("stop", HOPELESS[last.cause])
    if last.cause == "memory":
        return _about_memory(micro_batch)
    if last.cause == "slow" and last.node is not None and last.node in avoidable:
        return Answer("change", f"node {last.node} is far behind the others", avoid=(last.node,))
    row = [trouble for trouble in _without_progress(troubles) if _account(trouble) == _account(last)]
    budget, field = _budget(last, config)
    spent = sum(1 for trouble in row if _budget(trouble, config)[1] == field)
    if spent > budget:
        return Answer("stop", f"{_told(last)} {spent} times without progress: more than {field}={budget}")
    if (suspect := _suspect(row)) is not None and suspect in avoidable:
        return Answer("change", f"{SUSPECT_AFTER} failures in a row began on node {suspect}", avoid=(suspect,))
    return Answer("restart", f"{_told(last)}: restart {spent} of {budget} without progress")


def _about_memory(micro_batch: int) -> Answer:
    """Half the micro batch and twice the accumulation: the same global batch in less memory."""
    if micro_batch == 1:
        return Answer("stop", "out of memory with a micro batch of 1")
    smaller = max(divisor for divisor in range(1, micro_batch) if micro_batch % divisor == 0)
    return Answer("change", f"out of memory with a micro batch of {micro_batch}", micro_batch=smaller)


def _without_progress(troubles: Sequence[Trouble]) -> Sequence[Trouble]:
    """The last of them, and those before it since the newest checkpoint was made."""
    reached, start = 0, 0
    for index, trouble in enumerate(troubles):
        if trouble.step > reached:
            start, reached = index, trouble.step
    return troubles[start:]


def _account(trouble: Trouble) -> str:
    """What is counted together: before its first step a run has cost nothing of what it may lose later."""
    return trouble.cause if trouble.cause in ("slow", "start") else "run"


def _budget(trouble: Trouble, config: FailureConfig) -> tuple[int, str]:
    if trouble.cause == "preempted":
        return config.max_preemptions, "failures.max_preemptions"
    return config.max_restarts, "failures.max_restarts"


def _suspect(row: Sequence[Trouble]) -> str | None:
    """The node on which all of the last failures began; a preemption says nothing about a node."""
    last = [trouble.node for trouble in row if trouble.cause in ("worker_lost", "start", "hang")][-SUSPECT_AFTER:]
    return last[0] if len(last) == SUSPECT_AFTER and len(set(last)) == 1 else None


def _told(trouble: Trouble) -> str:
    return {
        "worker_lost": "workers were lost",
        "start": "workers were lost while they started",
        "preempted": "nodes were taken away",
        "storage": "the store failed",
        "hang": "no step was taken",
        "slow": "a node was far behind the others",
    }.get(trouble.cause, trouble.cause)
