"""What the real trainer refuses, through launch/slurm/ on stand-ins. The rest has a real Slurm (test_slurm_real.py)."""

from __future__ import annotations

from pathlib import Path

from launched import RECIPE
from slurm_cluster import Cluster


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
