"""What the child process does: import what may crash, ask what may hang, and write down each fact as it is found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from orchestrator.telemetry.human import printable

__all__ = ["answer", "last_line"]

ANSWER_S = 6


def answer(probe: str, *arguments: str) -> None:
    """Write what the probe finds to standard output, a JSON object a line, and all noise to the other stream."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    probes: dict[str, Callable[..., Iterator[dict[str, Any]]]]
    probes = {"frameworks": _frameworks, "cluster": _cluster}
    for facts in probes[probe](*arguments):
        channel.write(json.dumps(facts) + "\n")
        channel.flush()


def _frameworks() -> Iterator[dict[str, Any]]:
    """Facts of ``probes.Frameworks``, those of torch before DeepSpeed is imported."""
    import torch

    from orchestrator.launching.cluster import embedded_shape

    platform = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = next((f"{name} {version}" for name, version in platform.items() if version), "")
    why = ""
    if built_for and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            why = last_line(str(error).partition(". ")[0])
    devices = [_device(index) for index in range(torch.cuda.device_count())] if built_for and not why else []
    yield {
        "torch": torch.__version__,
        "built_for": built_for,
        "why_no_device": why,
        "devices": devices,
        "embedded": asdict(embedded_shape()),
    }
    if not devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    yield {"deepspeed": deepspeed.__version__}


def _device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    facts = {"name": properties.name, "memory_bytes": properties.total_memory, "free_bytes": 0, "bf16": False}
    try:
        facts |= {"free_bytes": torch.cuda.mem_get_info(index)[0], "bf16": properties.major >= 8}
        (torch.ones(8, device=f"cuda:{index}") + 1).sum().item()
    except RuntimeError as error:
        facts["error"] = last_line(str(error).partition("\n")[0])
    return facts


def _cluster(where: str) -> Iterator[dict[str, Any]]:
    """Facts of ``probes.Cluster``, read from its control store without joining it as a driver would."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, so mypy cannot look inside
    from ray.exceptions import AuthenticationError

    signal.alarm(ANSWER_S)
    if where == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as ray.init does, and only for auto
        with contextlib.suppress(ConnectionError):
            where = canonicalize_bootstrap_address(where) or where
        if where == "auto":
            return
    yield {"address": where}
    try:
        store = GcsClient(address=where)
        alive = [node for node in store.get_all_node_info(timeout=ANSWER_S).values() if node.state == 0]
        known = store.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=ANSWER_S)
    except AuthenticationError:
        yield {"refused": True}
        return
    about = json.loads(known) if known else {}
    kinds = {node.labels.get("ray.io/accelerator-type", "") for node in alive} - {""}
    yield {
        "ray": about.get("ray_version", ""),
        "python": about.get("python_version", ""),
        "nodes": [node.node_manager_address for node in alive],
        "cpus": sum(node.resources_total.get("CPU", 0.0) for node in alive),
        "accelerators": int(sum(node.resources_total.get("GPU", 0.0) for node in alive)),
        "accelerator": ", ".join(sorted(kinds)),
    }


def last_line(text: str) -> str:
    """The last line that says something, without Ray's token and not too long."""
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    secret = os.environ.get("RAY_AUTH_TOKEN")
    return printable(line.replace(secret, "***") if secret else line)[:300]
