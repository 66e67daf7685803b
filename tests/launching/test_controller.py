"""What Ray Train's controller does about failures, and without which nodes a run would still have room."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import DIGITS, records
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2.api.exceptions import ControllerError

from gloo_jobs import toy_config
from orchestrator.config import ScaleConfig
from orchestrator.job import load
from orchestrator.launching.controller import Recovery, Starts, spare_nodes
from orchestrator.launching.failures import GivenUpError, lost_mark
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
    assert spare_nodes(plan_on(accelerator), ScaleConfig(workers=workers)) == spare


def test_what_is_avoided_already_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 2}} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: said)
    assert spare_nodes(plan_on("cpu"), ScaleConfig(workers=2), ["a"]) == {"b", "c"}
    assert spare_nodes(plan_on("cpu"), ScaleConfig(workers=4), ["a"]) == set()
    assert spare_nodes(plan_on("cpu"), ScaleConfig(workers=4), ["a"], fewest=2) == {"b", "c"}


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


def starts(root: Path, monkeypatch: pytest.MonkeyPatch, *addresses: str, **order: Any) -> Starts:
    """The policy that Ray is given for a run on nodes with these ``addresses``, two CPUs each."""
    nodes = [{"NodeID": f"node-{number}", "NodeManagerAddress": each} for number, each in enumerate(addresses)]
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": True, "Resources": {"CPU": 2}} for node in nodes])
    RunFolder(root).control.mkdir(parents=True, exist_ok=True)
    job = load(DIGITS)
    shape = ClusterShape.imagine(job.config.scale, accelerator_named("cpu"), workers=2)
    given = Order(job=job, root=root, shape=shape, driver="1", profile=None, **order)
    policy = create_failure_policy(FailureConfig(max_failures=-1))
    return Starts(policy, Recovery(given, plan_on("cpu"), job.config))


@pytest.mark.parametrize("failure", [DIED, in_start(DIED), PEER], ids=["late", "early", "told-by-a-peer"])
def test_workers_lost_at_their_start_are_replaced_so_often_and_no_oftener(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = starts(tmp_path, monkeypatch)
    for _ in range(3):
        assert policy.make_decision(ControllerError(failure)) is FailureDecision.RETRY
    assert lost_mark(RunFolder(tmp_path)).exists()
    error = ControllerError(failure)
    assert policy.make_decision(error) is FailureDecision.RAISE
    log = records(tmp_path, "failures.jsonl")
    assert [(record["cause"], record["action"]) for record in log] == [("start", "restart")] * 3 + [("start", "stop")]
    said = str(failure).splitlines()[-1] if failure is PEER else SAID
    assert [record["message"] for record in log] == [said] * 4
    told = pickle.loads(pickle.dumps(error)).controller_failure  # it reaches the driver through Ray
    assert isinstance(told, GivenUpError)
    assert str(told) == (
        "workers were lost while they started 4 times without progress: more than failures.max_restarts=3; "
        f"the last time with: {said}"
    )


def test_a_node_where_workers_die_at_their_start_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = starts(tmp_path, monkeypatch, "10.0.0.6", "10.0.0.7")
    assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RETRY
    assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RAISE
    assert read_json(RunFolder(tmp_path).change) == {
        "reason": "2 failures in a row began on node node-1",
        "micro_batch": None,
        "avoid": ["node-1"],
    }


def test_two_nodes_with_one_address_are_not_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = starts(tmp_path, monkeypatch, "10.0.0.7", "10.0.0.7")
    for _ in range(2):
        assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RETRY


def test_the_fleet_is_asked_again_after_workers_were_lost_at_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = starts(tmp_path, monkeypatch, nodes=("node-0", "node-0"))
    assert policy.make_decision(ControllerError(DIED)) is FailureDecision.RAISE
    change = read_json(RunFolder(tmp_path).change)
    assert change is not None
    assert change["reason"] == "workers were lost while they started: restart 1 of 3 without progress"


def test_what_else_stops_rays_controller_is_left_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = starts(tmp_path, monkeypatch)
    for _ in range(5):
        assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) is FailureDecision.RETRY
    given_up = ControllerError(GivenUpError("the job's own code raised: it would again", ""))
    assert policy.make_decision(given_up) is FailureDecision.RAISE
    bug = ControllerError(of_a_task(ImportError("no module named torch")))
    assert policy.make_decision(bug) is FailureDecision.RAISE
    assert records(tmp_path, "failures.jsonl") == []
