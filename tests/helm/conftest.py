"""Helm with a home of its own, the schemas of a cluster, and a real API server, each made once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import kube
from kube import Tools


def wait_for_crds(tools: Tools) -> None:
    """Until the server serves them. On a new one kubectl gives up at once: it finds no conditions to look through."""
    deadline = time.monotonic() + 240
    while (waited := tools("kubectl", "wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")).code:
        assert time.monotonic() < deadline, waited.err
        time.sleep(0.5)


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    """Helm without a cluster."""
    if reason := kube.missing_tool("helm"):
        pytest.skip(reason)
    return Tools(tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tools]:
    """Helm and kubectl against a real API server that knows the CRDs."""
    if reason := kube.no_api_server():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("kubernetes")
    crds = folder / "crds"
    crds.mkdir()
    for path in sorted((kube.crds_folder() or Path()).glob("*.yaml")):
        adapted = kube.adapted_crd(yaml.load(path.read_text(), Loader=kube.loader()))
        (crds / f"{path.stem}.json").write_text(json.dumps(adapted))
    with kube.api_server(folder) as kubeconfig:
        tools = Tools(folder, kubeconfig)
        created = tools("kubectl", "create", "-f", str(crds))
        assert created.code == 0, created.err
        wait_for_crds(tools)
        assert tools("kubectl", "create", "namespace", "train").code == 0
        yield tools
