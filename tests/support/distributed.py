"""Run a function on several gloo processes under plain pytest.

Workers are forked from a server that has imported torch, megatron-core and deepspeed once, which takes seconds; they
serve several calls, each of which runs one module-level function on all ranks. The rendezvous port is bound to 0 by the
parent's store, so that no two runs can meet. A rank that raises fails the test with its own traceback; ranks that wait
for a lost one are stopped when the call's time is over, and the next call gets a fresh pool. So it does when the
workers have gathered MAX_THREADS: every gloo group that somebody still refers to keeps a thread that wakes a hundred
times a second, and a thousand of them make two cores slow.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch.distributed as dist
import torch.multiprocessing as mp

SUPPORT = Path(__file__).resolve().parent
PRELOAD = ["preloaded"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}  # read when torch is imported
MAX_THREADS = 100
GRACE_SECONDS = 20.0  # after one rank has failed, the others get this long to fail by themselves


class DistributedFailure(AssertionError):
    """At least one rank raised or did not answer in time."""


def _worker(rank: int, world_size: int, port: int, timeout: float, connection: Connection) -> None:
    os.environ.update(
        ENVIRONMENT,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    if missing := [name for name in PRELOAD if name not in sys.modules]:
        raise RuntimeError(f"expected ranks forked from a server that has imported {PRELOAD}, got {missing} missing")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        function, args, kwargs = task
        try:
            answer = ("ok", function(*args, **kwargs))
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send((*answer, psutil.Process().num_threads()))


def _start_server(context: Any) -> None:
    """It keeps the environment it is started in: what torch reads when it is imported is set for that moment.

    So is PYTHONPATH: before Python 3.13.1 a server of forks does not get the path of its parent, and says nothing of
    what it could not import.
    """
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=path.rstrip(os.pathsep)):
        context.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()


class DistributedPool:
    """`world_size` spawned gloo processes that stay alive between calls."""

    def __init__(self, world_size: int, timeout: float = 300.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._store: dist.TCPStore | None = None

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("forkserver")
        _start_server(context)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, self.world_size, self._store.port, self.timeout, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on every rank; the results in rank order. Raises DistributedFailure."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args, kwargs))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        threads = 0
        deadline = time.monotonic() + self.timeout
        pending = dict(enumerate(self._connections))
        while pending and time.monotonic() < deadline:
            for ready in wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic())):
                rank = next(r for r, c in pending.items() if c is ready)
                del pending[rank]
                try:
                    status, value, held = ready.recv()  # type: ignore[union-attr]
                    threads = max(threads, held)
                except EOFError:
                    status, value = "error", "the process died without a traceback"
                if status == "ok":
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if errors or pending:
            self.close()
            silent = f"\nno answer from ranks {sorted(pending)}" if pending else ""
            raise DistributedFailure("\n".join(f"rank {r}:\n{e}" for r, e in sorted(errors.items())) + silent)
        if threads > MAX_THREADS:
            self.close()
        return [results[r] for r in range(self.world_size)]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._processes, self._connections, self._store = [], [], None
