"""The range test suggests a rate that works, on a problem whose largest stable rate is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import SGD, Recipe, RunConfig, Stop
from orchestrator.errors import ConfigError
from orchestrator.job import Datasets
from orchestrator.training.rate_range import range_test, suggest


@dataclass(frozen=True)
class Bowl:
    """Minimise ``curvature / 2 |w|^2`` from w = 1: gradient descent is stable below a rate of 2 / curvature."""

    curvature: float

    def __len__(self) -> int:
        return 64

    def take(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"x": np.ones((len(positions), 4), dtype=np.float32)}

    def datasets(self) -> Datasets:
        return Datasets(self)

    def model(self) -> nn.Module:
        model = nn.Linear(4, 1, bias=False)
        nn.init.ones_(model.weight)
        return model

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.curvature / 2 * sum(p.square().sum() for p in model.parameters())

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": torch.zeros(len(batch["x"]))}


CONFIG = RunConfig(
    name="bowl",
    recipe=Recipe(batch=8, optimizer=SGD(learning_rate=1.0, momentum=0.0), stop=Stop(steps=1)),
)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 30.0, 1000.0])
def test_the_suggested_rate_is_stable_and_no_more_than_two_decades_too_small(curvature: float) -> None:
    found = range_test(Bowl(curvature), CONFIG, low=1e-6, high=100.0, steps=160)
    assert 0.02 / curvature < found.suggested < 2 / curvature
    assert len(found.rates) == len(found.losses)


def test_the_steepest_fall_before_the_lowest() -> None:
    assert suggest([1, 10, 100, 1000], [5.0, 4.0, 1.0, 9.0]) == 10
    assert suggest([1, 10, 100, 1000], [5.0, 2.0, 1.0, 0.5]) == 1
    assert suggest([1, 10], [1.0, 2.0]) == 1


def test_impossible_bounds_and_a_loss_that_explodes_at_once() -> None:
    with pytest.raises(ConfigError, match="give rising rates and 20 steps or more"):
        range_test(Bowl(1.0), CONFIG, low=1.0, high=0.1, steps=100)
    with pytest.raises(ConfigError, match="begin lower than 10"):
        range_test(Bowl(1e6), CONFIG, low=10.0, high=100.0, steps=100)
