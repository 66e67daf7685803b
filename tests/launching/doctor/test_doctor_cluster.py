"""Clusters that cannot be reached, answer, refuse or do not fit."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from orchestrator.config import AdamW, Recipe, RunConfig, ScaleConfig, Stop
from orchestrator.launching.doctor.cluster import (
    SUBMIT,
    TOKEN,
    embedded_cluster,
    existing_cluster,
    member,
    shared_folder,
    versions,
)
from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.probes import Cluster, Frameworks
from orchestrator.planning.cluster import ClusterShape

PYTHON = ".".join(map(str, sys.version_info[:3]))

HERE = Cluster(ray="2.60.0", python=PYTHON, nodes=("127.0.0.1",), cpus=4.0, address="127.0.0.1:6379")


def config(*, workers: int = 2, name: str = "digits") -> RunConfig:
    recipe = Recipe(batch=32, optimizer=AdamW(learning_rate=1e-3), stop=Stop(steps=1))
    return RunConfig(name=name, recipe=recipe, scale=ScaleConfig(workers=workers))


def never(where: str) -> Cluster:
    raise AssertionError(f"{where} was asked")


def existing(
    text: str, *, answer: Cluster | None = None, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    return existing_cluster(
        text,
        "--address",
        environment or {"HOME": "/nonexistent"},
        config=None,
        home=Path("/runs"),
        ask=never if answer is None else lambda _where: answer,
    )


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_without_an_address_a_run_starts_its_own_cluster() -> None:
    assert embedded_cluster(Frameworks(embedded=ClusterShape(1, 16, 2, "H100")), config()) == [
        Finding("cluster", "ok", "none named: a run starts its own here, with 16 CPUs and 2 accelerators")
    ]


def test_a_closed_port_is_reported_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert existing(f"127.0.0.1:{closed}") == [
        Finding(
            "cluster",
            "problem",
            f"--address=127.0.0.1:{closed} cannot be reached: Connection refused",
            "start it with ray start --head --port=6379, or leave --address out to train here",
        )
    ]


@pytest.mark.parametrize(
    ("text", "detail", "remedy"),
    [
        ("head", "--address=head is no address", "--address HOST:6379"),
        ("head:x", "--address=head:x is no address", "--address HOST:6379"),
        (":6379", "--address=:6379 is no address", "--address HOST:6379"),
        ("ray://head:10001", "--address=ray://head:10001: a run takes HOST:6379, not ray://", SUBMIT),
        ("http://head:8265", "--address=http://head:8265: a run takes HOST:6379, not http://", SUBMIT),
    ],
)
def test_what_is_no_address_for_a_run(text: str, detail: str, remedy: str) -> None:
    assert existing(text) == [Finding("cluster", "problem", detail, remedy)]


def test_auto_where_no_cluster_was_started() -> None:
    assert existing("auto", answer=Cluster()) == [
        Finding("cluster", "problem", "auto: no cluster was started on this machine", "ray start --head --port=6379")
    ]


def test_a_cluster_that_answers_and_fits(port: int) -> None:
    assert existing(f"127.0.0.1:{port}", answer=HERE) == [
        Finding("cluster", "ok", "127.0.0.1:6379: 1 node, 4 CPUs, 0 accelerators"),
        Finding("cluster.versions", "ok", f"Ray 2.60.0 and Python {PYTHON}, as here"),
        Finding("cluster.node", "ok", "this machine is one of its nodes"),
    ]


def test_an_open_port_without_ray_behind_it(port: int) -> None:
    assert existing(f"127.0.0.1:{port}", answer=Cluster(failure="no end in sight, so it was stopped")) == [
        Finding(
            "cluster",
            "problem",
            f"127.0.0.1:{port} does not answer as a Ray cluster: no end in sight, so it was stopped",
            "--address HOST:PORT as ray start --head has printed it",
        )
    ]


@pytest.mark.parametrize(
    ("environment", "detail"),
    [
        ({}, "wants a token, and Ray sends none while RAY_AUTH_MODE is not token"),
        ({"RAY_AUTH_MODE": "token"}, "wants another token than the one here"),
    ],
)
def test_a_cluster_that_wants_another_token(port: int, environment: Mapping[str, str], detail: str) -> None:
    where = f"127.0.0.1:{port}"
    assert existing(where, answer=Cluster(refused=True), environment=environment) == [
        Finding("cluster", "problem", f"{where} {detail}", TOKEN)
    ]


@pytest.mark.parametrize(
    ("cluster", "environment", "found"),
    [
        (
            Cluster(ray="2.60.0", python="3.11.7"),
            {},
            Finding("cluster.versions", "ok", "Ray 2.60.0 and Python 3.11.7, as here"),
        ),
        (
            Cluster(ray="2.59.0", python="3.11.7"),
            {},
            Finding(
                "cluster.versions",
                "problem",
                "the cluster runs Ray 2.59.0, and this machine 2.60.0",
                "pip install 'ray[train,tune]==2.59.0'",
            ),
        ),
        (
            Cluster(ray="2.60.0", python="3.12.3"),
            {},
            Finding(
                "cluster.versions",
                "problem",
                "the cluster runs Python 3.12.3, and this machine 3.11.7",
                "make clean install PYTHON=python3.12",
            ),
        ),
        (
            Cluster(ray="2.60.0", python="3.11.9"),
            {},
            Finding(
                "cluster.versions",
                "problem",
                "the cluster runs Python 3.11.9, and this machine 3.11.7: Ray refuses the difference",
                "export RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor",
            ),
        ),
        (
            Cluster(ray="2.60.0", python="3.11.9"),
            {"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor"},
            Finding("cluster.versions", "ok", "Ray 2.60.0 and Python 3.11.9 there, 3.11.7 here"),
        ),
    ],
)
def test_versions_on_both_sides(cluster: Cluster, environment: Mapping[str, str], found: Finding) -> None:
    assert versions(cluster, environment, ray="2.60.0", python="3.11.7") == [found]


def test_a_driver_outside_the_cluster_is_told_how_to_join() -> None:
    assert member(Cluster(address="10.0.0.1:6379", nodes=("10.0.0.1",)), own=["127.0.0.1", "10.0.0.9"]) == [
        Finding(
            "cluster.node",
            "problem",
            "this machine is none of the nodes of 10.0.0.1:6379, and a run is driven from one",
            f"ray start --address=10.0.0.1:6379; or from anywhere: {SUBMIT}",
        )
    ]


def test_workers_on_several_machines_need_a_folder_they_share() -> None:
    two = Cluster(nodes=("10.0.0.1", "10.0.0.2"))
    assert shared_folder(Cluster(nodes=("10.0.0.1",)), Path("/runs"), "ext4") == []
    assert shared_folder(two, Path("/runs"), "nfs4") == [Finding("storage.shared", "ok", "/runs is on nfs4")]
    assert shared_folder(two, Path("/runs"), "ext4") == [
        Finding(
            "storage.shared",
            "warning",
            "/runs is on ext4, which the cluster's other nodes do not see",
            "--set checkpoint.uri=/folder/mounted/on/every/node",
        )
    ]
