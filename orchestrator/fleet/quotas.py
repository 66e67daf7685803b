"""Devices that queues are sure of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError
from orchestrator.fleet.cluster import Fleet

__all__ = ["check_quotas", "limits", "parse_quotas"]

Index = NDArray[np.intp]


def check_quotas(quotas: Mapping[str, int]) -> None:
    """Refuse what is no number of devices.

    Raises:
        ConfigError: a quota below 0 or not whole.
    """
    for queue, devices in quotas.items():
        if devices != int(devices) or devices < 0:
            raise ConfigError(f"quota of queue {queue}: {devices} devices; give a whole number, 0 or more")


def parse_quotas(text: str) -> dict[str, int]:
    """Quotas as an environment holds them: ``team-a=4,team-b=2``.

    Raises:
        ConfigError: a quota that cannot be read.
    """
    found: dict[str, int] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        queue, _, devices = word.partition("=")
        if not queue or not devices.isdecimal() or queue in found:
            raise ConfigError(
                f"quotas of queues: cannot read {word!r} in {text!r}: write team-a=4,team-b=2, each queue once"
            )
        found[queue] = int(devices)
    return found


def limits(fleet: Fleet, quotas: Mapping[str, int]) -> tuple[Index, Index]:
    """Which limit each job is under, and what each limit allows before anybody borrows: [jobs], [limits].

    Queues without a quota share what the quotas leave. Quotas of more devices than there are shrink in proportion. With
    no quota at all there are no limits, and each job is under -1.
    """
    if not quotas:
        return np.full(len(fleet.jobs), -1), np.zeros(0, np.intp)
    asked = sum(quotas.values())
    share = min(1.0, fleet.devices / asked) if asked else 1.0
    names = sorted(quotas)
    sizes = [int(quotas[name] * share) for name in names]
    number = {name: index for index, name in enumerate(names)}
    queue = np.array([number.get(job.queue, len(names)) for job in fleet.jobs], np.intp)
    return queue, np.array([*sizes, fleet.devices - sum(sizes)], np.intp)
