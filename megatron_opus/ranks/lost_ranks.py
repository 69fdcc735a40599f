"""A rank that another one has left waiting ends within `parallel.distributed_timeout_minutes`, and says for what.

gloo raises in the rank that waits: at once when the other process is gone, after the time-out when it hangs. NCCL's
watchdog ends the process after the same time without giving Python a chance, so what the rank was doing is said
shortly before. Never run on NCCL so far.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

SOON = 0.9  # of the time-out: when a rank that makes no progress says what it is doing
ROLL_CALL_SECONDS = 3.0
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)


class Watch:
    """What this rank is doing, for messages. `now` is called at every change and costs nothing."""

    def __init__(self) -> None:
        self.doing = "starting"
        self._since = time.monotonic()

    def now(self, doing: str) -> None:
        self.doing, self._since = doing, time.monotonic()

    def start(self, timeout_seconds: float) -> None:
        """Say so when one thing takes almost as long as collectives may wait."""
        threading.Thread(target=self._watch, args=(timeout_seconds,), daemon=True, name="watch").start()

    def _watch(self, timeout: float) -> None:
        said = 0.0
        while True:
            time.sleep(min(5.0, timeout / 20))
            since, doing = self._since, self.doing
            if time.monotonic() - since > SOON * timeout and said != since:
                said = since
                print(
                    f"rank {os.environ.get('RANK', '0')}: has been {doing} for {time.monotonic() - since:.0f} s; if it "
                    f"waits for another rank, it will be ended after {timeout:.0f} s "
                    "(parallel.distributed_timeout_minutes)",
                    file=sys.stderr,
                    flush=True,
                )


def prepare_nccl() -> None:
    """Before the first process group: NCCL's watchdog is to end a process whose collective timed out or lost a peer,
    and to say which ranks had not joined. What the user has set stays."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ.setdefault("TORCH_NCCL_DESYNC_DEBUG", "1")


def set_timeouts(minutes: float) -> None:
    """Give every process group of this rank the configured time: libraries make some with defaults of half an hour."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a collective that other ranks did not answer."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def failure_message(error: Exception, doing: str, minutes: float, why: str = "") -> str:
    """What a failed rank says: its error, or `why` it failed, what it was doing, and which ranks have given no sign.

    Failing ranks leave a word in the rendezvous store and look for the others'; takes up to some seconds.
    """
    lost = is_lost_peer(error)
    waited = (
        f"waited for other ranks while {doing}, in vain (parallel.distributed_timeout_minutes is {minutes:g})"
        if lost
        else f"failed while {doing}"
    )
    said = why or f"{type(error).__name__}: {error}"
    message = f"{waited}: {said}"
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return message
    called = _roll_call(f"{'waited for others' if lost else said} while {doing}")
    return message if not called else f"{message}\n  {called}"


def _roll_call(word: str) -> str:
    """Which ranks have failed too and with which word, and which have given no sign of themselves."""
    rank, world = dist.get_rank(), dist.get_world_size()
    words: dict[int, str] = {}

    def call() -> None:
        store = dist.PrefixStore("failed", distributed_c10d._get_default_store())
        store.set(str(rank), word)
        # rank 0 keeps the store in most launches: it stays until the others have read
        deadline = time.monotonic() + ROLL_CALL_SECONDS * (2 if rank == 0 else 1)
        while len(words) < world - 1 and time.monotonic() < deadline:
            for other in range(world):
                if other != rank and other not in words and store.check([str(other)]):
                    words[other] = store.get(str(other)).decode()
            time.sleep(max(0.05, world / 500))
        if rank == 0:
            time.sleep(0.5)

    # in a thread: a store whose process is stopped does not answer, and its client waits for ever
    if not _within(call, 3 * ROLL_CALL_SECONDS):
        return "the rendezvous store, which rank 0 keeps in most launches, does not answer: look at rank 0 first"
    said = [f"rank {other}: {text[:300]}" for other, text in sorted(words.items())]
    silent = [other for other in range(world) if other != rank and other not in words]
    if silent:
        names = ", ".join(map(str, silent[:16])) + (f" and {len(silent) - 16} more" if len(silent) > 16 else "")
        said.insert(0, f"no sign of ranks: {names} (dead, stopped or hanging, or still waiting themselves)")
    return "\n  ".join(said[:16])


def _within(action: Callable[[], None], seconds: float) -> bool:
    """Whether `action` ended in so many seconds and without an error."""
    ended = threading.Event()
    failed: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            failed.append(error)
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    return ended.wait(seconds) and not failed
