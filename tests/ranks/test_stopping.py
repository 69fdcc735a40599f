"""Runs that are asked to stop, lose a rank or are left waiting: what they say, how they end, what is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from launched import VOLATILE, tiny

from megatron_opus.ranks.stopping import STOPPED
from megatron_opus.runs import checkpoints
from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.training import checkpoint

LONG = ("training.train_steps=100000", "optimizer.lr_decay_steps=40", "optimizer.min_lr=1e-4")
SHORT_WAIT = "parallel.distributed_timeout_minutes=0.5"


def rows(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(folder)]


def intact(folder: Path) -> Path:
    """The newest complete checkpoint, all of whose files are there."""
    path = checkpoints.latest(folder / "checkpoints")
    assert path is not None
    checkpoints.verify_files(path, checkpoints.read_marker(path))
    return path


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(server, embedded_cache, tmp_path):
    """Fault: preempted jobs lose everything since the last checkpoint; ranks that stop at different steps wait for each
    other for ever; a stopped run that goes on elsewhere than it stopped."""
    steps = ("training.train_steps=40", "training.checkpoint_interval=15")
    whole = server.launch(2, tiny(embedded_cache, tmp_path, "whole", *steps), tmp_path / "logs")
    assert whole.wait() == {0: 0, 1: 0}
    stopped = server.launch(2, tiny(embedded_cache, tmp_path, "stopped", *steps), tmp_path / "logs1")
    stopped.reach(lambda: stopped.steps() >= 3)
    at = stopped.steps()
    stopped.signal(1, signal.SIGUSR1)
    assert stopped.wait() == {0: STOPPED, 1: STOPPED}
    assert at <= stopped.steps() <= at + 3
    assert "SIGUSR1" in stopped.log(0)
    assert "--resume" in stopped.log(0)
    assert intact(stopped.run_dir).name == f"step_{stopped.steps():08d}"
    resumed = server.launch(2, [*tiny(embedded_cache, tmp_path, "stopped", *steps), "--resume"], tmp_path / "logs2")
    assert resumed.wait() == {0: 0, 1: 0}
    assert rows(resumed.run_dir) == rows(whole.run_dir)
    assert read_ledger(resumed.run_dir / "ledger").equals(read_ledger(whole.run_dir / "ledger"))


def test_the_allotted_time_ends_a_run_in_order(server, embedded_cache, tmp_path):
    """Fault: a job that knows its time limit is killed at it instead of saving before."""
    arguments = tiny(embedded_cache, tmp_path, "timed", *LONG, "training.exit_duration_minutes=0.05")
    run = server.launch(1, arguments, tmp_path / "logs")
    assert run.wait() == {0: STOPPED}
    assert "exit_duration_minutes" in run.log(0)
    assert intact(run.run_dir).name == f"step_{run.steps():08d}"


def test_a_second_signal_ends_even_a_rank_that_hangs(server, embedded_cache, tmp_path):
    """Fault: a handler in Python that runs only when the main thread comes back from a collective. A launcher's copy of
    the first signal, at the same moment, is not a second one."""
    run = server.launch(2, tiny(embedded_cache, tmp_path, "hang", *LONG), tmp_path / "logs")
    run.reach(lambda: run.steps() >= 1)
    run.signal(1, signal.SIGSTOP)
    run.signal(0, signal.SIGTERM)
    run.signal(0, signal.SIGTERM)
    time.sleep(1.5)
    run._poll()
    assert not run.statuses
    run.signal(0, signal.SIGTERM)
    assert run.wait([0], seconds=30) == {0: 128 + signal.SIGTERM}
    assert "ending at once" in run.log(0)
    run.kill()


def test_ranks_left_waiting_end_and_say_for_what(server, embedded_cache, tmp_path):
    """Fault: a rank that hangs, here stopped, keeps the others for ever; or they end with a line about sockets that
    names neither what they were doing nor who is missing. Rank 0 keeps the store: stopped, it cannot be asked."""
    interval = ("training.checkpoint_interval=2", SHORT_WAIT)
    runs = []
    for hanging in (0, 1):
        arguments = tiny(embedded_cache, tmp_path, f"stop{hanging}", *LONG, *interval)
        run = server.launch(2, arguments, tmp_path / f"logs{hanging}")
        run.reach(lambda run=run: run.steps() >= 5)
        run.signal(hanging, signal.SIGSTOP)
        runs.append((hanging, run, time.monotonic()))
    for hanging, run, since in runs:
        left = 1 - hanging
        assert run.wait([left], seconds=120) == {left: 1}
        assert time.monotonic() - since < 90
        said = run.log(left)
        assert f"error: rank {left}: waited for other ranks while " in said
        assert "parallel.distributed_timeout_minutes is 0.5" in said
        assert ("store" in said and "does not answer" in said) if hanging == 0 else "no sign of ranks: 1" in said
        assert "if it waits for another rank, it will be ended after 30 s" in said
        run.kill()
        assert int(intact(run.run_dir).name.removeprefix("step_")) >= 4


def test_a_rank_killed_while_it_saves_leaves_the_older_checkpoint(server, embedded_cache, tmp_path):
    """Fault: half a checkpoint taken for a whole one, or the older one gone before the new one is there; ranks
    that wait for the dead one until a time-out although its connection is closed."""
    arguments = tiny(embedded_cache, tmp_path, "killed", *LONG, "training.checkpoint_interval=3")
    run = server.launch(2, [*arguments, "training.keep_checkpoints=1"], tmp_path / "logs", slow_writing)
    folder = run.run_dir / "checkpoints"
    run.reach((folder / "step_00000006" / "rng_00001.pt").exists)
    run.signal(1, signal.SIGKILL)
    since = time.monotonic()
    assert run.wait() == {0: 1, 1: -signal.SIGKILL}
    assert time.monotonic() - since < 30
    assert "waited for other ranks while writing the checkpoint after step 5" in run.log(0)
    assert "no sign of ranks: 1" in run.log(0)
    assert intact(run.run_dir).name == "step_00000003"


def slow_writing() -> None:
    """Writing takes long enough to be killed in: rank 1 is two seconds late with its word that it has written."""
    on_all_ranks = checkpoint.on_all_ranks

    def late(action: Any) -> Any:
        def both() -> Any:
            result = action()
            if os.environ["RANK"] == "1":
                time.sleep(2)
            return result

        return on_all_ranks(both)

    checkpoint.on_all_ranks = late  # type: ignore[assignment]


def test_a_rank_that_skips_a_collective_ends_the_run(server, embedded_cache, tmp_path):
    """Fault: ranks whose control flow differs exchange each other's numbers or wait for ever."""
    arguments = tiny(embedded_cache, tmp_path, "skips", *LONG, SHORT_WAIT, "training.checkpoint_interval=2")
    run = server.launch(2, arguments, tmp_path / "logs", skip_scoring)
    statuses = run.wait()
    assert all(status != 0 for status in statuses.values()), statuses
    assert "waited for other ranks while" in run.log(0) + run.log(1)
    assert intact(run.run_dir).name == "step_00000004"


def skip_scoring() -> None:
    """From step 5 on, rank 1 scores nothing."""
    from megatron_opus.training.driver import SelectionDriver

    if os.environ["RANK"] == "1":
        score = SelectionDriver._score
        scored = []

        def forgetful(self, candidates):
            if self.counters.step < 5:
                scored[:] = [score(self, candidates)]
            return scored[0]

        SelectionDriver._score = forgetful
