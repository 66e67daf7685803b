"""A replay: the recorded policy comes out near the recording, another one where its own run would have been."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config import SGD, Fixed, Goodput, Policy, Ramp, Recipe, RunConfig, Stop
from orchestrator.errors import ConfigError
from orchestrator.scheduling.adaptive import GoodputPolicy
from orchestrator.scheduling.fixed import FixedPolicy
from orchestrator.scheduling.reach import Reach
from orchestrator.scheduling.replay import Replayed, replay
from simulated import Simulation

LENGTH = 16.0 * 3000


def recorded(run: Simulation, length: float = LENGTH) -> list[dict[str, Any]]:
    """``metrics.jsonl`` of a simulated run."""
    records: list[dict[str, Any]] = []
    run.length = length
    while run.progress < length:
        before, layout = run.time_s, run.layout
        measured = run.history.measures(run.step + 1, run.settings)
        run.run(1)
        known = run.history.noise_scale
        records.append(
            {
                "step": run.step,
                "progress": run.progress,
                "workers": layout.workers,
                "micro_batch": layout.micro_batch,
                "accumulation": layout.accumulation,
                "global_batch": layout.global_batch,
                "step_time_s": run.time_s - before,
                **({"noise_cost_s": 5e-4} if measured else {}),
                **({"noise_scale": known.value, "noise_scale_low": known.low} if known else {}),
                **({"noise_scale_high": known.high} if known else {}),
            }
        )
    return records


def asked(records: list[dict[str, Any]], policy: Policy) -> Replayed:
    recipe = Recipe(batch=16, optimizer=SGD(learning_rate=0.1), stop=Stop(samples=int(LENGTH)))
    config = RunConfig(name="a", recipe=recipe, policy=policy)
    return replay(records, config, train_samples=100_000, length=LENGTH)


@pytest.fixture(scope="module")
def grown() -> list[dict[str, Any]]:
    return recorded(Simulation(GoodputPolicy(Goodput(), Reach())))


def test_the_policy_that_ran_comes_out_near_its_recording(grown: list[dict[str, Any]]) -> None:
    again = asked(grown, Goodput())
    assert again.time_s == pytest.approx(sum(r["step_time_s"] for r in grown), rel=0.25)
    assert again.progress >= LENGTH
    assert again.decisions


def test_the_reference_batch_comes_out_where_its_own_run_does(grown: list[dict[str, Any]]) -> None:
    fixed = Simulation(FixedPolicy())
    alone = sum(r["step_time_s"] for r in recorded(fixed))
    replayed = asked(grown, Fixed())
    assert replayed.steps == pytest.approx(3000, rel=0.01)
    assert replayed.time_s == pytest.approx(alone, rel=0.1)
    assert replayed.decisions == ()


def test_a_ramp_can_be_asked_too(grown: list[dict[str, Any]]) -> None:
    replayed = asked(grown, Ramp(at=(0.0, 0.5), batches=(16, 64)))
    assert [(decision.kind, decision.batch) for decision in replayed.decisions] == [("ramp", 64)]
    assert asked(grown, Goodput()).time_s < replayed.time_s < asked(grown, Fixed()).time_s


def test_a_few_steps_are_too_few() -> None:
    with pytest.raises(ConfigError, match="too few steps"):
        asked(recorded(Simulation(FixedPolicy()))[:2], Goodput())
