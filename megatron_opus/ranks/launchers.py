"""A rank whose launcher is gone stops, with a checkpoint: nobody would end it, and nobody knows that it trains on.

DeepSpeed's `deepspeed` command starts a second process, which starts the ranks; it passes no signal on, and neither of
the two can say anything when it is killed. So every rank watches all of them, and shells in between.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time

from megatron_opus.runs import processes

LOOK_SECONDS = 1.0
# As programs (`deepspeed`, `/usr/bin/torchrun`), as modules of `python -m`, and Slurm's process on each node.
PROGRAMS = frozenset({"deepspeed", "torchrun", "slurmstepd:", "mpirun", "mpiexec", "orted", "hydra_pmi_proxy"})
MODULES = frozenset({"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"})


def is_launcher(command: list[str]) -> bool:
    """Tell whether a command line is that of a launcher of ranks: `python3 /usr/bin/deepspeed x.sh` is one."""
    # The program is the first word, or the second where Python or a shell is the first.
    return any(os.path.basename(word) in PROGRAMS for word in " ".join(command[:2]).split()[:2]) or any(
        first == "-m" and second in MODULES for first, second in itertools.pairwise(command)
    )


def launchers() -> list[tuple[int, int]]:
    """Give (process id, start time) of every ancestor from this process's parent up to its topmost launcher.

    Empty where no launcher is among them: a rank that was started from a shell may outlive it.
    """
    found: list[tuple[int, int]] = []
    topmost, pid = 0, os.getppid()
    while pid > 1 and (started := processes.start_time(pid)) is not None:
        found.append((pid, started))
        if is_launcher(processes.command(pid)):
            topmost = len(found)
        pid = processes.parent(pid)
    return found[:topmost]


def watch_launchers() -> None:
    """Ask this process to stop, by SIGTERM, within some seconds after any of its launchers has ended.

    A thread looks at them. Linux's own notice (PR_SET_PDEATHSIG) tells of the parent alone, and not of the `deepspeed`
    command above it.
    """
    watched = launchers()
    if not watched:
        return

    def watch() -> None:
        while not (gone := [pid for pid, started in watched if processes.start_time(pid) != started]):
            time.sleep(LOOK_SECONDS)
        rank = os.environ.get("RANK", "0")
        os.write(2, f"rank {rank}: its launcher (process {gone[0]}) is gone: stopping\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launchers").start()
