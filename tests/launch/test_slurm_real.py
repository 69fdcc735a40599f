"""launch/slurm/ on a real Slurm of two nodes: the trainer over both, and everything that may happen to it there."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from launched import RECIPE, VOLATILE, Server, tiny
from slurm_real import PATIENCE, RealSlurm

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = ("training.train_steps=24", "training.checkpoint_interval=4", "training.log_interval=1")
LIMITS = {"TIME": "30", "SIGNAL_SECONDS": "120", "MAX_FAILURES": "1", "CPUS_PER_TASK": "1", "HEALTH_TIMEOUT": "300"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[RealSlurm]:
    slurm = RealSlurm()
    yield slurm
    slurm.close()


def rows(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(folder)]


def held(slurm: RealSlurm, run: Path, job: int, restart: int, steps: int) -> list[int]:
    """The process ids of the two ranks of a start, which stand still after at least so many steps of the run."""
    log = run / f"slurm/{job}.{restart}/rank_00000.log"
    # not before the first step of this start: until then the rows may be those of steps that it will take again
    slurm.reach(lambda: log.exists() and "/24  loss" in log.read_text(errors="replace"), f"start {restart + 1} trains")
    slurm.reach(lambda: len(read_metrics(run)) >= steps, f"the run takes step {steps}")
    ranks = [*slurm.ranks("n1"), *slurm.ranks("n2")]
    assert len(ranks) == 2, ranks
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    return ranks


def test_a_run_outlives_its_time_limit_a_killed_rank_and_a_lost_node(
    slurm: RealSlurm, server: Server, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against everything that stand-ins imagine otherwise than Slurm is: names of nodes that lead nowhere, a
    signal that does not arrive or ends a rank, statuses that srun changes, a job that is not requeued."""
    run = tmp_path / "disturbed"

    def said() -> str:
        return (run / f"slurm/{job}.out").read_text(errors="replace")

    job = slurm.submit("submit.sh", RECIPE, "2", "1", *tiny(embedded_cache, tmp_path, run.name, *STEPS), **LIMITS)

    # The time limit comes near: one to two minutes are left, and Slurm looks at it every 30 s.
    ranks = held(slurm, run, job, 0, 3)
    hours, minutes, _ = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    slurm.reach(lambda: "asking the ranks to stop with a checkpoint" in said(), "the signal comes")
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    slurm.again(job, 1, TimeLimit="30")
    (stopped_at,) = (int(step) for step in re.findall(r"stopped in order with a checkpoint after step (\d+)", said()))
    assert 3 <= stopped_at < 20
    logs = [(run / f"slurm/{job}.0/rank_{rank:05d}.log").read_text() for rank in range(2)]
    assert all("SIGUSR1: stopping with a checkpoint" in log for log in logs)
    assert "again: ending at once" not in "".join(logs)
    health = yaml.safe_load((run / f"slurm/{job}.0/health.json").read_text())["nodes"]
    assert {name: found["faults"] for name, found in health.items()} == {"n1": [], "n2": []}
    assert "on n1,n2, rendezvous 127.0.0.1:" in said()

    # A rank is killed. The other one ends by itself, and one failure may be tried again.
    first, second = held(slurm, run, job, 1, stopped_at + 1)
    os.kill(second, signal.SIGKILL)
    os.kill(first, signal.SIGCONT)
    slurm.again(job, 2)
    assert f"start 2, from step {stopped_at}" in said()
    assert f"the run failed with status {128 + signal.SIGKILL} (failure 1 of at most 1" in said()

    # A node is lost: Slurm itself requeues the job, whatever the batch script thinks of it.
    ranks = held(slurm, run, job, 2, stopped_at + 2)
    os.kill(ranks[0], signal.SIGCONT)
    slurm.lose("n2")
    slurm.again(job, 3)
    slurm.restore("n2")
    slurm.reach(lambda: slurm.job(job)["JobState"] == "COMPLETED", "the job is done")
    assert said().rstrip().endswith("finished")

    whole = server.launch(2, tiny(embedded_cache, tmp_path, "whole", *STEPS), tmp_path / "logs")
    assert whole.wait(seconds=PATIENCE) == {0: 0, 1: 0}
    assert rows(run) == rows(whole.run_dir)
    assert read_ledger(run / "ledger").equals(read_ledger(whole.run_dir / "ledger"))


def test_one_run_of_an_array_is_stopped_and_requeued_alone(
    slurm: RealSlurm, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against a requeue of the whole array: the id of its last run is the array's own."""
    command = slurm.folder / "one.sh"
    command.write_text(f'exec bash {Path(__file__).parents[2]}/launch/slurm/submit.sh {RECIPE} 1 1 "$@"\n')
    overrides = [one for one in tiny(embedded_cache, tmp_path, "", *STEPS) if not one.startswith("name=")]
    seeds = {"SWEEP": "seeds", "SEEDS": "7 8", "STRATEGIES": "opus", "HEALTH_CHECK": "0"}
    job = slurm.submit("sweep.sh", str(command), *overrides, **LIMITS, **seeds)
    runs = [tmp_path / "seeds" / f"opus-{seed}" for seed in (7, 8)]
    slurm.reach(lambda: read_metrics(runs[1]), "the last run trains")
    slurm.call("scancel", "--signal=USR1", f"{job}_1")  # to its ranks, by hand
    slurm.again(f"{job}_1", 1)
    for index, run in enumerate(runs):
        state = lambda: slurm.job(f"{job}_{index}")["JobState"]  # noqa: B023, E731
        slurm.reach(lambda: state() == "COMPLETED", f"run {index} is done")  # noqa: B023
        assert [row["step"] for row in read_metrics(run)] == list(range(24))
        starts = [line.split("\t") for line in (run / "slurm/starts.tsv").read_text().splitlines()]
        assert [(event, decided) for _, event, *_, decided in starts if event == "end"] == [
            *([("end", "requeue")] if index else []),
            ("end", "finished"),
        ]
    assert not read_ledger(runs[0] / "ledger").equals(read_ledger(runs[1] / "ledger"))
