"""The Ray cluster a run uses: one that exists, or one embedded in the command that lives and dies with it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from orchestrator.errors import ClusterError
from orchestrator.launching.limits import Limits, container_limits, usable_cpus
from orchestrator.planning.cluster import ClusterShape

__all__ = ["RayCluster", "address_of", "embedded_shape"]

CONNECT_S = 5.0
# Ray reads these at import or start; what the user has set stays.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a job's relative paths mean what they mean on the command line
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# Of an embedded cluster alone; its processes inherit them, and so do the trials of a search.
EMBEDDED = "ORCHESTRATOR_EMBEDDED"
EMBEDDED_ENVIRONMENT = {
    EMBEDDED: "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this node away after notice
    "RAY_prestart_worker_first_driver": "0",  # Ray Train's processes have an environment of their own: these would idle
}


def address_of(address: str | None) -> str | None:
    """The existing cluster to use: as given, else ``RAY_ADDRESS``, else None for an embedded one."""
    return address or os.environ.get("RAY_ADDRESS") or None


def embedded_shape(limits: Limits | None = None) -> ClusterShape:
    """What an embedded cluster on this machine offers, without starting it; ``limits``: by default the container's."""
    limits = limits or container_limits()
    accelerators, name = _local_accelerators()
    return ClusterShape(
        nodes=1,
        cpus=float(usable_cpus(limits)),
        accelerators=accelerators,
        accelerator=name,
        memory_bytes=limits.memory_bytes or psutil.virtual_memory().total,
        device_memory_bytes=_local_device_memory() if accelerators else 0,
    )


class RayCluster:
    """A connection to Ray, made by ``connect`` and left by leaving its context."""

    def __init__(self, shape: ClusterShape, *, embedded: bool) -> None:
        self.shape = shape
        self.embedded = embedded

    @property
    def lasting(self) -> bool:
        """Whether it outlives the command: neither an embedded one nor that of the search of which this is a trial."""
        return not self.embedded and EMBEDDED not in os.environ

    @classmethod
    @contextlib.contextmanager
    def connect(cls, address: str | None, *, log: Path) -> Iterator[RayCluster]:
        """Connect to ``address``, or start an embedded cluster where it is None. Ray's own words go to ``log``.

        Raises:
            ClusterError: it cannot be reached; the message says how to look.
        """
        if address is not None:
            _check_reachable(address)
        _set_environment(embedded=address is None)
        import ray

        if address == "auto" and ray.is_initialized():
            # A trial of a search is connected already, and stays so.
            yield cls(_shape(), embedded=False)
            return
        with _noise_in(log):
            try:
                _init(address)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                where = f"the Ray cluster at {address}" if address else "an embedded Ray cluster"
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ClusterError(f"cannot use {where}: {first}; `orchestrator doctor` looks closer") from error
            try:
                yield cls(embedded_shape() if address is None else _shape(), embedded=address is None)
            finally:
                ray.shutdown()


def _init(address: str | None) -> None:
    import ray

    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        return
    shape = embedded_shape()
    ray.init(
        address="local",
        num_cpus=int(shape.cpus),
        num_gpus=shape.accelerators,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=256 * 2**20,
        _temp_dir=os.environ.get("RAY_TMPDIR") or str(Path(tempfile.gettempdir()) / "ray"),
    )


def _set_environment(*, embedded: bool) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not embedded:
        return
    for name, value in EMBEDDED_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on every interface and cannot be told otherwise. A fresh token for each embedded cluster, kept in
        # no file, means that nobody else can use it.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _shape() -> ClusterShape:
    import ray

    resources: Mapping[str, float] = ray.cluster_resources()
    names = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return ClusterShape(
        nodes=nodes,
        cpus=resources.get("CPU", 0.0),
        accelerators=int(resources.get("GPU", 0)),
        accelerator=sorted(names)[0] if names else "",
        memory_bytes=int(resources.get("memory", 0.0) / max(1, nodes)),
        tpus=int(resources.get("TPU", 0)),
    )


def _local_accelerators() -> tuple[int, str]:
    import torch

    if not torch.cuda.is_available():
        return 0, ""
    return torch.cuda.device_count(), torch.cuda.get_device_name(0).removeprefix("NVIDIA ").split(" ")[0].split("-")[0]


def _local_device_memory() -> int:
    import torch

    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def _check_reachable(address: str) -> None:
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address}: Ray Client is not supported; run on the cluster with `ray job submit --address "
            "http://HEAD:8265 --working-dir . -- python -m orchestrator run ...`"
        )
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ClusterError(f"address {address!r}: write it as HOST:PORT, as in 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): check the address, or leave "
            "--address and RAY_ADDRESS out to use this machine"
        ) from None


@contextlib.contextmanager
def _noise_in(log: Path) -> Iterator[None]:
    """Send what Ray prints and logs in this process to a file instead of the user's terminal.

    The run's own display holds the stream it was given before, and goes on writing to it.
    """
    logger = logging.getLogger("ray")
    before = list(logger.handlers)
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        logger.handlers = [logging.StreamHandler(stream)]
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield
        finally:
            logger.handlers = before
