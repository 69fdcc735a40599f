"""What the machine refuses before a run begins: one line with the remedy, status 2, no traceback."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launched import Server, Variables, tiny


class Hidden:
    """Every finder of modules, but for one package: as if it were not installed."""

    def __init__(self, finder: Any, package: str) -> None:
        self._finder, self._package = finder, package

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, *more: Any) -> Any:
        return None if name.partition(".")[0] == self._package else self._finder.find_spec(name, *more)


def without_tensorboard() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        del sys.modules[name]
    sys.meta_path[:] = [Hidden(finder, "tensorboard") for finder in sys.meta_path]


def refused(server: Server, cache: Path, folder: Path, prepare: Callable[[], None], *more: str) -> str:
    run = server.launch(1, tiny(cache, folder, "run", *more), folder / "logs", prepare)
    assert run.wait() == {0: 2}, run.log(0)
    assert "Traceback" not in run.log(0)
    assert not (folder / "run").exists()
    (line,) = [line for line in run.log(0).splitlines() if line.startswith("error: ")]
    return line


def test_a_port_in_use(server: Server, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a traceback of torch's store where two runs of one machine were started with one port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refused(server, embedded_cache, tmp_path, Variables(MASTER_PORT=port))
    assert f"127.0.0.1:{port}, but that port is in use by another program or run; choose another one" in line


def test_a_first_process_that_is_not_there(server: Server, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a traceback on every other node where the first one did not start."""
    alone = Variables(RANK="1", WORLD_SIZE="2", MASTER_PORT="1")
    line = refused(server, embedded_cache, tmp_path, alone, "parallel.distributed_timeout_minutes=0.05")
    assert line.startswith("error: rank 1: the processes are to meet at 127.0.0.1:1 (MASTER_ADDR, MASTER_PORT)")


def test_tensorboard_is_missing(server: Server, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a run that is built for minutes and then ends with ModuleNotFoundError."""
    line = refused(server, embedded_cache, tmp_path, without_tensorboard, "training.tensorboard=true")
    assert "training.tensorboard: expected the package tensorboard, found none; pip install tensorboard, or set" in line


def test_what_a_resumed_run_compares(server: Server, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a run that goes on with other code, or on other tokens, than it began with, and says nothing."""
    cache = Path(shutil.copytree(embedded_cache, tmp_path / "cache"))
    arguments = tiny(cache, tmp_path, "run", "training.train_steps=2")
    first = server.launch(1, arguments, tmp_path / "logs1")
    assert first.wait() == {0: 0}, first.log(0)
    assert "verified" not in first.log(0)
    marker = tmp_path / "run/checkpoints/step_00000002/complete.json"
    saved = json.loads(marker.read_text())
    marker.write_text(json.dumps(saved | {"source": "0123456789abcdef"}))
    again = server.launch(1, [*arguments, "--resume"], tmp_path / "logs2")
    assert again.wait() == {0: 0}, again.log(0)
    assert "was saved by other code of megatron_opus (source 0123456789abcdef, now " in again.log(0)
    assert "verified the contents of the data: 0.00 GiB" in again.log(0)
    assert "verified the contents of step_00000002: 0.00 GiB" in again.log(0)
    damaged = max(cache.rglob("*.bin"), key=lambda path: path.stat().st_size)
    with damaged.open("r+b") as stream:
        stream.write(b"\1\1\1\1")
    other = server.launch(1, [*arguments, "--resume"], tmp_path / "logs3")
    assert other.wait() == {0: 2}, other.log(0)
    assert f"error: {damaged}: its contents are not those that manifest.json records" in other.log(0)
