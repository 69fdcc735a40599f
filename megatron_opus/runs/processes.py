"""What Linux says of a process: when it started, who started it, with which command."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")


def start_time(pid: int) -> int | None:
    """Give the moment at which a process started, in clock ticks since the machine did; None where there is none.

    A number is given to another process sooner or later: only (pid, start time) names one. A process that has ended
    and whose end nobody has asked for yet (a zombie) counts as ended.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def parent(pid: int) -> int:
    """Give the process id of the parent, 0 where there is no such process."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[1])


def command(pid: int) -> list[str]:
    """Give the words of the command line, empty where there is no such process."""
    try:
        return (PROC / str(pid) / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str] | None:
    """Give the fields of proc(5)'s `stat` from the third on. (The second is a name, which may hold blanks.)"""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
