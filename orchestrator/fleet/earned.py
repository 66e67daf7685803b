"""What the devices of a fleet earn: the goodput of each run in devices of its own smallest size."""

from __future__ import annotations

from orchestrator.fleet.book import Entry
from orchestrator.scheduling.goodput import rate

__all__ = ["earned_devices"]


def earned_devices(entry: Entry) -> float:
    """A run's present goodput over that of one device at its smallest size; 0 while it waits.

    Goodputs of different runs cannot be added up, since their samples are different things; devices can. A run on
    twice its devices that is 1.8 times as fast earns 1.8 of them. What was never timed earns what it has.
    """
    here, facts, report = entry.current, entry.facts, entry.report
    if here is None:
        return 0.0
    model = (report.step_time or {}).get(here.device_type)
    fewest = facts.workers_range[0]
    if model is None or here.devices <= fewest:
        return float(here.devices)
    noise = float(facts.reference_batch) if report.noise_scale is None else report.noise_scale
    used, nodes = here.layout, len(here.devices_per_node)
    # The same batch on its fewest devices, in micro batches of the same size.
    steps = max(1, round(used.global_batch / (fewest * used.micro_batch)))
    least = type(used)(fewest, used.micro_batch, steps)
    now, then = (rate(model, noise, facts.reference_batch, n, one).goodput for n, one in ((nodes, used), (1, least)))
    return fewest * now / then if then > 0.0 else float(here.devices)
