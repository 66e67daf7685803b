"""Real Helm, kubectl and Kubernetes API server for tests: where they are found, and how they are started."""

from __future__ import annotations

import contextlib
import functools
import json
import lzma
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ports import free_port

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "helm" / "orchestrator"
READY_S = 240.0
APIS = ("ray.io/v1", "monitoring.coreos.com/v1", "policy/v1")


def test_data() -> Path | None:
    """The folder with data that the repository does not hold: ``ORCHESTRATOR_TEST_DATA``, or beside the checkout."""
    named = os.environ.get("ORCHESTRATOR_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def crds_folder() -> Path | None:
    """The folder with the CRDs of KubeRay and of the Prometheus operator."""
    folder = (test_data() or Path("/nonexistent")) / "crds"
    return folder if any(folder.glob("ray.io_*.yaml")) else None


def tool(name: str) -> str | None:
    """A program of the environment (``make kube-tools``), of the Kubernetes test assets, or of the PATH."""
    places = [Path(sys.prefix) / "bin", Path(os.environ.get("KUBEBUILDER_ASSETS", "/usr/local/kubebuilder/bin"))]
    return shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))


def missing_tool(*names: str) -> str | None:
    """Why a test that needs these programs cannot run, or None."""
    absent = [name for name in names if tool(name) is None]
    return f"not found: {', '.join(absent)} (helm and kubectl: make kube-tools)" if absent else None


def apiserver() -> str | None:
    """The API server: a program, or one that lies packed beside the test data and is unpacked once."""
    if found := tool("kube-apiserver"):
        return found
    packed = (test_data() or Path("/nonexistent")).parent / "tools" / "kube-api" / "kube-apiserver.xz"
    if not packed.is_file():
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kube-api-test"
    unpacked = cache / "kube-apiserver"
    if not unpacked.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f".kube-apiserver.{secrets.token_hex(4)}"
        with lzma.open(packed) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        part.chmod(0o755)
        part.replace(unpacked)
    return str(unpacked)


def no_api_server() -> str | None:
    """Why no API server can be started here, or None."""
    if reason := missing_tool("helm", "kubectl", "etcd"):
        return reason
    if crds_folder() is None:
        return "no CRDs: set ORCHESTRATOR_TEST_DATA to a folder that holds crds/ray.io_*.yaml"
    return None if apiserver() else "no kube-apiserver: set KUBEBUILDER_ASSETS to a folder that holds it"


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Tools:
    """Helm and kubectl with homes of their own, against one API server or none."""

    home: Path
    kubeconfig: Path | None = None

    def __call__(self, name: str, *words: str, stdin: str | None = None) -> Done:
        program = tool(name)
        assert program is not None, name
        helm = {key: str(self.home) for key in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}
        environment = {**os.environ, **helm, "HOME": str(self.home), "KUBECONFIG": str(self.kubeconfig or os.devnull)}
        done = subprocess.run(
            [program, *words], input=stdin, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def template(self, *words: str, values: dict[str, Any] | None = None, chart: Path = CHART) -> Done:
        """``helm template`` as release ``team`` in namespace ``train``, with the optional APIs present."""
        apis = [word for api in APIS for word in ("--api-versions", api)]
        stdin = None if values is None else json.dumps(values)
        more = [] if values is None else ["--values", "-"]
        return self("helm", "template", "team", str(chart), "--namespace", "train", *apis, *more, *words, stdin=stdin)


def objects(text: str) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    return [document for document in yaml.load_all(text, Loader=loader()) if document]


@functools.cache
def loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[Path]:
    """A Kubernetes API server with RBAC and etcd on loopback; yields the administrator's kubeconfig."""
    token = secrets.token_hex(16)
    _write_keys(folder)
    (folder / "tokens.csv").write_text(f'{token},admin,1,"system:masters"\n')
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(folder, "etcd", [str(tool("etcd")), *_etcd(folder, etcd_port, peer_port)]))
        started.append(_start(folder, "apiserver", [str(apiserver()), *_apiserver(folder, etcd_port, port)]))
        _wait_ready(f"https://127.0.0.1:{port}/readyz", token, started, folder)
        yield _write_kubeconfig(folder, port, token)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(folder: Path, name: str, words: list[str]) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def _etcd(folder: Path, client: int, peer: int) -> list[str]:
    here, there = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    return [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={here}",
        f"--advertise-client-urls={here}",
        f"--listen-peer-urls={there}",
        f"--initial-advertise-peer-urls={there}",
        f"--initial-cluster=default={there}",
        "--unsafe-no-fsync",
    ]


def _apiserver(folder: Path, etcd_port: int, port: int) -> list[str]:
    return [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={folder / 'certificates'}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--endpoint-reconciler-type=none",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={folder / 'sa.pub'}",
        f"--service-account-signing-key-file={folder / 'sa.key'}",
        "--disable-admission-plugins=ServiceAccount",
    ]


def _write_keys(folder: Path) -> None:
    key, public = str(folder / "sa.key"), str(folder / "sa.pub")
    for words in (["genrsa", "-out", key, "2048"], ["rsa", "-in", key, "-pubout", "-out", public]):
        subprocess.run(["openssl", *words], check=True, capture_output=True)


def _write_kubeconfig(folder: Path, port: int, token: str) -> Path:
    path = folder / "kubeconfig"
    server = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": server}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return path


def _wait_ready(url: str, token: str, started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        dead = [process.args for process in started if process.poll() is not None]
        assert not dead, f"ended early: {dead}; see {folder}"
        assert time.monotonic() < deadline, f"the API server is not ready after {READY_S:.0f} s: see {folder}"
        time.sleep(0.1)


def adapted_crd(node: Any, *, in_properties: bool = False) -> Any:
    """A CRD of today as an old API server takes it.

    Version 1.20 knows no CEL rules and no selectable fields, reads ``default: ""`` back as null, and wants the keys
    of a list map required. Nothing else is changed.
    """
    if isinstance(node, list):
        return [adapted_crd(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = {"x-kubernetes-validations", "selectableFields"}
    out = {
        key: adapted_crd(value, in_properties=key == "properties")
        for key, value in node.items()
        if in_properties or not (key in dropped or (key == "default" and value == ""))
    }
    if not in_properties and out.get("x-kubernetes-list-type") == "map":
        items = out["items"]
        properties = items.get("properties", {})
        needed = {key for key in out["x-kubernetes-list-map-keys"] if "default" not in properties.get(key, {})}
        items["required"] = sorted(set(items.get("required", [])) | needed)
    return out
