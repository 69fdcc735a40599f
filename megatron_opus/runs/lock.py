"""One writer for a run folder: the file `lock` in it names the process that writes, and a second one is refused.

The file is made with O_EXCL, which is atomic on local disks and on NFS (version 3 and later) alike. It outlives a
process that is killed, so whoever finds one looks whether its writer still lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opus.errors import Refusal
from megatron_opus.runs import processes

LOCK_FILE = "lock"
READ_SECONDS = 2.0  # within which a lock that has just been made gets its contents
EMPTY: Mapping[str, Any] = {"bytes": 0}  # what `_read` gives for a file that stays without contents


class RunLocked(Refusal, RuntimeError):
    """Another process writes this run folder, or one that cannot be asked from here."""


class RunLock:
    """Holds the run folder of one run for this process, from `acquire` to `release`."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._own: dict[str, Any] | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock. Makes the run folder where there is none.

        The lock of a process that has ended on this host is taken over, and so is one that an earlier start of the same
        Slurm job has left, on whichever host: Slurm ends a start before the next one.

        Raises RunLocked when another process holds it, or when its process cannot be asked from here.
        """
        run_dir = self._path.parent
        self._made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        own = _this_process()
        while True:
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._set_aside(own)
                continue
            try:
                with os.fdopen(descriptor, "w") as stream:
                    stream.write(json.dumps(own) + "\n")
            except OSError:  # a full disk: an empty lock would stand in the way of the next start
                self._path.unlink()
                self._remove_made()
                raise
            if _read(self._path) == own:  # else it took so long that another process set the empty file aside
                self._own = own
                return

    def release(self) -> None:
        """Give the lock back, if it is held, and remove the folders that `acquire` has made and nobody has used."""
        if self._own is None:
            return
        if _read(self._path) == self._own:
            self._path.unlink(missing_ok=True)
        self._remove_made()
        self._own = None

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is in use
                folder.rmdir()

    def _set_aside(self, own: dict[str, Any]) -> None:
        """Remove a lock whose writer has ended. Raises RunLocked for any other."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(self._path.lstat().st_mode):  # a pipe has no end, a link to nowhere can never be taken
                raise RunLocked(f"{self._path}: expected a file, found something else; move it away")
        held = _read(self._path)
        if held is None:
            return  # it has been released meanwhile
        if why := _why_held(held, own):
            raise RunLocked(
                f"{self._path.parent} is being written: expected no other process in it, found {why}. Wait for its "
                f"end, or choose another name with name=<new name>; if you know that it has ended, remove {self._path}"
            )
        # Of two that find the same stale lock, one moves it; what the other one moves may be the first one's new lock.
        aside = self._path.with_name(f"{LOCK_FILE}.{own['pid']}.{own['started']}.stale")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            if _read(aside) != held:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()


def _this_process() -> dict[str, Any]:
    return {
        "host": os.uname().nodename,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),  # containers of one host number their processes differently
        "pid": os.getpid(),
        "started": processes.start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _why_held(held: dict[str, Any], own: dict[str, Any]) -> str:
    """Say who holds a lock; empty when nobody does any more."""
    if held == EMPTY:
        return ""  # its writer was killed between making the file and writing into it
    if held.keys() != own.keys() or not isinstance(held["pid"], int):
        return "a lock that says nothing of its process"
    process = f"process {held['pid']} on host {held['host']} since {held['since']}"
    if held["job"] and held["job"] == own["job"] and held["restart"] != own["restart"]:
        return ""
    if held["host"] != own["host"]:
        return f"{process}, which cannot be asked from {own['host']}"
    if held["boot"] != own["boot"]:
        return ""  # the machine has started anew
    if held["namespace"] != own["namespace"]:
        return f"{process}, in another container, which cannot be asked from this one"
    return process if processes.start_time(held["pid"]) == held["started"] else ""


def _read(path: Path) -> dict[str, Any] | None:
    """Give the contents of a lock, {} where they make no sense, EMPTY for none; None where there is no lock."""
    deadline = time.monotonic() + READ_SECONDS
    while True:
        text = ""
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            found = json.loads(text)
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):  # it is being written, or its writer died in between
            if time.monotonic() > deadline:
                return {} if text else dict(EMPTY)
        time.sleep(0.05)
