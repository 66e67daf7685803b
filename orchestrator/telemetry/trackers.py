"""Experiment trackers that a run's records are also sent to, if asked: TensorBoard, MLflow, Weights & Biases.

They are fed by the driver from what is on disk already, in a thread of their own: a tracker that is slow or fails costs
a run nothing, and what it missed is still in ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import ConfigError

__all__ = ["MLFLOW_RUN", "Tracker", "Tracking", "make_trackers", "require_trackers"]

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
SCALARS = (
    "loss", "learning_rate", "grad_norm", "global_batch", "samples_per_s", "step_time_s", "progress", "epoch",
    "noise_scale",
)  # fmt: skip
FAREWELL_S = 30.0
MLFLOW_RUN = "mlflow-run"
"""Holds the run's id at MLflow, in the run's folder."""


class Tracker(Protocol):
    """Takes scalars of one run. Two verbs: everything else that trackers offer is in the run's folder already."""

    def log(self, scalars: Mapping[str, float], *, step: int, time: float) -> None: ...
    def close(self, state: str) -> None: ...


class Tracking:
    """Hands records to ``trackers`` without waiting for them; one that fails is left out from then on."""

    def __init__(self, make: Callable[[], Sequence[Tracker]]) -> None:
        """``make`` is called in the thread too: making a tracker may ask its server."""
        self._make = make
        self._queue: queue.SimpleQueue[tuple[Mapping[str, float], int, float] | str] = queue.SimpleQueue()
        self._trouble: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)
        self._thread.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """One record of ``metrics.jsonl``."""
        scalars = {f"train/{name}": record[name] for name in SCALARS if _is_number(record.get(name))}
        self._queue.put((scalars, record["step"], record["time"]))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One record of ``evaluations.jsonl``."""
        scalars = {f"evaluation/{name}": value for name, value in record["metrics"].items() if _is_number(value)}
        self._queue.put((scalars, record["step"], record["time"]))

    def trouble(self) -> list[str]:
        """What has gone wrong since this was last asked, a line each."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._trouble.get_nowait())
        return found

    def close(self, state: str) -> None:
        """Hand over what is left, and how the run ended; give up after a while."""
        self._queue.put(state)
        self._thread.join(FAREWELL_S)
        if self._thread.is_alive():
            self._trouble.put(f"a tracker did not take everything within {FAREWELL_S:.0f} s; metrics.jsonl has it")

    def _run(self) -> None:
        trackers: list[Tracker] = []
        if (made := self._guarded(self._make)) is not None:
            trackers = list(made)
        while not isinstance(found := self._queue.get(), str):
            scalars, step, time = found
            trackers = [t for t in trackers if self._guarded(_log, t, scalars, step, time)]
        for tracker in trackers:
            self._guarded(tracker.close, found)

    def _guarded(self, call: Callable[..., Any], *values: Any) -> Any:
        """What ``call`` returns, or None where it fails: whose code that is, nobody knows."""
        try:
            return call(*values)
        except Exception as error:  # noqa: BLE001 - the edge to code of others, in a thread of its own
            first_line = next(iter(str(error).splitlines()), "")
            self._trouble.put(f"a tracker failed and is left out from here on: {type(error).__name__}: {first_line}")
            return None


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: names the package.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            wanted = PACKAGES[name] if name == "tensorboard" else f"'orchestrator[{name}]'"
            raise ConfigError(f"telemetry.trackers: {name} is not installed; pip install {wanted}")


def make_trackers(names: Sequence[str], *, run: str, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run; their servers and keys come from their own environment variables."""
    makers: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _Wandb,
    }
    return [makers[name](run, folder, config) for name in names]


class _TensorBoard:
    """Event files in the run's folder: ``tensorboard --logdir runs``."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:  # noqa: ARG002 - as the others
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def close(self, state: str) -> None:  # noqa: ARG002 - event files know no state
        self._writer.close()


class _MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI`` and in ``MLFLOW_EXPERIMENT_NAME``; continued when ours is."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        known = folder / MLFLOW_RUN
        self._id = known.read_text().strip() if known.exists() else None
        self._run = mlflow.start_run(run_id=self._id, run_name=run)
        if self._id is None:
            known.write_text(self._run.info.run_id)
            mlflow.log_dict(dict(config), "config.json")

    def log(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step, timestamp=int(1e3 * time), run_id=self._run.info.run_id)

    def close(self, state: str) -> None:
        self._mlflow.end_run("FINISHED" if state == "finished" else "KILLED" if state == "stopped" else "FAILED")


class _Wandb:
    """A run of Weights & Biases, in ``WANDB_PROJECT``; continued when ours is."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(id=run, name=run, resume="allow", config=dict(config), dir=str(folder))

    def log(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        self._run.log({**scalars, "time": time}, step=step)

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


def _log(tracker: Tracker, scalars: Mapping[str, float], step: int, time: float) -> bool:
    tracker.log(scalars, step=step, time=time)
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
