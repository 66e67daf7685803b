"""What Ray Train's controller does about failures, and without which nodes a run would still have room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import DIGITS, records
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from gloo_jobs import toy_config
from orchestrator.config import RunConfig, ScaleConfig
from orchestrator.job import load
from orchestrator.launching.controller import Recovery, say_resized, spare_nodes
from orchestrator.launching.failures import (
    Failure,
    WorkerFailedError,
    hanging,
    lost_mark,
    restart_cause,
    write_failure,
)
from orchestrator.launching.worker import Order
from orchestrator.planning.accelerators import accelerator_named
from orchestrator.planning.cluster import ClusterShape
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.storage.folder import RunFolder, read_json


def plan_on(accelerator: str) -> Plan:
    scale = ScaleConfig(workers=2, accelerators_per_worker=0 if accelerator == "cpu" else 1)
    config = toy_config(layout={"zero_stage": "auto", "precision": "auto"}).model_copy(update={"scale": scale})
    shape = ClusterShape.imagine(scale, accelerator_named(accelerator), workers=2)
    return make_plan(config, shape, train_samples=96, evaluation_samples=0)


def config_of(workers: Any) -> RunConfig:
    return toy_config().model_copy(update={"scale": ScaleConfig(workers=workers)})


@pytest.mark.parametrize(
    ("accelerator", "workers", "nodes", "spare"),
    [
        ("cpu", 2, {"a": {"CPU": 2}, "b": {"CPU": 2}, "head": {}}, {"a", "b", "head"}),
        ("cpu", 3, {"a": {"CPU": 2}, "b": {"CPU": 2}, "head": {}}, {"head"}),
        ("cpu", 2, {"a": {"CPU": 1.5}, "b": {"CPU": 1.5}, "c": {"CPU": 1}}, {"a", "b", "c"}),
        ("cpu", 3, {"a": {"CPU": 1.5}, "b": {"CPU": 1.5}, "c": {"CPU": 1}}, set()),
        ("cpu", (1, 4), {"a": {"CPU": 2}, "b": {"CPU": 2}}, {"a", "b"}),
        ("cpu", 2, {"a": {"CPU": 2}, "b": {"CPU": 2}, "dead": {"CPU": 9}}, {"a", "b"}),
        ("a100-40gb", 2, {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 64}}, {"b"}),
        ("a100-40gb", 2, {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 8, "GPU": 4}}, {"a", "b"}),
    ],
)
def test_a_node_is_spare_if_the_others_have_room(
    accelerator: str, workers: Any, nodes: dict[str, Any], spare: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"NodeID": name, "Alive": name != "dead", "Resources": has} for name, has in nodes.items()]
    monkeypatch.setattr(ray, "nodes", lambda: said)
    assert spare_nodes(plan_on(accelerator), config_of(workers)) == spare


def test_what_is_avoided_already_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 2}} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: said)
    assert spare_nodes(plan_on("cpu"), config_of(2), ["a"]) == {"b", "c"}
    assert spare_nodes(plan_on("cpu"), config_of(4), ["a"]) == set()
    assert spare_nodes(plan_on("cpu"), config_of(4), ["a"], fewest=2) == {"b", "c"}


def test_room_for_the_fewest_that_share_the_batch_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 to 8 workers at a batch of 16 these are 4."""
    said = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": cpus}} for name, cpus in {"a": 3, "b": 3, "c": 1}.items()
    ]
    monkeypatch.setattr(ray, "nodes", lambda: said)
    assert config_of((3, 8)).recipe.batch == 16
    assert spare_nodes(plan_on("cpu"), config_of((3, 8))) == {"a", "b", "c"}
    del said[2]
    assert spare_nodes(plan_on("cpu"), config_of((3, 8))) == set(), "three are too few"


DIED = RayActorError(
    error_msg="The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tip: 10.0.0.7\n"
    "The actor is dead because its worker process has died. Worker exit detail: End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage."
)
SAID = "The actor is dead because its worker process has died. Worker exit detail: End of file."


def in_start(error: RayActorError) -> WorkerGroupStartupFailedError:
    failure = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    failure.__cause__ = error
    return failure


def of_a_task(error: Exception) -> Exception:
    return RayTaskError("RayTrainWorker.execute()", f"Traceback\n{error}", error).as_instanceof_cause()


PEER = of_a_task(RuntimeError("[gloo] Connection closed by peer [10.0.0.7]:4711"))


def recovery(root: Path, monkeypatch: pytest.MonkeyPatch, *addresses: str, **order: Any) -> Recovery:
    """The policy that Ray is given for a run on nodes with these ``addresses``, two CPUs each."""
    nodes = [{"NodeID": f"node-{number}", "NodeManagerAddress": each} for number, each in enumerate(addresses)]
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": True, "Resources": {"CPU": 2}} for node in nodes])
    RunFolder(root).create()
    job = load(DIGITS)
    shape = ClusterShape.imagine(job.config.scale, accelerator_named("cpu"), workers=2)
    given = Order(job=job, root=root, shape=shape, driver="1", profile=None, **order)
    return Recovery(create_failure_policy(FailureConfig(max_failures=-1)), given, plan_on("cpu"), job.config)


@pytest.mark.parametrize("failure", [DIED, in_start(DIED), PEER], ids=["late", "early", "told-by-a-peer"])
def test_workers_lost_at_their_start_are_replaced_so_often_and_no_oftener(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = recovery(tmp_path, monkeypatch)
    for _ in range(3):
        assert policy.make_decision(ControllerError(failure)) is FailureDecision.RETRY
    assert lost_mark(RunFolder(tmp_path)).exists()
    assert policy.make_decision(ControllerError(failure)) is FailureDecision.RAISE
    log = records(tmp_path, "failures.jsonl")
    assert [(record["cause"], record["action"]) for record in log] == [("start", "restart")] * 3 + [("start", "stop")]
    said = str(failure).splitlines()[-1] if failure is PEER else SAID
    assert [record["message"] for record in log] == [said] * 4
    assert log[-1]["reason"] == (
        "workers were lost while they started 4 times without progress: more than failures.max_restarts=3"
    )


def test_a_node_where_workers_die_at_their_start_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = recovery(tmp_path, monkeypatch, "10.0.0.6", "10.0.0.7")
    assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RETRY
    assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RAISE
    assert read_json(RunFolder(tmp_path).change) == {
        "reason": "2 failures in a row began on node node-1",
        "micro_batch": None,
        "avoid": ["node-1"],
    }


def test_two_nodes_with_one_address_are_not_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = recovery(tmp_path, monkeypatch, "10.0.0.7", "10.0.0.7")
    for _ in range(2):
        assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RETRY


def test_the_fleet_is_asked_again_after_workers_were_lost_at_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = recovery(tmp_path, monkeypatch, nodes=("node-0", "node-0"))
    assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RAISE
    change = read_json(RunFolder(tmp_path).change)
    assert change is not None
    assert change["reason"] == "workers were lost while they started: restart 1 of 3 without progress"


def test_what_else_stops_rays_controller_is_left_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = recovery(tmp_path, monkeypatch)
    for _ in range(5):
        assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) is FailureDecision.RETRY
    trace = "File torch/distributed/rendezvous.py, in store\n"
    for bug in (ImportError("no module named torch"), ValueError(f"{trace}unknown backend")):
        assert policy.make_decision(ControllerError(of_a_task(bug))) is FailureDecision.RAISE
    assert records(tmp_path, "failures.jsonl") == []


def lost(*ranks: int, preempted: bool = False) -> WorkerGroupError:
    return WorkerGroupError("", {rank: RayActorError(error_msg=DIED.error_msg, preempted=preempted) for rank in ranks})


def said(failure: Failure) -> WorkerGroupError:
    return WorkerGroupError("", {failure.rank: WorkerFailedError(failure)})


BUG = Failure(rank=1, step=3, kind="user", error="ZeroDivisionError", message="division by zero", frame="", trace="...")


def test_preemptions_are_as_many_as_the_policy_allows_without_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own count is over the run's life. A deadline that passes while all workers live is one, too."""
    policy = recovery(tmp_path, monkeypatch)
    passed = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node-0": [0]}))
    for step in range(1, 151):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
        error = passed if step % 2 else lost(0, preempted=True)
        assert policy.make_decision(error) is FailureDecision.RETRY
    log = records(tmp_path, "failures.jsonl")
    assert len(log) == 150, "each is one record"
    assert {(record["cause"], record["action"]) for record in log} == {("preempted", "restart")}


def test_what_an_earlier_attempt_said_is_not_taken_for_a_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies there until an attempt begins."""
    RunFolder(tmp_path).create()
    write_failure(RunFolder(tmp_path), BUG)
    policy = recovery(tmp_path, monkeypatch)
    assert policy.make_decision(lost(0)) is FailureDecision.RETRY
    hang = hanging("no step for 9 s", "stacks", rank=0, step=5)
    write_failure(RunFolder(tmp_path), hang)  # it could not go on to say it
    assert policy.make_decision(lost(0, 1)) is FailureDecision.RETRY
    assert policy.make_decision(lost(1)) is FailureDecision.RETRY
    assert [record["cause"] for record in records(tmp_path, "failures.jsonl")] == ["worker_lost", "hang", "worker_lost"]
    assert policy.make_decision(said(BUG)) is FailureDecision.RAISE, "what is said again counts again"
    last = records(tmp_path, "failures.jsonl")[-1]
    assert (last["cause"], last["rank"], last["message"]) == ("user", 1, "division by zero")


def test_out_of_memory_halves_the_micro_batch_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step on record may have had another."""
    policy = recovery(tmp_path, monkeypatch)
    RunFolder(tmp_path).metrics.write_text('{"step": 9, "micro_batch": 64}\n')
    memory = replace(BUG, kind="memory", micro_batch=128)
    assert policy.make_decision(said(memory)) is FailureDecision.RAISE
    change = read_json(RunFolder(tmp_path).change)
    assert change is not None
    assert change["micro_batch"] == 64


def test_the_next_attempt_hears_what_ended_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = recovery(tmp_path, monkeypatch)
    folder, attempts = RunFolder(tmp_path), [{"event": "started"}]
    assert restart_cause(folder, attempts) == "worker_lost"
    policy.make_decision(lost(0, preempted=True))
    assert restart_cause(folder, attempts) == "preempted"
    policy.make_decision(ControllerError(DIED))
    assert restart_cause(folder, attempts) == "preempted", "others that never began change nothing about it"
    job = load(DIGITS)
    shape = ClusterShape.imagine(job.config.scale, accelerator_named("cpu"), workers=2)
    say_resized(Order(job=job, root=tmp_path, shape=shape, driver="1", profile=None))
    assert restart_cause(folder, attempts) == "resized"
    assert restart_cause(folder, [*attempts, {"event": "ended"}]) == "stopped"
