"""A run that is killed again and again ends exactly where an undisturbed one does."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_opus.data.ledger import read_ledger
from megatron_opus.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL = 26, 4
KILLS = 5
VOLATILE = {"score_seconds", "choose_seconds", "step_seconds", "memory_bytes"}


def command(cache: Path, runs: Path, name: str, *more: str) -> list[str]:
    """Two data-parallel ranks with ZeRO 1, returned candidates, proxy momentum and dropout: all state there is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        str(Path(sys.executable).parent / "deepspeed"),
        *("--num_gpus", "2", "--master_port", str(port), str(ROOT / "launch/pretrain_gpt2_tiny.sh")),
        *(f"name={name}", f"output_dir={runs}", f"data.cache_dir={cache}"),
        *("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.hidden_dropout=0.1"),
        *("data.seq_length=32", "data.unselected=return", "selection.score_length=32", "selection.proxy_momentum=0.9"),
        "selection.sketch.alignment=features",
        *("training.global_batch_size=4", "training.micro_batch_size=2", "selection.proxy_batch_size=4"),
        *(
            f"training.train_steps={STEPS}",
            f"training.checkpoint_interval={INTERVAL}",
        ),
        *("training.eval_interval=6", "training.eval_sequences=2", "selection.preconditioner.refresh_every=3"),
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def kill_at(process: subprocess.Popen[str], folder: Path, rows: int, delay: float) -> None:
    """SIGKILL to the launcher and all ranks once `rows` steps are recorded, and a little later."""
    deadline = time.monotonic() + 240
    while len(read_metrics(folder)) < rows:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def comparable(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(folder)]


def test_killed_runs_resume_exactly(embedded_cache, tmp_path):
    """Fault: a position, a generator, the proxy average or a returned candidate missing from the checkpoint; rows of
    metrics or ledger twice or lost. Killed with SIGKILL at five random points, among them before the first checkpoint.
    """
    finish(start(command(embedded_cache, tmp_path, "whole")))
    chance = random.Random(7)
    points = [2, *sorted(chance.sample(range(INTERVAL + 1, STEPS - 1), KILLS - 1))]
    resume: list[str] = []
    for rows in points:
        process = start(command(embedded_cache, tmp_path, "killed", *resume))
        kill_at(process, tmp_path / "killed", rows, chance.uniform(0, 0.06))
        resume = ["--resume"]
    said = finish(start(command(embedded_cache, tmp_path, "killed", *resume)))
    assert "resumed from" in said
    whole, killed = comparable(tmp_path / "whole"), comparable(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(STEPS))
    assert killed == whole
    first, second = (read_ledger(tmp_path / name / "ledger") for name in ("whole", "killed"))
    assert first.num_rows == STEPS * 8
    assert first.equals(second)
