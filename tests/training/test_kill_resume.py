"""A run that is killed again and again ends exactly where an undisturbed one does."""

from __future__ import annotations

import random
import time

from launched import VOLATILE, tiny

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

STEPS, INTERVAL = 26, 4
KILLS, SHORT = 5, 3  # whole and short form
# Two data-parallel ranks with ZeRO 1, returned candidates, proxy momentum and dropout: all state there is
ALL_STATE = (
    *("model.hidden_dropout=0.1", "data.unselected=return", "selection.proxy_momentum=0.9"),
    *("selection.sketch.alignment=features", "selection.preconditioner.refresh_every=3"),
    *(f"training.train_steps={STEPS}", f"training.checkpoint_interval={INTERVAL}", "training.eval_interval=6"),
)


def test_killed_runs_resume_exactly(server, embedded_cache, tmp_path, whole):
    """Fault: a position, a generator, the proxy average or a returned candidate missing from the checkpoint; rows of
    metrics or ledger twice or lost. Killed with SIGKILL at random points, among them before the first checkpoint.
    """
    kills = KILLS if whole else SHORT
    straight = server.launch(2, tiny(embedded_cache, tmp_path, "whole", *ALL_STATE), tmp_path / "logs")
    assert straight.wait() == {0: 0, 1: 0}
    chance = random.Random(7)
    points = [2, *sorted(chance.sample(range(INTERVAL + 1, STEPS - 1), kills - 1))]
    arguments = tiny(embedded_cache, tmp_path, "killed", *ALL_STATE)
    for attempt, steps in enumerate(points):
        run = server.launch(2, arguments, tmp_path / f"logs{attempt}")
        run.reach(lambda run=run, steps=steps: run.steps() >= steps)
        time.sleep(chance.uniform(0, 0.06))
        run.kill()
        arguments = [*tiny(embedded_cache, tmp_path, "killed", *ALL_STATE), "--resume"]
    last = server.launch(2, arguments, tmp_path / "logs_last")
    assert last.wait() == {0: 0, 1: 0}
    assert "resumed from" in last.log(0)
    rows = [
        [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(run.run_dir)]
        for run in (straight, last)
    ]
    assert [row["step"] for row in rows[1]] == list(range(STEPS))
    assert rows[0] == rows[1]
    first, second = (read_ledger(run.run_dir / "ledger") for run in (straight, last))
    assert first.num_rows == STEPS * 8
    assert first.equals(second)
