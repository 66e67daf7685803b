"""`orchestrator submit --kubernetes` against a real API server, with the chart installed there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, in_this_process

from kube import CHART, Tools

pytestmark = [
    pytest.mark.k8s,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),  # the server's certificate is its own
]

pytest.importorskip("kubernetes", reason="the Kubernetes client is not installed")
JOB = ("submit", "jobs.vision:digits", "--kubernetes", "--release", "team-orchestrator", "--namespace", "train")


@pytest.fixture(scope="module")
def installed(api: Tools) -> Iterator[Tools]:
    words = ["--namespace", "train", "--set", "storage.uri=s3://runs/team", "--set", "jobDefaults.backoffLimit=7"]
    done = api("helm", "install", "team", str(CHART), *words)
    assert done.code == 0, done.err
    yield api
    api("helm", "uninstall", "team", "--namespace", "train")
    api("kubectl", "--namespace", "train", "delete", "rayjobs", "--all")


@pytest.fixture
def orchestrator(
    installed: Tools, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """The command line, with a kubeconfig: the administrator's, unless said otherwise."""

    def run(*words: str, kubeconfig: Path | None = None) -> Ended:
        path = str(kubeconfig or installed.kubeconfig)
        # The client reads KUBECONFIG when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        return in_this_process(monkeypatch, capsys, *words)

    return run


def rayjob(api: Tools, name: str) -> dict[str, Any]:
    done = api("kubectl", "--namespace", "train", "get", "rayjob", name, "-o", "json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def names(api: Tools) -> str:
    return api("kubectl", "--namespace", "train", "get", "rayjobs", "-o", "name").out


def as_account(api: Tools, folder: Path, account: str) -> Path:
    """A kubeconfig with a token that the API server has made for a service account."""
    assert api.kubeconfig is not None
    made = api("kubectl", "--namespace", "train", "create", "token", account)
    assert made.code == 0, made.err
    config = json.loads(api.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": made.out.strip()}
    path = folder / account
    path.write_text(json.dumps(config))
    return path


def test_a_run_becomes_a_rayjob_with_the_charts_cluster(installed: Tools, orchestrator: Callable[..., Ended]) -> None:
    more = ("--set", "name=first", "--arg", "epochs=3", "--env", "NCCL_DEBUG=INFO", "--pip", "einops==0.8.1")
    done = orchestrator(*JOB, *more, "--driver-cpus", "2", "--no-follow")
    assert done.code == 0, done.err
    assert "global batch" in done.err, "the plan is shown"
    assert "RayJob first in namespace train created" in done.out
    spec = rayjob(installed, "first")["spec"]
    assert spec["entrypoint"] == (
        "python -m orchestrator run jobs.vision:digits --arg epochs=3 "
        "--set checkpoint.uri=s3://runs/team --set name=first"
    )
    assert spec["runtimeEnvYAML"] == "env_vars:\n  NCCL_DEBUG: INFO\npip:\n- einops==0.8.1\n"
    assert spec["backoffLimit"] == 7
    assert spec["entrypointNumCpus"] == 2
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"] == "cpu"
    queued = orchestrator(*JOB, "--set", "name=queued", "--queue", "team-a")
    assert queued.code == 2
    assert "Have fleet.enabled=true set in its values" in queued.err

    again = orchestrator(*JOB, *more, "--json")
    assert again.code == 0, again.err
    assert again.summary["created"] is False
    other = orchestrator(*JOB, "--set", "name=first", "--arg", "epochs=4")
    assert other.code == 2
    assert "exists with another command" in other.err
    assert "rbac.allowDelete" in other.err


def test_in_a_release_with_a_fleet_a_run_goes_into_a_queue_of_the_teams_cluster(
    installed: Tools, orchestrator: Callable[..., Ended]
) -> None:
    words = ["--namespace", "train", "--set", "storage.uri=s3://runs/team", "--set", "fleet.enabled=true"]
    done = installed("helm", "install", "shared", str(CHART), *words)
    assert done.code == 0, done.err
    try:
        job = (*JOB[:3], "--release", "shared-orchestrator", *JOB[5:])
        sent = orchestrator(*job, "--set", "name=urgent", "--queue", "team-a", "--priority", "5")
        assert sent.code == 0, sent.err
        assert "orchestrator logs --follow urgent" in sent.out
        assert "logs --follow job/" not in sent.out
        spec = rayjob(installed, "urgent")["spec"]
        assert spec["clusterSelector"] == {"ray.io/cluster": "shared-orchestrator"}
        assert "--set fleet.queue=team-a --set fleet.priority=5" in spec["entrypoint"]
        assert "rayClusterSpec" not in spec
        assert orchestrator(*job, "--set", "name=other").code == 0
        wrong = orchestrator(*job, "--set", "name=wrong", "--set", "layout.micro_batch=7")
        assert (wrong.code, "layout.micro_batch=7" in wrong.err) == (2, True), "checked against the team's cluster"
        assert "--set fleet.queue=default" in rayjob(installed, "other")["spec"]["entrypoint"]
    finally:
        installed("helm", "uninstall", "shared", "--namespace", "train")


def test_dry_run_asks_the_server_and_stores_nothing(installed: Tools, orchestrator: Callable[..., Ended]) -> None:
    done = orchestrator(*JOB, "--set", "name=dry", "--dry-run")
    assert done.code == 0, done.err
    assert "would be accepted" in done.out
    assert "rayjob.ray.io/dry" not in names(installed)


def test_the_submitters_role_is_enough(installed: Tools, orchestrator: Callable[..., Ended], tmp_path: Path) -> None:
    config = as_account(installed, tmp_path, "team-orchestrator-submitter")
    done = orchestrator(*JOB, "--set", "name=mine_1.0", kubeconfig=config)
    assert done.code == 0, done.err
    assert rayjob(installed, "mine-1-0")["spec"]["entrypoint"].endswith("--set name=mine_1.0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--release", "none"), "check --release and --namespace"),
        (("--set", "layout.micro_bach=1"), "did you mean 'micro_batch'"),
        (("--working-dir", "/tmp"), "the Kubernetes API takes no code"),
        (("--context", "elsewhere"), "set KUBECONFIG, or --context"),
        (("--set", "layout.micro_batch=7"), "layout.micro_batch=7"),
        (("--set", "scale.workers=5"), "the cluster has 4 CPUs and 0 accelerators on 2 node(s)"),
        (("--fresh",), "--fresh: a RayJob is started again after a loss"),
        (("--env", "WANDB_API_KEY=hidden"), "--env WANDB_API_KEY looks like a credential"),
        (("--address", "http://127.0.0.1:8265"), "leave out --address"),
        (("--follow",), "leave out --follow"),
    ],
)
def test_what_is_wrong_is_one_message(
    installed: Tools, orchestrator: Callable[..., Ended], words: tuple[str, ...], said: str
) -> None:
    done = orchestrator(*JOB, "--set", "name=wrong", *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert "rayjob.ray.io/wrong" not in names(installed)


def test_without_rights_and_without_a_server(
    installed: Tools, orchestrator: Callable[..., Ended], tmp_path: Path
) -> None:
    nobody = as_account(installed, tmp_path, "team-orchestrator")
    refused = orchestrator(*JOB, kubeconfig=nobody)
    assert refused.code == 2
    assert "ask for the chart's role (rbac.subjects)" in refused.err
    config = json.loads(nobody.read_text())
    config["users"][0]["user"]["token"] = "not-a-token"
    nobody.write_text(json.dumps(config))
    unknown = orchestrator(*JOB, kubeconfig=nobody)
    assert unknown.code == 2
    assert "log in again" in unknown.err
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    nobody.write_text(json.dumps(config))
    dead = orchestrator(*JOB, kubeconfig=nobody)
    assert dead.code == 2
    assert "the API server does not answer" in dead.err
    assert len(dead.err.strip().splitlines()) == 1, dead.err


def test_what_is_for_a_rayjob_alone_is_not_passed_over_without_one(orchestrator: Callable[..., Ended]) -> None:
    done = orchestrator("submit", "jobs.vision:digits", "--dry-run", "--namespace", "train")
    assert (done.code, done.err.strip()) == (
        2,
        "error: without --kubernetes there is no use for --namespace and --dry-run",
    )
