"""Runs that are disturbed, and how they are compared with an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from launched import VOLATILE, Launched, Server, tiny

from megatron_opus.runs.checkpoints import complete
from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

STEPS, INTERVAL = 24, 2
# Returned candidates, proxy momentum and dropout: a checkpoint of all the state that there is
ALL_STATE = (
    *("model.hidden_dropout=0.1", "data.unselected=return", "selection.proxy_momentum=0.9"),
    *("selection.sketch.alignment=features", "selection.preconditioner.refresh_every=3"),
    *(f"training.train_steps={STEPS}", f"training.checkpoint_interval={INTERVAL}", "training.eval_interval=6"),
    "parallel.distributed_timeout_minutes=3",  # a rank that gets no processor for a while is not a lost one
)


class Arena:
    """Starts runs of one recipe on two ranks, and knows how the undisturbed one went."""

    def __init__(self, server: Server, cache: Path, folder: Path, *more: str) -> None:
        self._server, self._cache, self._folder, self._more = server, cache, folder, more
        self._starts = 0
        whole = self.start("whole", resume=False)
        assert whole.wait() == {0: 0, 1: 0}, whole.log(0)
        self._rows, self._ledger = record(whole.run_dir)

    def start(
        self,
        name: str,
        *,
        resume: bool,
        runs: Path | None = None,
        more: tuple[str, ...] = (),
        prepare: Callable[[], None] | None = None,
    ) -> Launched:
        arguments = tiny(self._cache, runs or self._folder, name, *ALL_STATE, *self._more, *more)
        self._starts += 1
        logs = self._folder / "logs" / str(self._starts)
        return self._server.launch(2, [*arguments, *(["--resume"] if resume else [])], logs, prepare)

    def finish(self, run_dir: Path, *, more: tuple[str, ...] = ()) -> Launched:
        """Resume to the end. The record is then that of the undisturbed run, every row once and to the last bit."""
        last = self.start(run_dir.name, resume=True, runs=run_dir.parent, more=more)
        assert last.wait() == {0: 0, 1: 0}, last.log(0)[-3000:]
        self.same(run_dir)
        return last

    def same(self, run_dir: Path) -> None:
        rows, ledger = record(run_dir)
        assert rows == self._rows
        assert ledger.equals(self._ledger)

    def same_until_checkpoint(self, run_dir: Path) -> int:
        """What the newest checkpoint stands for is on disk, as in the undisturbed run; the step of the checkpoint."""
        found = complete(run_dir / "checkpoints")
        step = int(found[-1].name.removeprefix("step_").partition(".")[0]) if found else 0
        rows = [strip(row) for row in read_metrics(run_dir) if row["step"] < step]
        assert rows == self._rows[:step]
        ledger = read_ledger(run_dir / "ledger", complete=False) if step else self._ledger.slice(0, 0)
        assert ledger.filter(pc.field("step") < step).equals(self._ledger.filter(pc.field("step") < step))
        return step


def strip(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in VOLATILE}


def record(run_dir: Path) -> tuple[list[dict[str, Any]], Any]:
    return [strip(row) for row in read_metrics(run_dir)], read_ledger(run_dir / "ledger")


class KillAtFileEvent:
    """Ends its process by SIGKILL at its n-th file event (opened, renamed, removed, made) below a folder's `what`.

    The interpreter tells of each one just before it happens (PEP 578), so the moment is the same in every run.
    """

    def __init__(self, rank: int, number: int, what: str) -> None:
        self._rank, self._number, self._what = rank, number, what

    def __call__(self) -> None:
        if os.environ["RANK"] != str(self._rank):
            return
        left = self._number

        def hook(event: str, values: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and self._what in str(values[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own of so many kilobytes at `folder`. Raises PermissionError for a user who cannot mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise PermissionError(mounted.stderr)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
