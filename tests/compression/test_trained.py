"""What a run has learnt is read from its checkpoint the same in every stage and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gloo_jobs import Toy, blocks, new_run, run_loop, toy_config
from jobs.vision import digits
from orchestrator.compression.measuring import evaluate_model
from orchestrator.compression.trained import load_trained, read_weights
from orchestrator.config import Stop
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.storage.folder import read_json, write_json
from orchestrator.training.checkpoint import list_checkpoints
from orchestrator.training.data import open_dataset
from trained_runs import GROUPS, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_precision_gives_the_weights_that_were_trained(
    tmp_path: Path, stage: int, precision: str
) -> None:
    layout = {"zero_stage": stage, "precision": precision}
    config = toy_config(2, recipe={"stop": Stop(steps=4)}, layout=layout)
    ends = GROUPS[2].run(run_loop, config, Toy(blocks), *new_run(tmp_path / "run"))
    found = read_weights(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    model = blocks()
    model.load_state_dict(found)
    for name, weight in ends[0].weights.items():
        assert found[name].dtype == torch.float32
        # In 16 bit the loop's own are rounded; what is read are the fp32 masters, where the stage keeps them.
        tolerance = 0.0 if precision == "fp32" else 2**-8
        assert torch.allclose(found[name], weight, rtol=tolerance, atol=0.0), name
    if precision == "bf16" and stage:
        assert any(not torch.equal(w, w.bfloat16().float()) for n, w in found.items() if n in ends[0].weights)
    mean = (ends[0].buffers["1.0.norm.running_mean"] + ends[1].buffers["1.0.norm.running_mean"]) / 2
    assert torch.allclose(found["1.0.norm.running_mean"], mean)


def test_a_trained_run_is_as_good_as_it_said(digits_run: Path) -> None:
    trained = load_trained(str(digits_run))
    held_out = open_dataset(trained.task.datasets().evaluation)  # type: ignore[arg-type]
    said = read_json(list_checkpoints(digits_run / "checkpoints")[-1] / "manifest.json")["state"]["evaluation"]  # type: ignore[index]
    assert evaluate_model(trained.task, trained.model, held_out, batch=100) == pytest.approx(said, rel=1e-5)
    assert not trained.model.training


def test_a_job_that_has_changed_is_refused(digits_run: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in digits_run.iterdir():
        (copy / entry.name).symlink_to(entry)
    (copy / "job.json").unlink()
    write_json(copy / "job.json", {"job": "jobs.vision:digits", "args": [f"data={data}", "width=8"]})
    with pytest.raises(CheckpointError, match="does not fit the job's model: "):
        load_trained(str(copy))


def test_a_run_without_a_checkpoint_is_refused(digits_run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "job.json"):
        (tmp_path / name).write_bytes((digits_run / name).read_bytes())
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_trained(str(tmp_path))
    with pytest.raises(ConfigError, match="no run at"):
        load_trained(str(tmp_path / "nowhere"))


def test_a_file_with_other_bytes_is_refused(data: Path, tmp_path: Path) -> None:
    args = {"data": str(data), "epochs": 0.1, "width": 8}
    root = train(tmp_path / "run", digits(**args), "jobs.vision:digits", [f"{k}={v}" for k, v in args.items()])
    (file,) = root.glob("checkpoints/*/state/mp_rank_00_model_states.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="has other bytes than were written"):
        load_trained(str(root))
