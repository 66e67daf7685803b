"""Ports on loopback for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Above the ports of Ray's workers (10002 to 19999), below those the kernel gives to outgoing connections (32768 on):
# what "bind to port 0" answers is one of the latter, and by the time a server listens there a connection may have it.
LOWEST, HIGHEST = 20_000, 32_000
SHARE = 2_000  # each process of pytest-xdist takes its own


def _candidates() -> itertools.cycle[int]:
    index = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % ((HIGHEST - LOWEST) // SHARE)
    ports = list(range(LOWEST + index * SHARE, LOWEST + (index + 1) * SHARE))
    random.Random(os.getpid()).shuffle(ports)
    return itertools.cycle(ports)


_next = _candidates()


def free_port() -> int:
    """A port that nothing listens on, never the same twice in a while."""
    for port in itertools.islice(_next, SHARE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"every port from {LOWEST} to {HIGHEST} is taken")
