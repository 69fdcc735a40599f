"""Real runs of the trainer, one operating system process for each rank, that tests may signal, stop and kill.

The ranks start as under a launcher, through launch/start.py, but are forked from one process that has imported torch,
megatron-core and deepspeed already: that takes most of the time of a short run. Other programs are run in the same way.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from megatron_opus.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "pretrain_gpt2_tiny"
VOLATILE = {"score_seconds", "choose_seconds", "step_seconds", "step_cpu_seconds", "memory_bytes"}  # of equal runs
PATIENCE = 300.0  # seconds; a machine may be busy


def tiny(cache: Path, runs: Path, name: str, *more: str) -> list[str]:
    """Overrides for a run of a very small model: 8 candidates, 4 of them for each update."""
    return [
        *(f"name={name}", f"output_dir={runs}", f"data.cache_dir={cache}", "training.tensorboard=false"),
        *("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "data.seq_length=32"),
        *("training.global_batch_size=4", "training.micro_batch_size=2", "selection.proxy_batch_size=4"),
        *("training.eval_interval=0", "training.eval_sequences=2", "selection.score_length=32"),
        *more,
    ]


class Variables:
    """Environment variables of a rank, set before it begins: a `prepare` of Server.launch."""

    def __init__(self, **variables: str) -> None:
        self._variables = variables

    def __call__(self) -> None:
        os.environ.update(self._variables)


class Launched:
    """The ranks of one run: their process ids, logs and statuses."""

    def __init__(self, server: Server, pids: list[int], logs: list[Path], run_dir: Path) -> None:
        self._server, self.pids, self._logs, self.run_dir = server, pids, logs, run_dir
        self.statuses: dict[int, int] = {}  # rank -> exit status; negative: ended by that signal

    def log(self, rank: int) -> str:
        return self._logs[rank].read_text(encoding="utf-8", errors="replace")

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def wait(self, ranks: Sequence[int] | None = None, seconds: float = PATIENCE) -> dict[int, int]:
        """Statuses once all of `ranks` (all: None) have ended."""
        wanted = range(len(self.pids)) if ranks is None else ranks
        deadline = time.monotonic() + seconds
        while not all(rank in self.statuses for rank in wanted):
            self._poll()
            assert time.monotonic() < deadline, f"ranks {list(wanted)} did not end: {self._tails()}"
            time.sleep(0.05)
        return {rank: self.statuses[rank] for rank in wanted}

    def reach(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait for a condition while the run goes on."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._poll()
            assert not self.statuses, f"ended early: {self.statuses} {self._tails()}"
            assert time.monotonic() < deadline, self._tails()
            time.sleep(0.01)

    def steps(self) -> int:
        return len(read_metrics(self.run_dir))

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait()

    def _poll(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses and (status := self._server.ask("poll", pid)) is not None:
                self.statuses[rank] = status

    def _tails(self) -> str:
        return "\n".join(f"--- rank {r}:\n{self.log(r)[-3000:]}" for r in range(len(self.pids)))


def unused_port() -> int:
    """A port below those that a system gives out by itself, so that nothing takes it before the first rank listens."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.randrange(5000, 15000)))
            return int(free.getsockname()[1])


def trainer() -> None:
    """Import what takes the time of a short run of the trainer."""
    import preloaded  # noqa: F401


def train(arguments: list[str], recipe: str) -> int:
    """Run the trainer on this rank; its exit status. The arguments stand in `sys.argv` as well."""
    sys.path.insert(0, str(ROOT / "launch"))
    import start

    return start.start(recipe)


class Server:
    """Forks ranks that run `program`. One for all tests; `close` kills whatever is left."""

    def __init__(self, prepare: Callable[[], None] = trainer, program: Callable[[list[str], str], int] = train) -> None:
        """`prepare()` runs once, before any rank is forked; `program(arguments, recipe)` gives a rank's status."""
        self._connection, theirs = mp.get_context("spawn").Pipe()
        self._process = mp.get_context("spawn").Process(target=_serve, args=(theirs, prepare, program))
        self._process.start()
        theirs.close()
        self._started: list[Launched] = []

    def ask(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()

    def launch(
        self,
        world: int,
        arguments: list[str],
        logs: Path,
        prepare: Callable[[], None] | None = None,
        recipe: str = RECIPE,
    ) -> Launched:
        """`prepare` runs first on every rank, with RANK set: a fault to put in."""
        logs.mkdir(parents=True, exist_ok=True)
        port = str(unused_port())
        pids, files = [], []
        for rank in range(world):
            environment = {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            }
            files.append(logs / f"rank{rank}.log")
            pids.append(self.ask("fork", arguments, environment, str(files[-1]), prepare, recipe))
        values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        launched = Launched(self, pids, files, Path(values.get("output_dir", logs)) / values.get("name", ""))
        self._started.append(launched)
        return launched

    def close(self) -> None:
        for launched in self._started:
            launched.kill()
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, prepare: Callable[[], None], program: Callable[[list[str], str], int]) -> None:
    import torch

    torch.set_num_threads(1)
    prepare()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request[0] == "poll":
            pid, status = os.waitpid(request[1], os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
        else:
            pid = os.fork()
            if pid == 0:
                try:
                    _rank(program, *request[1:])
                finally:
                    os._exit(99)
            connection.send(pid)


def _rank(
    program: Callable[[list[str], str], int],
    arguments: list[str],
    environment: dict[str, str],
    log: str,
    prepare: Callable[[], None] | None,
    recipe: str,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    os.setsid()
    sys.argv = ["run", *arguments]
    if prepare is not None:
        prepare()
    os._exit(program(arguments, recipe))
