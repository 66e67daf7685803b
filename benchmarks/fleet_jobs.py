"""Jobs that a shared cluster can be measured with on a machine of few CPUs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from jobs import vision
from orchestrator.job import Job

__all__ = ["WaitingTask", "waiting"]


def waiting(epochs: float = 60.0, workers: int = 1, wait_s: float = 1e-3) -> Job:
    """Return ``jobs.vision:mlp`` whose worker also waits ``wait_s`` for each sample, as it would for an accelerator.

    So workers share work without sharing CPUs: on few of them, steps get shorter with workers as they do on devices.
    """
    parent = vision.mlp(workers=workers, epochs=epochs)
    task = WaitingTask(**vars(parent.task), wait_s=wait_s)
    return dataclasses.replace(parent, config=parent.config.model_copy(update={"name": "waiting"}), task=task)


@dataclasses.dataclass(frozen=True)
class WaitingTask(vision.MlpTask):
    """See ``waiting``."""

    wait_s: float = 1e-3

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """The same loss, later."""
        if model.training:
            time.sleep(self.wait_s * len(batch["label"]))
        return super().loss(model, batch)
