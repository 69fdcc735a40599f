"""The unmodified `pretrain_gpt.py` of checkouts of Megatron-LM: MEGATRON_LM=/path/one:/path/two names them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from megatron_lm_runs import CPU, DISTRIBUTED, SELECTION, TINY

from megatron_opus.runs.ledger import read_ledger

ROOT = Path(__file__).resolve().parents[2]
CHECKOUTS = [Path(path) for path in os.environ.get("MEGATRON_LM", "").split(":") if path]
_LINE = re.compile(r"iteration +(\d+)/ .*lm loss: (\S+) \|.*grad norm: (\S+) \|")


def train(checkout: Path, folder: Path, *more: str, world: int = 1) -> dict[str, tuple[str, str]]:
    """Run it on `world` processes; iteration -> (loss, gradient norm) as printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ("torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={port}")
    script = (str(ROOT / "tests/support/megatron_cpu.py"), str(checkout / "pretrain_gpt.py"))
    options = (
        *TINY,
        *CPU,
        "--mock-data",
        "--train-iters",
        "4",
        "--global-batch-size",
        "4",
        "--save",
        str(folder),
        *more,
    )
    path = ":".join((str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *script, *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {step: (loss, norm) for step, loss, norm in _LINE.findall(done.stdout)}


@pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM names no checkout of Megatron-LM")
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_an_unmodified_script_is_unchanged_and_selects(checkout: Path, tmp_path: Path) -> None:
    """Guards against a release whose script or functions are not those that the hook was written for."""
    settings = {}
    for name, rho in (("all", 1.0), ("half", 0.5)):
        settings[name] = tmp_path / f"{name}.yaml"
        settings[name].write_text(yaml.safe_dump({"selection": {**SELECTION, "rho": rho}}))
    alone = train(checkout, tmp_path / "alone")
    assert len(alone) == 4
    assert train(checkout, tmp_path / "all", f"--opus-config={settings['all']}") == alone
    drawn = []
    for name, world, more in (("one", 1, ()), ("two", 2, DISTRIBUTED)):
        train(checkout, tmp_path / name, f"--opus-config={settings['half']}", *more, world=world)
        table = read_ledger(tmp_path / name / "opus" / "ledger")
        drawn.append(table.filter(table["selected"])["sample_id"].to_pylist())
    assert len(drawn[0]) == 16
    assert drawn[1] == drawn[0]
