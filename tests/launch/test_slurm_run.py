"""A real run through launch/slurm/, stopped by the signal before its time limit, requeued and finished."""

from __future__ import annotations

from pathlib import Path

import yaml
from launched import RECIPE, VOLATILE, Server, tiny
from slurm_cluster import Cluster

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

STEPS = ("training.train_steps=24", "training.checkpoint_interval=10")


def test_a_run_stopped_at_its_time_limit_and_requeued_is_the_undisturbed_run(
    server: Server, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against a signal that ends the batch script, srun or a rank instead of asking it to save; a status that is
    lost on the way to the decision; a restart that begins anew, or goes on elsewhere than the run stopped."""
    whole = server.launch(2, tiny(embedded_cache, tmp_path, "whole", *STEPS), tmp_path / "logs")
    cluster = Cluster(tmp_path / "cluster")
    arguments = tiny(embedded_cache, tmp_path, "stopped", *STEPS)
    submitted = cluster.submit("submit.sh", RECIPE, "1", "2", *arguments)
    assert submitted.returncode == 0, submitted.stderr
    run = tmp_path / "stopped"
    start = cluster.start()
    start.reach((run / "metrics.jsonl").exists, 600)
    start.reach(lambda: len(read_metrics(run)) >= 3, 600)
    start.near_the_time_limit()
    assert start.wait(600) == 0, start.said()
    (job,) = cluster.jobs()
    assert cluster.requeued() == [str(job["id"])]
    stopped_at = len(read_metrics(run))
    assert 3 <= stopped_at < 24
    assert f"stopped in order with a checkpoint after step {stopped_at}. Requeue 1 of at most 20" in start.said()
    first = [(run / f"slurm/{job['id']}.0/rank_{rank:05d}.log").read_text() for rank in range(2)]
    assert all("SIGUSR1: stopping with a checkpoint" in text for text in first)  # every rank got it, once
    assert "again: ending at once" not in "".join(first)

    again = cluster.start(restart=1)
    assert again.wait(600) == 0, again.said()
    assert not cluster.requeued()
    assert f"start 2, from step {stopped_at}" in again.said()
    assert "resumed from" in (run / f"slurm/{job['id']}.1/rank_00000.log").read_text()
    assert whole.wait(seconds=600) == {0: 0, 1: 0}

    def rows(folder: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(folder)]

    assert rows(run) == rows(whole.run_dir)
    assert read_ledger(run / "ledger").equals(read_ledger(whole.run_dir / "ledger"))
    health = yaml.safe_load((run / f"slurm/{job['id']}.1/health.json").read_text())
    assert health["nodes"]["localhost"]["faults"] == []
    assert "torch" in health["nodes"]["localhost"]["software"]


def test_what_the_trainer_refuses_is_not_requeued(tmp_path: Path) -> None:
    """Guards against a trainer and a batch script that mean different things by a status."""
    cluster = Cluster(tmp_path)
    unchecked = {"CHECK_RECIPE": "0", "NAME": "x", "OUTPUT_DIR": str(tmp_path), "HEALTH_CHECK": "0"}
    submitted = cluster.submit("submit.sh", RECIPE, "1", "1", "training.train_step=3", MAX_FAILURES="5", **unchecked)
    assert submitted.returncode == 0, submitted.stderr
    start = cluster.start()
    assert start.wait(600) == 2, start.said()
    assert not cluster.requeued()
    assert "did you mean training.train_steps?" in start.said()  # the end of rank 0's log
    assert "was refused (status 2)" in start.said()
