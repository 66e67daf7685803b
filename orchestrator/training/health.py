"""What a worker group finds out about itself before its first step: rates, memory, clock and disk of each rank.

All ranks measure at the same time, as they will train at the same time, and each learns the figures of all. What is
made of them is a pure function, so that all ranks come to the same findings.

1. Matrix products run for a fixed time and are counted: a mean, not the best, so that a device that is shared, hot or
   throttled shows. Ranks are told apart by it.
2. The all-reduce is one figure for the group: bytes x 2 (n - 1) / n / time, the "bus bandwidth" of nccl-tests
   (PERFORMANCE.md there), which is comparable to a link's whatever the number of ranks.
3. A slow link shows by pairs: each rank exchanges with its two neighbours on a ring, and the better of the two
   counts, so that next to a rank with a slow link nobody else is slow. On several nodes the ring goes from node to
   node with every link, for there the network is what is slow. Two ranks share their only link: it says nothing about
   which of them it is.
4. Clocks are read right after a barrier. What differs by less than a barrier takes, milliseconds, is not seen.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from orchestrator.config import HealthConfig
from orchestrator.errors import UnhealthyNodeError

__all__ = ["Figures", "Finding", "Health", "examine", "judge", "leave_slow_node", "measures_rates", "rounds"]

GIB = 2**30
MATMUL_S = 0.3
"""For how long matrix products run; each rank's own device, or CPU threads."""
SIDE = {"cpu": 384, "cuda": 4096}
MESSAGE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
ROUNDS = 3
READINGS = 3


@dataclass(frozen=True)
class Figures:
    """What one rank measured. Rates are None where they were not; a clock's offset is to the median of all."""

    rank: int
    node: str
    host: str
    device: str
    memory_free_bytes: int
    """Of the accelerator; of the host where the device is its CPU."""
    disk_free_bytes: int
    """Where checkpoints, or what this machine keeps of them, go."""
    clock_offset_s: float
    matmul_flops_per_s: float | None = None
    link_bytes_per_s: float | None = None
    all_reduce_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Finding:
    """Something that a person should hear of: what, of which rank on which node, and in words with the remedy."""

    kind: Literal["slow", "clock", "disk"]
    rank: int
    node: str
    text: str


@dataclass(frozen=True)
class Health:
    """The figures of all ranks, by rank, what was found, and how long that took in s."""

    ranks: tuple[Figures, ...]
    findings: tuple[Finding, ...]
    took_s: float

    def to_dict(self) -> dict[str, Any]:
        """As a line of ``health.jsonl``."""
        return asdict(self)


def measures_rates(config: HealthConfig, *, device: str, nodes: int) -> bool:
    """Whether rates are worth their time: on accelerators and on several nodes, unless the config says."""
    return config.rates if config.rates != "auto" else device != "cpu" or nodes > 1


def examine(device: torch.device, folder: Path, config: HealthConfig, *, nodes: Sequence[str]) -> Health:
    """Measure this rank, gather what all ranks measured, and judge it. All ranks call it.

    ``folder`` is where checkpoints go on this machine; ``nodes`` names each rank's node.
    """
    began = time.monotonic()
    rates: dict[str, float | None] = {}
    if measures_rates(config, device=device.type, nodes=len(set(nodes))):
        rates["matmul_flops_per_s"] = _matmul_flops_per_s(device)
        if dist.get_world_size() > 1:
            rates["all_reduce_bytes_per_s"] = _all_reduce_bytes_per_s(device)
            rates["link_bytes_per_s"] = _link_bytes_per_s(device, nodes)
    mine = Figures(
        rank=dist.get_rank(),
        node=nodes[dist.get_rank()],
        host=socket.gethostname(),
        device=str(device),
        memory_free_bytes=_memory_free_bytes(device),
        disk_free_bytes=shutil.disk_usage(folder).free,
        clock_offset_s=_clock_offset_s(),
        **rates,
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return Health(tuple(everyone), judge(everyone, config), time.monotonic() - began)


def leave_slow_node(found: Health, spare: Callable[[], Collection[str]], tell: Callable[[str, str], None]) -> None:
    """End this group if a rank is slow and the run has room without its node. All ranks call it.

    ``spare`` names the nodes without any one of which there is room, and is asked on rank 0; ``tell`` records an event.

    Raises:
        UnhealthyNodeError: on the rank whose node is to be left; the others wait until they are ended.
    """
    slow = [finding for finding in found.findings if finding.kind == "slow"]
    if not slow:
        return
    room: list[Any] = [spare() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(room, src=0)
    leaving = next((finding for finding in slow if finding.node in room[0]), None)
    if leaving is None:
        tell("health_no_room", f"there is no room without node {slow[0].node}: going on with it")
        return
    if leaving.rank == dist.get_rank():
        raise UnhealthyNodeError(leaving.text, leaving.node)
    dist.barrier()


# -- judging -----------------------------------------------------------------------------------


def judge(ranks: Sequence[Figures], config: HealthConfig) -> tuple[Finding, ...]:
    """What in the figures of all ranks a person should hear of, by kind and rank.

    A rank is slow that has less than ``slow_factor`` of what the median rank has: at most half of them can be.
    """
    return (*_slow(ranks, config), *_clocks(ranks, config), *_disks(ranks, config))


def _slow(ranks: Sequence[Figures], config: HealthConfig) -> list[Finding]:
    behind: dict[int, list[str]] = {}
    _below(ranks, config, lambda one: one.matmul_flops_per_s, "{:.3g} FLOP/s in matrix products", behind)
    if len(ranks) > 2:  # the link of two is that of both
        _below(ranks, config, lambda one: one.link_bytes_per_s, "{:.3g} byte/s to its neighbours", behind)
    if all(one.device != "cpu" for one in ranks):  # a host's memory is shared by whatever else runs there
        _below(ranks, config, lambda one: one.memory_free_bytes, "{:.3g} bytes of free device memory", behind)
    return [
        Finding("slow", rank, ranks[rank].node, f"{_where(ranks[rank])} is far behind the others: {'; '.join(texts)}")
        for rank, texts in sorted(behind.items())
    ]


def _below(
    ranks: Sequence[Figures],
    config: HealthConfig,
    value_of: Callable[[Figures], float | None],
    words: str,
    behind: dict[int, list[str]],
) -> None:
    """Add to ``behind``, by rank, what is said of those below their share of the median."""
    values = {one.rank: value for one in ranks if (value := value_of(one)) is not None}
    if not values:
        return
    median = statistics.median_high(values.values())
    for rank, value in values.items():
        if value < config.slow_factor * median:
            said = f"{words.format(value)}, where {median:.3g} are the median"
            behind.setdefault(rank, []).append(said)


def _clocks(ranks: Sequence[Figures], config: HealthConfig) -> list[Finding]:
    return [
        Finding(
            "clock",
            one.rank,
            one.node,
            f"the clock of {_where(one)} is {abs(one.clock_offset_s):.1f} s {_side(one)} the others': records carry "
            "wrong times, and S3 refuses requests from 15 minutes on: synchronise it (chrony, NTP)",
        )
        for one in _of_each_host(ranks)
        if abs(one.clock_offset_s) > config.max_clock_skew_s
    ]


def _disks(ranks: Sequence[Figures], config: HealthConfig) -> list[Finding]:
    return [
        Finding(
            "disk",
            one.rank,
            one.node,
            f"{one.disk_free_bytes / GIB:.1f} GiB of disk are left for checkpoints on {_where(one)}: make room, or "
            "name another place with checkpoint.uri or, for runs in S3, ORCHESTRATOR_CACHE",
        )
        for one in _of_each_host(ranks)
        if one.disk_free_bytes < config.min_free_disk_gib * GIB
    ]


def _of_each_host(ranks: Sequence[Figures]) -> list[Figures]:
    """The lowest rank of each node: its clock and disk are those of all ranks there."""
    return list({one.node: one for one in reversed(ranks)}.values())[::-1]


def _where(one: Figures) -> str:
    return f"rank {one.rank} (node {one.node}, host {one.host})"


def _side(one: Figures) -> str:
    return "ahead of" if one.clock_offset_s > 0 else "behind"


# -- measuring ---------------------------------------------------------------------------------


def _matmul_flops_per_s(device: torch.device) -> float:
    """FLOP/s of square matrix products, in bf16 on accelerators and fp32 on CPUs."""
    side = SIDE["cpu" if device.type == "cpu" else "cuda"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.ones((side, side), dtype=dtype, device=device)
    out = torch.empty_like(a)

    _multiply(a, out, device)  # kernels and threads are there
    dist.barrier()
    began, done = time.perf_counter(), 0
    while (took_s := time.perf_counter() - began) < MATMUL_S or done == 0:
        _multiply(a, out, device)
        done += 1
    del a, out
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine finds the memory as it was
    return done * 2.0 * side**3 / took_s


def _multiply(a: torch.Tensor, out: torch.Tensor, device: torch.device) -> None:
    torch.matmul(a, a, out=out)
    _wait_for(device)


def _all_reduce_bytes_per_s(device: torch.device) -> float:
    tensor, ranks = _message(device), dist.get_world_size()
    took_s = _mean_s(functools.partial(dist.all_reduce, tensor), device)
    return tensor.numel() * 4 * 2 * (ranks - 1) / ranks / took_s


def _link_bytes_per_s(device: torch.device, nodes: Sequence[str]) -> float:
    """The better of the exchanges with this rank's neighbours."""
    sent, received = _message(device), _message(device)
    found = []
    for pairs in rounds(nodes):
        dist.barrier()
        for other in _partners(pairs):
            took_s = _mean_s(functools.partial(_exchange, sent, received, other), device)
            found.append(sent.numel() * 4 / took_s)
    return max(found)


def _exchange(sent: torch.Tensor, received: torch.Tensor, other: int) -> None:
    both = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def rounds(nodes: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks that exchange at the same time, round by round: together they are a ring over all ranks.

    ``nodes`` names each rank's node. Neighbours are on different nodes, as far as each node has as many ranks.
    """
    before = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
    ring = sorted(range(len(nodes)), key=lambda rank: (before[rank], rank))
    links = list(itertools.pairwise(ring))
    closing = [(ring[-1], ring[0])] if len(ring) > 2 else []
    found = [links[0::2], links[1::2]]
    found.append(closing) if len(ring) % 2 else found[1].extend(closing)
    return [pairs for pairs in found if pairs]


def _partners(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """This rank's partner in a round, if it has one."""
    rank = dist.get_rank()
    return [second if first == rank else first for first, second in pairs if rank in (first, second)]


def _mean_s(act: Callable[[], Any], device: torch.device) -> float:
    act()  # connections are made
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        act()
    _wait_for(device)
    return (time.perf_counter() - began) / ROUNDS


def _message(device: torch.device) -> torch.Tensor:
    size = MESSAGE_BYTES["cpu" if device.type == "cpu" else "cuda"]
    return torch.zeros(size // 4, device=device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory_free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _clock_offset_s() -> float:
    """How far this rank's clock is ahead of the median rank's."""
    offsets = []
    for _ in range(READINGS):
        dist.barrier()
        clocks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(clocks, time.time())
        offsets.append(clocks[dist.get_rank()] - statistics.median_low(clocks))
    return float(statistics.median(offsets))
