"""What the telemetry hub bears: a thousand workers that each send it a snapshot every second.

    python benchmarks/hub.py            # one minute
    python benchmarks/hub.py --write    # the result into benchmarks/results/

A real hub actor on a Ray cluster of its own. Ten runs of a hundred ranks are simulated: what each rank sends is what a
rank sends, made by the same functions, but the senders are threads of this process. The hub is scraped over HTTP every
second meanwhile. Wanted: a scrape under 0.5 s and less than 500 MB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from orchestrator.launching.cluster import RayCluster
from orchestrator.launching.hub import HubClient, HubSettings
from orchestrator.telemetry.meter import Meter, Snapshot
from orchestrator.telemetry.metrics import PARTS
from orchestrator.telemetry.observing import RunFacts, RunObserver, observe_memory, observe_parts, observe_place

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = 10
WANTED_SCRAPE_S, WANTED_BYTES = 0.5, 500e6


def main() -> int:
    """Run the benchmark; the exit code says only whether it ran."""
    parser = argparse.ArgumentParser(description="Scrape time and memory of the hub under simulated workers.")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-hub.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        settings = HubSettings("127.0.0.1", 19400, 10.0, folder)
        with RayCluster.connect(None, log=Path(folder) / "ray.log"):
            found = measure(settings, options)
    print(json.dumps(found))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-hub.md").write_text(page(found))
    return 0


def measure(settings: HubSettings, options: argparse.Namespace) -> dict[str, Any]:
    """Send, scrape, and look at the hub's process."""
    probe = HubClient(settings)
    probe(snapshot(0, Meter()))
    process = next(p for p in psutil.process_iter(["cmdline"]) if "HubActor" in " ".join(p.info["cmdline"] or []))
    end, counts = time.monotonic() + options.seconds, [[0, 0] for _ in range(options.threads)]
    shares = [range(index, options.workers, options.threads) for index in range(options.threads)]
    senders = [
        threading.Thread(target=_send, args=(settings, share, end, count))
        for share, count in zip(shares, counts, strict=True)
    ]
    cpu_before, began = sum(process.cpu_times()[:2]), time.monotonic()
    for sender in senders:
        sender.start()
    scrapes, sizes, memory = [], [], []
    while time.monotonic() < end:
        started = time.perf_counter()
        with urllib.request.urlopen(f"http://{probe.address}/metrics", timeout=30) as answer:
            sizes.append(len(answer.read()))
        scrapes.append(time.perf_counter() - started)
        memory.append(process.memory_info().rss)
        time.sleep(1.0)
    for sender in senders:
        sender.join()
    took = time.monotonic() - began
    late = scrapes[len(scrapes) // 4 :]  # once all workers are there
    return {
        "workers": options.workers,
        "snapshots_per_s": sum(sent for sent, _ in counts) / took,
        "failed": sum(failed for _, failed in counts),
        "scrape_s_median": statistics.median(late),
        "scrape_s_max": max(late),
        "page_bytes": sizes[-1],
        "memory_bytes": max(memory),
        "cpu_share": (sum(process.cpu_times()[:2]) - cpu_before) / took,
        "scrapes": len(late),
    }


def _send(settings: HubSettings, workers: range, end: float, count: list[int]) -> None:
    """Each of ``workers`` once a second, spread over the second."""
    client = HubClient(settings)
    meters = {worker: Meter() for worker in workers}
    observers = {worker: RunObserver(RunFacts(64)) for worker in workers if worker < RUNS}
    for second in itertools.count(time.monotonic()):  # who is late makes up for it: a second is a second
        if time.monotonic() >= end:
            return
        for index, (worker, meter) in enumerate(meters.items()):
            _work(meter, observers.get(worker))
            try:
                client(snapshot(worker, meter))
                count[0] += 1
            except OSError:
                count[1] += 1
            time.sleep(max(0.0, second + (index + 1) / len(meters) - time.monotonic()))


def _work(meter: Meter, observer: RunObserver | None) -> None:
    """A second of one worker: the first of each run speaks for it as well."""
    parts = dict.fromkeys(PARTS, 0.003)
    observe_place(meter, "host", "cuda:0")
    observe_memory(meter, used=10**9, reserved=2 * 10**9, peak=3 * 10**9, limit=80 * 10**9)
    observe_parts(meter, parts)
    if observer is not None:
        step = meter.totals().get(("orchestrator_steps_total", ()), 0.0) + 1
        record = {
            "step": step,
            "samples": 64 * step,
            "progress": 64.0 * step,
            "epoch": step / 20,
            "time": time.time(),
            "length": 1e6,
            "loss": 1.0,
            "learning_rate": 0.1,
            "global_batch": 64,
            "micro_batch": 32,
            "accumulation": 1,
            "workers": 2,
            "grad_norm": 1.0,
            "step_time_s": 0.02,
            "skipped": False,
            "noise_scale": 300.0,
            "noise_scale_low": 200.0,
            "noise_scale_high": 500.0,
            "parts": parts,
            "attempt": 1,
        }
        observer.step(meter, record, 1.0)


def snapshot(worker: int, meter: Meter) -> Snapshot:
    """What ``worker`` sends: rank ``worker // RUNS`` of run ``worker % RUNS``."""
    return Snapshot(
        run=f"run-{worker % RUNS}",
        source=str(worker // RUNS),
        attempt=1,
        started=1.0,
        own=meter.counted(),
        totals=meter.totals(),
        gauges=meter.gauges(),
    )


def page(found: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    met = found["scrape_s_max"] < WANTED_SCRAPE_S and found["memory_bytes"] < WANTED_BYTES
    return f"""# What the telemetry hub bears

{datetime.now(UTC).date()}. {len(os.sched_getaffinity(0))} cores, shared by the hub, Ray and the simulated workers.

`python benchmarks/hub.py --workers {found["workers"]}`: {found["workers"]:,} simulated workers of {RUNS} runs send a
real hub actor one snapshot a second each, while it is scraped every second.

| | measured | wanted |
| --- | ---: | ---: |
| snapshots taken per second | {found["snapshots_per_s"]:,.0f} | {found["workers"]:,} |
| snapshots that failed | {found["failed"]} | 0 |
| scrape, median of {found["scrapes"]} | {found["scrape_s_median"]:.3f} s | |
| scrape, longest | {found["scrape_s_max"]:.3f} s | {WANTED_SCRAPE_S} s |
| page | {found["page_bytes"] / 1e6:.2f} MB | |
| memory of the hub's process | {found["memory_bytes"] / 1e6:,.0f} MB | {WANTED_BYTES / 1e6:,.0f} MB |
| processor time of the hub | {found["cpu_share"]:.0%} of a core | |

Scrape time and memory: {"met" if met else "missed"}.
"""


if __name__ == "__main__":
    sys.exit(main())
