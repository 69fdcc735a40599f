"""One writer for a run folder, and what a resumed run is told of its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opus.runs import processes
from megatron_opus.runs.lock import LOCK_FILE, RunLock, RunLocked

HOLD = """
import sys; from pathlib import Path; from megatron_opus.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1])); lock.acquire(); print("held", flush=True); sys.stdin.read()
"""


def holder(run_dir: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    """Guards against two processes that write one metrics file, and a killed one that locks its run for ever."""
    first = holder(tmp_path)
    with pytest.raises(
        RunLocked, match=f"is being written: expected no other process in it, found process {first.pid} on"
    ):
        RunLock(tmp_path).acquire()
    first.kill()
    first.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(RunLocked, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


def changed(run_dir: Path, **values: object) -> None:
    """The lock of a living process of this host, with other facts in it."""
    lock = RunLock(run_dir)
    lock.acquire()
    path = run_dir / LOCK_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "process {pid} on host {host}"),
        ({"started": 1}, None),  # the number belongs to another process now
        ({"boot": "an earlier one"}, None),
        ({"host": "elsewhere"}, "on host elsewhere since .*, which cannot be asked from {host}"),
        ({"namespace": "pid:[1]"}, "in another container"),
        ({"host": "elsewhere", "job": "7", "restart": "0"}, None),  # Slurm has started the job again, on another node
        ({"host": "elsewhere", "job": "6", "restart": "0"}, "on host elsewhere"),
        ({"host": "elsewhere", "job": "7", "restart": "1"}, "on host elsewhere"),  # two steps of one start
        ({"more": ""}, "a lock that says nothing of its process"),
    ],
)
def test_whose_lock_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], found: str | None
) -> None:
    """Guards against a lock that outlives its machine, and against one that is taken from a writer out of sight."""
    changed(tmp_path, **values)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if found is None:
        RunLock(tmp_path).acquire()
        assert os.listdir(tmp_path) == [LOCK_FILE]
        return
    with pytest.raises(RunLocked, match=found.format(pid=os.getpid(), host=os.uname().nodename)) as refused:
        RunLock(tmp_path).acquire()
    assert f"remove {tmp_path / LOCK_FILE}" in str(refused.value)


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    """Guards against two starts that both take over what a killed run has left."""
    changed(tmp_path, started=1)
    command = [sys.executable, "-c", HOLD.replace("lock.acquire()", "import time; time.sleep(0.3); lock.acquire()")]
    racers = [
        subprocess.Popen(
            [*command, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    said = [process.stdout.readline() for process in racers if process.stdout is not None]
    assert sorted(said) == [""] * 5 + ["held\n"]
    for process in racers:
        _, errors = process.communicate("")
        assert process.returncode in (0, 1)
        assert process.returncode == 0 or "is being written" in errors


def test_a_refused_start_leaves_no_folder_behind(tmp_path: Path) -> None:
    """Guards against an empty run folder of every start that was refused."""
    lock = RunLock(tmp_path / "runs" / "x")
    lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_zombie_has_ended(tmp_path: Path) -> None:
    """Guards against a run that cannot go on because nobody has asked for the end of the one before it."""
    process = subprocess.Popen(["true"])
    while processes.start_time(process.pid) is not None:
        pass
    assert Path(f"/proc/{process.pid}").exists()
    process.wait()


@pytest.mark.parametrize("how", ["pipe", "link", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, how: str) -> None:
    """Guards against a start that waits at a pipe, or that tries to take a link to nowhere for ever."""
    path = tmp_path / LOCK_FILE
    {"pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere"), "folder": path.mkdir}[how]()
    with pytest.raises(RunLocked, match="expected a file, found something else"):
        RunLock(tmp_path).acquire()


def test_an_empty_lock_is_taken_over(tmp_path: Path) -> None:
    """Guards against a process that was killed between making its lock and writing into it, whose run then waits for a
    user to remove a file."""
    (tmp_path / LOCK_FILE).touch()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == []
