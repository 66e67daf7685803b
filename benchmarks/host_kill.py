"""How long a run stands still when a host is killed under it: from SIGKILL to the next step, and what that time is.

    python benchmarks/host_kill.py            # 4 kills, a few minutes; needs root, iproute2, redis and ray-hosts.sh
    python benchmarks/host_kill.py --write    # the result into benchmarks/results/

A head without CPUs, where the driver is, and three hosts with one CPU each, all namespaces of this machine with their
own network and processes. The digits ResNet trains on two workers, so on two of the three hosts. One of these two is
killed with all that runs on it, the third takes its place, and the killed one is started again before the next kill.
Wanted: the next step in under 20 s, and no more work lost than one checkpoint interval.

After the kills a host is cut off from the network instead, as often: its worker lives, and waits for the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "launching")]

from test_hosts import HEAD_MAY_GO, Hosts, wait_until, why_not  # noqa: E402 - the tests' own hosts

TARGET_S, INTERVAL_S = 20.0, 5.0
# Ray starts workers at niceness 15: here they would wait for whatever else the machine does, on hosts of their own not.
AS_ON_OWN_HOSTS = {"RAY_worker_niceness": "0"}
HOSTS = ("w1", "w2", "s3")
NAME = "killed"
PHASES = {
    "noticed": "Ray notices, and the controller has asked the policy",
    "group": "a new worker group: processes, their imports, the process group",
    "opened": "earlier workers fenced off, data opened, plan made, imports of the engine",
    "examined": "the check before the first step",
    "restored": "engine made, checkpoint verified and loaded",
    "stepped": "the next step",
}


def main() -> int:
    """Run the benchmark; the exit code says only whether it ran."""
    parser = argparse.ArgumentParser(description="Time from the kill of a host to the next step.")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--cuts", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DATE-host-kill.md")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="host-kill-") as folder:
        kills, cuts = _measure(Hosts(Path(folder), secrets.token_hex(8)), options.kills, options.cuts)
    text = report(kills, cuts, f"--kills {options.kills} --cuts {options.cuts}")
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.now(UTC).date()}-host-kill.md").write_text(text + "\n")
    return 0


def _measure(hosts: Hosts, kills: int, cuts: int) -> list[list[dict[str, float]]]:
    words = ["submit", "jobs.vision:digits", "--arg", "epochs=5000", "--set", f"name={NAME}", "--no-follow"]
    fields = {"policy.name": "fixed", "scale.workers": 2, "checkpoint.interval_s": INTERVAL_S}
    words += [word for field, value in fields.items() for word in ("--set", f"{field}={value}")]
    found: dict[str, list[dict[str, float]]] = {"kill": [], "cut": []}
    try:
        hosts("up")
        redis = ["redis-server", "--port", "6380", "--bind", "10.77.0.4", "--requirepass", hosts.password]
        subprocess.Popen(["ip", "netns", "exec", "rhs3", *redis, "--save", ""], stdout=subprocess.DEVNULL)
        hosts.start_head()
        for host in HOSTS:
            hosts("start", host, CPUS="1", **HEAD_MAY_GO, **AS_ON_OWN_HOSTS)
        sent = hosts.orchestrator(*words)
        if sent.code:
            sys.exit(sent.err)
        for number, verb in enumerate(["kill"] * kills + ["cut"] * cuts):
            found[verb].append(_lose(hosts, verb, number))
            print(verb, json.dumps(found[verb][-1]), file=sys.stderr, flush=True)
    finally:
        hosts("down")
    return list(found.values())


def _lose(hosts: Hosts, verb: str, number: int) -> dict[str, float]:
    """Kill a host of the run or cut it off, wait for the next step, start the host again; returns the phases."""
    run = hosts.run(NAME)
    reached = hosts.step(NAME)
    wait_until(lambda: hosts.step(NAME) > reached + 50 and any((run / "checkpoints").glob("step-*")))
    time.sleep(1.7 * number)  # at another moment between two checkpoints each time
    victim = [host for host in ("w1", "w2") if hosts.workers_on(host)][-1]
    before = len(_records(run, "attempts.jsonl"))
    failures = len(_records(run, "failures.jsonl"))
    killed_at = time.time()
    hosts(verb, victim)

    def steps_since() -> list[dict[str, Any]]:
        return [record for record in _records(run, "metrics.jsonl") if record["attempt"] > before]

    wait_until(lambda: bool(steps_since()))
    failed = _records(run, "failures.jsonl")[failures]["time"]
    health, started = _records(run, "health.jsonl")[-1], _records(run, "attempts.jsonl")[-1]
    begun = (run / ".control" / "fence").stat().st_mtime
    moments = [killed_at, failed, begun, health["time"] - health["took_s"], health["time"], started["time"]]
    moments.append(steps_since()[0]["time"])
    if verb == "cut":
        hosts("heal", victim)
        hosts("kill", victim)
    hosts("start", victim, CPUS="1", **HEAD_MAY_GO, **AS_ON_OWN_HOSTS)
    phases = {name: after - before for name, before, after in zip(PHASES, moments, moments[1:], strict=False)}
    return {**phases, "total": moments[-1] - killed_at, "repeated_s": started["repeated_s"]}


def _records(run: Path, name: str) -> list[dict[str, Any]]:
    from orchestrator.telemetry.records import read

    return read(run / name) if (run / name).exists() else []


def report(kills: list[dict[str, float]], cuts: list[dict[str, float]], options: str) -> str:
    """Return the result as Markdown."""
    head = (
        f"# From the loss of a host to the next step\n\n{datetime.now(UTC).date()}. {len(os.sched_getaffinity(0))} "
        f"cores, shared by head, three hosts, two workers and the driver; load {os.getloadavg()[1]:.0f}.\n\n"
        f"`python benchmarks/host_kill.py {options}`\n"
    )
    names = [f"kill {number + 1}" for number in range(len(kills))] + [
        f"cut {number + 1}" for number in range(len(cuts))
    ]
    rows = [f"| s | {' | '.join(names)} | median of kills |", f"| --- {'| ---: ' * (len(names) + 1)}|"]
    for name, text in {**PHASES, "total": "**to the next step**", "repeated_s": "work lost"}.items():
        values = [each[name] for each in kills + cuts]
        middle = statistics.median(kill[name] for kill in kills)
        rows.append(f"| {text} | {' | '.join(f'{value:.1f}' for value in [*values, middle])} |")
    total, most = statistics.median(kill["total"] for kill in kills), max(kill["repeated_s"] for kill in kills)
    last = (
        f"Killed: median {total:.1f} s; wanted under {TARGET_S:.0f} s: {'met' if total < TARGET_S else 'missed'}. Work "
        f"lost: at most {most:.1f} s of steps; wanted at most the {INTERVAL_S:.0f} s of a checkpoint interval: "
        f"{'met' if most <= INTERVAL_S else 'missed'}."
    )
    return "\n".join([head, *rows, "", last])


if __name__ == "__main__":
    sys.exit(main())
