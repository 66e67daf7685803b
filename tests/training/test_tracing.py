"""A profiler trace of chosen steps, from real steps of two workers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gloo import GlooGroup
from gloo_jobs import Toy, mlp, new_run, run_loop, toy_config
from orchestrator.config import Stop, TelemetryConfig

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("last", [3, 9])
def test_the_chosen_steps_are_traced_and_the_run_is_the_same(two: GlooGroup, tmp_path: Path, last: int) -> None:
    """Also where the run ends before the last of them."""
    config = toy_config(recipe={"stop": Stop(steps=5)})
    plain = two.run(run_loop, config, Toy(mlp), *new_run(tmp_path / "plain"))
    config = config.model_copy(update={"telemetry": TelemetryConfig(profile=(2, last))})
    traced = two.run(run_loop, config, Toy(mlp), *new_run(tmp_path / "traced"))
    assert traced[0].state is not None
    assert plain[0].state is not None
    assert traced[0].state.loss == plain[0].state.loss
    (file,) = (tmp_path / "traced" / "traces").iterdir()
    assert file.name == f"steps-2-{last}-rank-0.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    # Not the linear layers: once a process has had a stage 3 engine, DeepSpeed's own function stands in their place.
    called = [event for event in events if event.get("name") == "aten::gelu"]
    layers = sum(type(layer).__name__ == "GELU" for layer in mlp().modules())
    assert len(called) == layers * (min(last, 5) - 1)
