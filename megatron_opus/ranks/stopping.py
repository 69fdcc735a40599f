"""Orderly stopping: a signal to any rank, or the end of the allotted time, ends the run after the current step.

All ranks agree on it (one number, reduced while the host writes its record), write a checkpoint and end with status 75
(EX_TEMPFAIL of sysexits.h: try again later), by which a batch script knows that `--resume` will go on. A second signal
ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

STOPPED = 75  # exit status of a run that was stopped in order
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_IS_UP = 1000  # larger than any signal number: the maximum over ranks is one reason
# Launchers pass a signal on that the terminal or the batch system has sent to their children too: that is still one.
SAME_SIGNAL_SECONDS = 1.0


class SignalWatch:
    """Notes the first of SIGNALS and ends the process, with status 128 + its number, at the second.

    A thread reads them, since Python's own handlers wait until the main thread comes back from a collective, which may
    be never. `install` only in the main thread of a process that belongs to the run.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0

    def install(self) -> None:
        read, write = socket.socketpair()
        write.setblocking(False)
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # without a handler the system would end the process
        threading.Thread(target=self._read, args=(read, write), daemon=True, name="signals").start()

    def ignore(self) -> None:
        """From here on the process ends by itself, and soon: nothing shall change its exit status."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _read(self, read: socket.socket, write: socket.socket) -> None:
        # `write` is held here: closed by the garbage collector, it would take the signals along
        while data := read.recv(64):
            for number in data:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if not self.received:
            self._first, self.received = now, number
            _say(f"{name}: stopping with a checkpoint after the current step; a second signal ends the run at once")
        elif now - self._first > SAME_SIGNAL_SECONDS:
            _say(f"{name} again: ending at once, without a checkpoint")
            os._exit(128 + number)


class StopAgreement:
    """Whether, and why, all ranks stop after this step. Collective over all ranks.

    requested: number of the signal that this rank has received, 0 for none. until: `time.monotonic()` at which the
    time is up on this rank.
    """

    def __init__(self, requested: Callable[[], int], until: float | None, device: torch.device | str) -> None:
        self._requested, self._until = requested, until
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._work: dist.Work | None = None

    def post(self) -> None:
        """Begin the reduction; what the host does until `agreed` hides it."""
        code = self._requested()
        if self._until is not None and time.monotonic() >= self._until:
            code = TIME_IS_UP
        self._flag.fill_(code)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)

    def agreed(self) -> str:
        """The reason to stop, the same on every rank; empty: go on."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        code = int(self._flag.item())
        if code == TIME_IS_UP:
            return "training.exit_duration_minutes are over"
        return signal.Signals(code).name if code else ""


def _say(text: str) -> None:
    """From a thread beside a main thread that may hold any lock: past Python's own buffers."""
    os.write(2, f"rank {os.environ.get('RANK', '0')}: {text}\n".encode())
