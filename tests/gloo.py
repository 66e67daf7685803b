"""A group of real processes joined by gloo that runs functions, so that many tests share one start-up."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from ports import free_port

GRACE_S = 10.0
COLLECTIVE_S = 120.0


class GlooGroup:
    """``world_size`` processes; ``run`` calls a module-level function in all of them and returns what each returned.

    The processes start at the first call. A call that fails ends them, since the ranks may stand in different
    collectives, and the next call starts new ones.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return each rank's result; an exception of any rank is an ``AssertionError`` that shows it."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = self._answers()
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in sorted(answers.items()) if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.5)
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _answers(self) -> dict[int, tuple[bool, Any]]:
        """What each rank answered; once one has, the others get a while to do so too, and less once one has failed."""
        answers: dict[int, tuple[bool, Any]] = {}
        while waiting := [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]:
            failed = any(not ok for ok, _ in answers.values())
            ready = wait(waiting, timeout=GRACE_S if failed else COLLECTIVE_S if answers else None)
            if not ready:
                silent = {rank: (False, "no answer") for rank in range(self.world_size) if rank not in answers}
                return answers | silent
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"died with exit code {self._exit_code(rank)}")
        return answers

    def _exit_code(self, rank: int) -> int | None:
        self._processes[rank].join(GRACE_S)
        return self._processes[rank].exitcode  # type: ignore[no-any-return]


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    warnings.simplefilter("ignore")  # torch's and DeepSpeed's, once per step
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_S))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the group was closed
        while True:
            function, args = pipe.recv()
            try:
                answer = (True, function(*args))
            except BaseException:  # noqa: BLE001 - the test's own process raises it
                answer = (False, traceback.format_exc())
            pipe.send(answer)
            if not gc.get_freeze_count():
                # DeepSpeed collects garbage up to six times as it starts: not through all modules each time.
                gc.collect()
                gc.freeze()
