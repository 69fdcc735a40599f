"""Two starts of one run: the second one is refused before it writes."""

from __future__ import annotations

import signal
from pathlib import Path

from launched import Server, tiny

from megatron_opus.runs.metrics import read_metrics

STEPS = ("training.train_steps=200", "training.checkpoint_interval=2")


def test_a_second_start_is_refused_while_the_first_one_trains(
    server: Server, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against two trainers that write one metrics file, ledger and checkpoint folder in turns; against a killed
    run that cannot be resumed for its lock; and against a record with a hole that is resumed without a word."""
    arguments = tiny(embedded_cache, tmp_path, "run", *STEPS)
    first = server.launch(2, arguments, tmp_path / "logs1")
    first.reach(lambda: first.steps() >= 3)
    for rank in range(2):
        first.signal(rank, signal.SIGSTOP)  # what changes now, the second one has changed
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    second = server.launch(2, [*arguments, "--resume"], tmp_path / "logs2")
    assert second.wait() == {0: 2, 1: 2}
    assert f"is being written: expected no other process in it, found process {first.pids[0]}" in second.log(0)
    assert "Traceback" not in second.log(0) + second.log(1)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    first.kill()

    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[1:]))
    again = server.launch(2, [*arguments, "--resume"], tmp_path / "logs3")
    again.reach(lambda: any(row["step"] > 6 for row in read_metrics(tmp_path / "run")))
    again.signal(0, signal.SIGTERM)
    assert again.wait() == {0: 75, 1: 75}
    assert "metrics.jsonl: 1 of " in again.log(0)
    assert "are missing: 0." in again.log(0)
    assert not (tmp_path / "run/lock").exists()
