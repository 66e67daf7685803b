"""What every test shares: a marked test that cannot run here is skipped, and says why; which run side by side."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import s3_server

# The machine is shared: how long an example takes, or is drawn, says nothing.
settings.register_profile("orchestrator", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("orchestrator")


RAY = "ray"
"""The queue of all files with tests that start Ray: two clusters on one machine take each other's ports."""
OWN_NETWORK = "tests/launching/test_hosts.py"
"""The only one whose clusters are in network and process namespaces of their own, so it may run beside that queue."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_what_cannot_run(items)
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = (RAY, OWN_NETWORK)  # the longest queues begin at once
        items.sort(key=lambda item: order.index(queue) if (queue := queue_of(item.path)) in order else len(order))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The queues of Ray's tests take longest: the others make way for them, whose workers Ray gives a nice of 15."""
    if "PYTEST_XDIST_WORKER" in os.environ and queue_of(item.path) not in (RAY, OWN_NETWORK) and any_ray(item.session):
        os.setpriority(os.PRIO_PROCESS, 0, 19)


@functools.cache
def any_ray(session: pytest.Session) -> bool:
    """Whether a test that starts Ray is among those that were asked for."""
    return any(item.get_closest_marker("ray") for item in session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes at once, as `make test` has it: one takes all that starts Ray, the others file after file."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return queue_of(config.rootpath / nodeid.partition("::")[0])

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


@functools.cache
def queue_of(file: Path) -> str:
    """The tests that run one after another with those of ``file``. By its text: who hands tests out collected none."""
    name = file.relative_to(Path(__file__).parents[1]).as_posix()
    return RAY if name != OWN_NETWORK and "mark.ray" in file.read_text() else name


def skip_what_cannot_run(items: Iterable[pytest.Item]) -> None:
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker, why_not in WHY_NOT.items():
            if item.get_closest_marker(marker) is None:
                continue
            if marker not in reasons:
                reasons[marker] = why_not()
            if reason := reasons[marker]:
                item.add_marker(pytest.mark.skip(reason=reason))


def no_gpu() -> str | None:
    import torch  # only when a test asks for a GPU: a second and a half that unit tests need not pay

    if torch.cuda.is_available():
        return None
    return f"no CUDA device here (torch {torch.__version__})"


WHY_NOT: dict[str, Callable[[], str | None]] = {"gpu": no_gpu, "s3": s3_server.no_weed}


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws from torch hangs on itself, not on the tests that this process ran before it."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Weed]:
    """A real S3 server with an empty bucket, for all tests of a session; its address is not in the environment."""
    server = s3_server.Weed(tmp_path_factory.mktemp("weed"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3(weed: s3_server.Weed) -> Iterator[s3_server.Weed]:
    """The server, with its address and credentials in the environment."""
    values = {"AWS_ENDPOINT_URL": weed.endpoint, "AWS_REGION": "us-east-1"}
    values |= {"AWS_ACCESS_KEY_ID": s3_server.KEY, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}
    with s3_server.environment(values):
        yield weed
