"""Ranks whose launcher is gone: they stop, with a checkpoint, whichever process of the real `deepspeed` was ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import PATIENCE, ROOT, tiny

from megatron_opus.ranks.launchers import is_launcher
from megatron_opus.runs import processes
from megatron_opus.runs.checkpoints import complete
from megatron_opus.runs.metrics import read_metrics

TOOLS = Path(sys.executable).parent


def reach(condition: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if processes.parent(int(p.name)) == pid]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_stop_in_order_when_deepspeed_is_ended(embedded_cache: Path, tmp_path: Path, number: int) -> None:
    """Guards against ranks that train on for days after `kill` or the out-of-memory killer has ended `deepspeed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = tiny(embedded_cache, tmp_path, "run", "training.train_steps=100000", "training.checkpoint_interval=0")
    command = ["deepspeed", "--num_gpus", "2", "--master_port", port, "launch/pretrain_gpt2_tiny.sh", *arguments]
    log, run = tmp_path / "log", tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment.update(PATH=f"{TOOLS}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    ranks: list[int] = []
    try:
        reach(lambda: len(read_metrics(run)) >= 2, log)
        (middle,) = children(launcher.pid)
        ranks = children(middle)
        assert len(ranks) == 2
        launcher.send_signal(number)
        launcher.wait()
        reach(lambda: all(processes.start_time(pid) is None for pid in [middle, *ranks]), log)
    finally:
        for pid in (launcher.pid, *ranks):
            if processes.start_time(pid) is not None:
                os.kill(pid, signal.SIGKILL)
    text = log.read_text()
    # the first rank to see it stops the others, too
    assert f"its launcher (process {launcher.pid}) is gone: stopping" in text, text[-3000:]
    steps = len(read_metrics(run))
    assert [path.name for path in complete(run / "checkpoints")] == [f"step_{steps:08d}"]
    assert not (run / "lock").exists()


# A rank as launch/start.py makes one, as far as launchers go: it would go on for ten minutes.
RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from megatron_opus.ranks.launchers import watch_launchers
watch_launchers()
open({folder!r} + "/" + os.environ["RANK"], "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rank_ends_with_the_process_that_started_it(tmp_path: Path, wrapped: bool) -> None:
    """Guards against a watch over the `deepspeed` command alone: the process that it starts can be killed, too, and a
    shell script of the user's may stand between that one and the rank."""
    rank = tmp_path / "rank.py"
    (tmp_path / "pids").mkdir()
    rank.write_text(RANK.format(root=str(ROOT), folder=str(tmp_path / "pids")))
    script = tmp_path / "wrapped.sh"
    script.write_text(f"#!/bin/sh\n{sys.executable} {rank}\nexit 0\n")
    script.chmod(0o755)
    command = ["deepspeed", "--num_gpus", "2", *(["--no_python", str(script)] if wrapped else [str(rank)])]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        launcher = subprocess.Popen(
            command, env={**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}, stdout=stream, stderr=stream
        )
    pids: list[int] = []
    try:
        reach(lambda: len([p for p in (tmp_path / "pids").iterdir() if p.read_text()]) == 2, log)
        pids = [int(path.read_text()) for path in (tmp_path / "pids").iterdir()]
        (middle,) = children(launcher.pid)
        os.kill(middle, signal.SIGKILL)
        reach(lambda: all(processes.start_time(pid) is None for pid in pids), log)
    finally:
        for pid in (launcher.pid, *pids):
            if processes.start_time(pid) is not None:
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("/usr/bin/python3 /venv/bin/deepspeed --num_gpus 2 x.sh", True),
        ("python3 -u -m deepspeed.launcher.launch --world_info=e30= x.sh", True),
        ("python3 -m torch.distributed.run x.py", True),
        ("torchrun --nproc-per-node 8 x.py", True),
        ("slurmstepd: [12.0]", True),
        ("bash -c deepspeed_things.sh", False),
        ("-bash", False),
        ("python3 study.py --engine deepspeed", False),
    ],
)
def test_what_a_launcher_is(command: str, launches: bool) -> None:
    """Guards against a run under nohup that ends with the shell or the script that it was started from."""
    assert is_launcher(command.split()) == launches
