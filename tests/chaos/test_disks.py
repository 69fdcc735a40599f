"""Disks that are full, read-only or gone: one line with the remedy, and nothing that a resumed run would miss."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import Arena, small_disk
from launched import Variables

from megatron_opus.runs.checkpoints import complete

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_disk(tmp_path / "disk", 64 * 1024) as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"only root can mount a file system to fill up: {error}")


def one_line(log: str) -> str:
    """The error, which is the only one; no traceback."""
    assert "Traceback" not in log, log[-3000:]
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    return line


def fill(folder: Path, left: int) -> Path:
    """A file that takes the space of a disk but for so many bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(folder).free - left)
    return ballast


@pytest.mark.parametrize("left", [4096, 150_000, 400_000])
def test_a_disk_that_is_full_while_training(arena: Arena, disk: Path, left: int, whole: bool) -> None:
    """Guards against a traceback, against a torn checkpoint that counts, and against a record with holes after it. What
    is left decides which file is cut short: the metrics, the ledger or one of the checkpoint's."""
    if not whole and left != 150_000:
        pytest.skip("in the whole form")
    run = arena.start("full", resume=False, runs=disk, more=("training.tensorboard=true",))
    run.reach(lambda: bool(complete(disk / "full/checkpoints")))
    ballast = fill(disk, left)
    assert run.wait([0]) == {0: 1}, run.log(0)
    assert "no space is left: free some, or move the folder" in one_line(run.log(0))
    run.wait()
    assert one_line(run.log(1))
    ballast.unlink()
    arena.same_until_checkpoint(disk / "full")
    arena.finish(disk / "full")


def test_a_disk_that_is_full_at_the_start(arena: Arena, disk: Path) -> None:
    """Guards against a run that is built for minutes before it finds that nothing can be written, and against an empty
    lock that stands in the way of the next start."""
    ballast = fill(disk, 0)
    run = arena.start("full", resume=False, runs=disk)
    assert run.wait() == {0: 2, 1: 2}
    assert "no space is left" in one_line(run.log(0))
    assert os.listdir(disk) == [ballast.name]


def test_a_temporary_folder_that_is_full(arena: Arena, disk: Path, tmp_path: Path) -> None:
    """Guards against a run that needs room in a folder which nobody has told of."""
    fill(disk, 0)
    run = arena.start("run", resume=False, runs=tmp_path, prepare=Variables(TMPDIR=str(disk)))
    assert run.wait() == {0: 0, 1: 0}, run.log(0)
    arena.same(tmp_path / "run")


def test_a_read_only_folder_and_one_that_is_a_file(arena: Arena, disk: Path) -> None:
    """Guards against a traceback where output_dir cannot be written."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run = arena.start("run", resume=False, runs=disk)
    assert run.wait() == {0: 2, 1: 2}
    assert "mounted read-only: write to another one" in one_line(run.log(0))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "file").touch()
    run = arena.start("run", resume=False, runs=disk / "file")
    assert run.wait() == {0: 2, 1: 2}
    assert "a part of this path is a file" in one_line(run.log(0))


def test_a_folder_that_vanishes(arena: Arena, tmp_path: Path) -> None:
    """Guards against a run that trains for days into a folder that is no longer there."""
    run = arena.start("gone", resume=False, runs=tmp_path)
    run.reach(lambda: run.steps() >= 3)
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    assert run.wait([0]) == {0: 1}, run.log(0)
    assert "it has vanished: was it moved or removed" in one_line(run.log(0))
    run.wait()
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    arena.same_until_checkpoint(tmp_path / "gone")
    arena.finish(tmp_path / "gone")
