"""A host's name and its interfaces, as told."""

from __future__ import annotations

import socket

from orchestrator.launching.doctor.finding import Finding
from orchestrator.launching.doctor.network import hostname


def test_a_host_name_that_leads_home() -> None:
    name = socket.gethostname()
    assert hostname({}, resolve=lambda _: "127.0.0.1") == [Finding("network.hostname", "ok", f"{name} is 127.0.0.1")]


def test_a_host_name_that_leads_nowhere_or_elsewhere() -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    name, use = socket.gethostname(), "export GLOO_SOCKET_IFNAME=eth1"
    reasons = {"Name or service not known": unknown, "Cannot assign requested address": lambda _: "198.51.100.7"}
    for reason, resolve in reasons.items():
        assert hostname({}, resolve=resolve, interfaces=["lo", "eth1"]) == [
            Finding(
                "network.hostname",
                "warning",
                f"{name} leads to no address of this machine ({reason}): workers on CPU use loopback, or do not meet",
                use,
            )
        ]


def test_an_interface_that_does_not_exist() -> None:
    interfaces = ["lo", "eth1"]
    assert hostname({"GLOO_SOCKET_IFNAME": "eth1"}, interfaces=interfaces) == [
        Finding("network.hostname", "ok", "workers use eth1 (GLOO_SOCKET_IFNAME)")
    ]
    assert hostname({"GLOO_SOCKET_IFNAME": "eth0"}, interfaces=interfaces) == [
        Finding(
            "network.hostname",
            "problem",
            "GLOO_SOCKET_IFNAME=eth0: there is no interface eth0, only lo, eth1",
            "export GLOO_SOCKET_IFNAME=eth1",
        )
    ]
