"""Ranks that are stopped for a while or for ever, and a launcher that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import ALL_STATE, Arena
from launched import PATIENCE, ROOT, Server, tiny

from megatron_opus.runs import processes
from megatron_opus.runs.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_a_rank_that_is_stopped_for_some_seconds(arena: Arena, tmp_path: Path) -> None:
    """Guards against a suspended node (SIGSTOP, then SIGCONT) that changes what is trained or ends the run."""
    run = arena.start("paused", resume=False, runs=tmp_path)
    run.reach(lambda: run.steps() >= 3)
    run.signal(1, signal.SIGSTOP)
    time.sleep(3)
    run.signal(1, signal.SIGCONT)
    assert run.wait() == {0: 0, 1: 0}, run.log(0)
    arena.same(tmp_path / "paused")


def test_a_rank_that_is_stopped_for_ever(arena: Arena, tmp_path: Path) -> None:
    """Guards against a run that waits for a hanging rank without end, and against one that has lost something by it."""
    soon = ("parallel.distributed_timeout_minutes=0.5",)
    run = arena.start("hanging", resume=False, runs=tmp_path, more=soon)
    run.reach(lambda: run.steps() >= 3)
    run.signal(1, signal.SIGSTOP)
    assert run.wait([0]) == {0: 1}
    assert "waited for other ranks while" in run.log(0)
    assert "Traceback" not in run.log(0)
    run.kill()
    arena.same_until_checkpoint(tmp_path / "hanging")
    arena.finish(tmp_path / "hanging")


def test_a_launcher_that_is_killed(server: Server, embedded_cache: Path, tmp_path: Path, whole: bool) -> None:
    """Guards against ranks that train on without their launcher, and against a run that has lost something by it.

    The ranks stop with a checkpoint at whatever step they are. A checkpoint ends what `refresh_every` keeps, so that
    only with 1 it may lie anywhere without a trace.
    """
    if not whole:
        pytest.skip("in the whole form: the real `deepspeed` imports everything anew, three times")
    each_step = "selection.preconditioner.refresh_every=1"
    arena = Arena(server, embedded_cache, tmp_path / "undisturbed", each_step)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = tiny(embedded_cache, tmp_path, "orphans", *ALL_STATE, each_step)
    command = ["deepspeed", "--num_gpus", "2", "--master_port", port, "launch/pretrain_gpt2_tiny.sh", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment.update(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    log = tmp_path / "log"
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    deadline = time.monotonic() + PATIENCE
    try:
        while len(read_metrics(tmp_path / "orphans")) < 2:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
    finally:
        launcher.kill()
        launcher.wait()
    while (tmp_path / "orphans/lock").exists():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    assert not [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path) in processes.command(int(p.name))]
    assert "is gone: stopping" in log.read_text()
    arena.same_until_checkpoint(tmp_path / "orphans")
    arena.finish(tmp_path / "orphans")
