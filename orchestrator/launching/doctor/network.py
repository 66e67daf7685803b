"""Whether workers on this machine find each other."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

import psutil

from orchestrator.launching.doctor.finding import Finding, ok, problem, warning

__all__ = ["hostname"]


def hostname(
    environment: Mapping[str, str],
    *,
    resolve: Callable[[str], str] = socket.gethostbyname,
    interfaces: Sequence[str] | None = None,
) -> list[Finding]:
    """Gloo listens where the host's name leads, unless told which interface to use."""
    names = list(psutil.net_if_addrs()) if interfaces is None else list(interfaces)
    use = f"export GLOO_SOCKET_IFNAME={next((n for n in names if n != 'lo'), 'lo')}"
    if chosen := environment.get("GLOO_SOCKET_IFNAME"):
        unknown = [n for n in chosen.split(",") if n not in names]
        if unknown:
            detail = f"GLOO_SOCKET_IFNAME={chosen}: there is no interface {unknown[0]}, only {', '.join(names)}"
            return [problem("network.hostname", detail, use)]
        return [ok("network.hostname", f"workers use {chosen} (GLOO_SOCKET_IFNAME)")]
    name = socket.gethostname()
    try:
        address = resolve(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        why = f"{name} leads to no address of this machine ({error.strerror or error})"
        return [warning("network.hostname", f"{why}: workers on CPU use loopback, or do not meet", use)]
    return [ok("network.hostname", f"{name} is {address}")]
