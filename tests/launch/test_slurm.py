"""launch/slurm/ on a cluster of stand-ins, with ranks that end as they are told: what is started, requeued and said."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import ROOT, Cluster, Start

from megatron_opus.config import dump, load

# Takes the place of Python where the trainer would start: line n of `plan` is the status of start n and the step of the
# checkpoint that it leaves behind, 0 for none. Everything else is the real Python.
RANK = """
case "$*" in *launch/start.py*) ;; *) exec {python} "$@" ;; esac
echo "RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE" \
  "MASTER=$MASTER_ADDR:$MASTER_PORT OMP_NUM_THREADS=$OMP_NUM_THREADS"
shift 2
echo "$@"
read -r status step <<END
$(sed -n "$((${{SLURM_RESTART_COUNT:-0}} + 1))p" "$STAND_IN/plan")
END
if [ "$RANK" = 0 ] && [ "$status" != 2 ]; then
  mkdir -p "$STAND_IN/runs/x" && touch "$STAND_IN/runs/x/config.yaml"
  if [ "$step" != 0 ]; then
    marker=$(printf "$STAND_IN/runs/x/checkpoints/step_%08d" "$step")
    mkdir -p "$marker" && touch "$marker/complete.json"
  fi
fi
if [ "$status" = hang ]; then
  trap : USR1
  n=0
  while [ $((n += 1)) -lt 600 ]; do touch "$STAND_IN/rank$RANK.hangs"; sleep 0.1; done
fi
if [ "$status" = wait ]; then
  while [ ! -e "$STAND_IN/asked" ]; do touch "$STAND_IN/rank$RANK.hangs"; sleep 0.1; done
  status=75
fi
exit "$status"
"""
QUICK = {"CHECK_RECIPE": "0", "NAME": "x", "HEALTH_CHECK": "0"}


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    cluster = Cluster(tmp_path)
    cluster.environment["PYTHON"] = str(cluster.command("python_or_rank", RANK.format(python=sys.executable)))
    return cluster


def submit(cluster: Cluster, plan: str, *arguments: str, nodes: int = 1, **env: str) -> None:
    """One run of two ranks on each node, whose starts end as `plan` says: "75 10, 0 20"."""
    (cluster.folder / "plan").write_text(plan.replace(", ", "\n") + "\n")
    values = {**QUICK, "OUTPUT_DIR": str(cluster.folder / "runs"), **env}
    result = cluster.submit("submit.sh", "pretrain_gpt2_tiny", str(nodes), "2", *arguments, **values)
    assert result.returncode == 0, result.stderr


def log(cluster: Cluster, restart: int, rank: int) -> list[str]:
    job = cluster.jobs()[-1]["id"]
    return (cluster.folder / f"runs/x/slurm/{job}.{restart}/rank_{rank:05d}.log").read_text().splitlines()


# --- ends and requeues ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "limits", "expected", "words"),
    [
        ("0 30", {}, ["0"], "finished"),
        ("75 10, 75 20, 0 30", {}, ["requeue", "requeue", "0"], "finished"),
        ("75 10, 75 20, 75 30", {"MAX_REQUEUES": "2"}, ["requeue", "requeue", "75"], "MAX_REQUEUES=2 is reached"),
        ("75 10, 75 10, 75 10", {"MAX_STALLED": "1"}, ["requeue", "requeue", "75"], "left no new checkpoint"),
        ("2 0", {"MAX_FAILURES": "5"}, ["2"], "was refused (status 2)"),
        ("75 10, 2 0", {"MAX_FAILURES": "5"}, ["requeue", "2"], "was refused (status 2)"),
        ("1 10", {}, ["1"], "MAX_FAILURES=0"),
        ("1 10, 1 20", {"MAX_FAILURES": "1"}, ["requeue", "1"], "2 failed starts, MAX_FAILURES=1"),
        ("1 10, 75 20, 0 30", {"MAX_FAILURES": "1"}, ["requeue", "requeue", "0"], "finished"),
        ("1 10, 1 10, 1 10", {"MAX_FAILURES": "9", "MAX_STALLED": "1"}, ["requeue", "requeue", "1"], "MAX_STALLED=1"),
    ],
)
def test_what_is_requeued_and_how_often(
    cluster: Cluster, plan: str, limits: dict[str, str], expected: list[str], words: str
) -> None:
    """Guards against jobs that requeue for ever, that try again what was refused, and that give up what was saved."""
    submit(cluster, plan, **limits)
    seen = []
    for restart in range(len(expected)):
        start = cluster.start(restart)
        status = start.wait()
        again = cluster.requeued()
        assert again in ([], [str(cluster.jobs()[0]["id"])])
        seen.append("requeue" if again else str(status))
        assert not (again and status)
    assert seen == expected, start.said()
    assert words in start.said().splitlines()[-1]
    assert start.said().count("start 1, from step 0") == 1  # appended to, not written over


def test_restarts_by_slurm_itself_are_bounded_too(cluster: Cluster) -> None:
    """Guards against a node that dies at every start: the batch script never reaches its own count."""
    submit(cluster, "0 10", MAX_REQUEUES="2")
    for restart in range(4):  # the batch script of the first three is killed with its node
        start = cluster.start(restart)
        if restart < 3:
            start.process.kill()
        status = start.wait()
    assert status == 1
    assert "this is start 4; MAX_REQUEUES=2 allows 3" in start.said()


def test_a_requeue_that_slurm_refuses_is_said(cluster: Cluster) -> None:
    """Guards against status 0 and silence where a site does not allow requeues."""
    (cluster.folder / "requeue_status").write_text("1")
    submit(cluster, "75 10")
    start = cluster.start()
    assert start.wait() == 75
    assert "scontrol would not requeue" in start.said()
    assert "--resume" in start.said()


def test_ranks_that_do_not_stop_are_ended_before_the_time_limit(cluster: Cluster) -> None:
    """Guards against a hung rank that takes the requeue along when the time limit kills everything."""
    submit(cluster, "hang 10", SIGNAL_SECONDS="3", STOP_MARGIN="2")
    start = cluster.start()
    start.reach(lambda: len(list(cluster.folder.glob("*.hangs"))) == 2)
    start.near_the_time_limit()
    assert start.wait() == 0
    assert cluster.requeued()
    assert "have not stopped within 1 s" in start.said()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    """Guards against `scancel` that has to be typed twenty times."""
    submit(cluster, "hang 10", MAX_FAILURES="5")
    start = cluster.start()
    start.reach(lambda: len(list(cluster.folder.glob("*.hangs"))) == 2)
    start.cancel()
    assert start.wait() == 128 + signal.SIGKILL
    assert not cluster.requeued()
    assert "Slurm decides" in start.said()


def test_a_run_can_be_saved_and_ended_by_hand(cluster: Cluster) -> None:
    """Guards against a run that can be stopped in order only by being started again."""
    submit(cluster, "wait 10")
    start = cluster.start()
    start.reach(lambda: len(list(cluster.folder.glob("*.hangs"))) == 2)
    start.process.send_signal(signal.SIGTERM)  # scancel --batch --signal=TERM
    start.reach(lambda: "SIGTERM" in start.said())
    (cluster.folder / "asked").touch()  # scancel --signal=USR1: the ranks, which end with 75
    assert start.wait() == 75
    assert not cluster.requeued()
    assert "stopped with a checkpoint; cancelled" in start.said()


# --- what a rank is given -------------------------------------------------------------------------------------------


def test_every_task_is_the_rank_that_slurm_says(tmp_path: Path) -> None:
    """Guards against ranks with each other's GPU, logs that ranks share, a rendezvous that differs between nodes."""

    cluster = Cluster(tmp_path, nodes="localhost,n[2-3]")
    cluster.environment["PYTHON"] = str(cluster.command("python_or_rank", RANK.format(python=sys.executable)))
    submit(cluster, "75 10, 0 20", "optimizer.lr=1e-3", "data.path=a b", nodes=3, CPUS_PER_TASK="5")
    for restart in range(2):
        assert cluster.start(restart).wait() == 0
    port = 20000 + cluster.jobs()[0]["id"] % 12000
    for restart, resume in ((0, ""), (1, " --resume")):
        master = f"MASTER=localhost:{20000 + (port - 20000 + 101 * restart) % 12000}"
        for rank in range(6):
            variables = f"RANK={rank} LOCAL_RANK={rank % 2} WORLD_SIZE=6 LOCAL_WORLD_SIZE=2 {master} OMP_NUM_THREADS=5"
            assert log(cluster, restart, rank) == [
                variables,
                f"pretrain_gpt2_tiny optimizer.lr=1e-3 data.path=a b{resume}",
            ]


def test_a_run_is_resumed_only_where_there_is_one_of_this_submission(cluster: Cluster) -> None:
    """Guards against a restart that is refused because nothing was saved yet, and against going on with a stranger."""
    submit(cluster, "137 0, 0 0", MAX_FAILURES="1")
    cluster.start().wait()
    (cluster.folder / "runs/x/config.yaml").unlink()  # killed before it was written
    assert cluster.start(1).wait() == 0
    assert log(cluster, 1, 0)[1] == "pretrain_gpt2_tiny"
    again = cluster.submit("submit.sh", "pretrain_gpt2_tiny", "1", "2", **QUICK, OUTPUT_DIR="runs")
    assert again.returncode == 2
    assert "already holds a run: continue it with --resume" in again.stderr
    submit(cluster, "0 20", "--resume")
    assert cluster.start().wait() == 0
    assert log(cluster, 0, 0)[1] == "pretrain_gpt2_tiny --resume"
    (cluster.folder / "runs/x/config.yaml").unlink()
    submit(cluster, "75 30, 0 40")
    (cluster.folder / "runs/x/config.yaml").touch()  # another job of the same name has begun meanwhile
    for restart in range(2):
        assert cluster.start(restart).wait() == 0
        assert log(cluster, restart, 0)[1] == "pretrain_gpt2_tiny"


# --- sweeps ---------------------------------------------------------------------------------------------------------


def test_an_array_is_a_run_for_each_seed_and_strategy(cluster: Cluster) -> None:
    """Guards against two runs in one folder, and a requeue of the whole array: the last run has the array's own id."""
    (cluster.folder / "plan").write_text("75 0\n0 0\n")
    env = {**QUICK, "OUTPUT_DIR": "runs", "SEEDS": "7 8", "STRATEGIES": "opus random ado", "MAX_RUNNING": "2"}
    script = str(cluster.command("one.sh", f'exec bash {ROOT}/launch/slurm/submit.sh pretrain_gpt2_tiny 1 1 "$@"\n'))
    result = cluster.submit("sweep.sh", script, "training.train_steps=3", **env, SWEEP="both")
    assert result.returncode == 0, result.stderr
    (job,) = cluster.jobs()
    assert job["options"]["--array"] == "0-5%2"
    assert "--dependency" not in job["options"]
    runs = cluster.folder / "runs/both"
    for index, (seed, strategy) in enumerate((s, t) for s in (7, 8) for t in ("opus", "random", "ado")):
        assert cluster.start(index=index).wait() == 0
        assert cluster.requeued() == [f"{job['id']}_{index}"]
        arguments = (runs / f"{strategy}-{seed}/slurm/{job['id']}_{index}.0/rank_00000.log").read_text().splitlines()[1]
        settings = f"name={strategy}-{seed} output_dir={runs} seed={seed} selection.strategy={strategy}"
        assert arguments == f"pretrain_gpt2_tiny training.train_steps=3 {settings}"
    (runs / "random-7/config.yaml").touch()
    assert cluster.submit("sweep.sh", script, "--resume", **env, SWEEP="both").returncode == 0
    for index, resumed in ((1, True), (2, False)):  # a run that had begun, and one that had not
        assert cluster.start(index=index).wait() == 0
        (arguments,) = (runs / ("random-7", "ado-7")[index - 1]).glob(f"slurm/{cluster.jobs()[-1]['id']}_*/*.log")
        assert ("--resume" in arguments.read_text()) == resumed
    refused = cluster.submit("sweep.sh", script, "seed=3", **env)
    assert refused.returncode == 2
    assert "seed=3: in a sweep, SWEEP, SEEDS and STRATEGIES say this" in refused.stderr


# --- the health check -----------------------------------------------------------------------------------------------


def unhealthy(cluster: Cluster, **env: str) -> Start:
    """A job on two nodes of which n2 cannot import a package."""
    (cluster.folder / "some_package.py").write_text(
        "import os\nif os.environ['SLURMD_NODENAME'] == 'n2':\n    raise ImportError('libcudart.so.99: cannot open')\n"
    )
    cluster.environment["PYTHONPATH"] = f"{cluster.folder}:{ROOT}"
    submit(cluster, "0 10", nodes=2, HEALTH_CHECK="1", HEALTH_IMPORTS="some_package", **env)
    return cluster.start()


def test_a_job_on_an_unfit_node_ends_and_names_it(cluster: Cluster) -> None:
    """Guards against an hour of a hundred ranks' waiting, and a traceback of all of them, for one broken node."""
    cluster.nodes = "localhost,n2"
    start = unhealthy(cluster)
    assert start.wait() == 1
    assert "health check: n2: cannot import some_package: ImportError: libcudart.so.99" in start.said()
    assert "the health check failed on n2; nothing was started" in start.said()
    assert not cluster.requeued()
    assert not (cluster.folder / "runs/x/config.yaml").exists()


def test_an_unfit_node_is_left_out_where_that_is_wanted(cluster: Cluster) -> None:
    """Guards against a new submission without the number of the old one, which would go on for ever."""
    cluster.nodes = "localhost,n2"
    start = unhealthy(cluster, HEALTH_RETRIES="1", EXCLUDE="n9")
    assert start.wait() == 1
    first, second = cluster.jobs()
    assert second["options"] == {**first["options"], "--exclude": "n9,n2"}
    assert second["arguments"] == first["arguments"]
    start = cluster.start()  # on the same nodes: bad again, and enough
    assert start.wait() == 1
    assert len(cluster.jobs()) == 2
    assert "the health check failed on n2" in start.said()


# --- before anything is queued --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "recipe", "nodes", "ranks", "layout"),
    [
        ("pretrain_gpt2_xl_8gpus", "pretrain_gpt2_xl", 1, 8, []),
        ("cpt_qwen3_8b_16gpus", "cpt_qwen3_8b", 2, 16, ["parallel.zero_stage=2"]),
        ("cpt_qwen3_8b_64gpus", "cpt_qwen3_8b", 8, 64, ["parallel.zero_stage=2"]),
        ("cpt_qwen3_8b_megatron_16gpus", "cpt_qwen3_8b_megatron", 2, 16, []),
    ],
)
def test_a_dry_run_shows_recipe_and_commands_and_writes_nothing(
    cluster: Cluster, script: str, recipe: str, nodes: int, ranks: int, layout: list[str]
) -> None:
    """Guards against commands that differ from what a job does, and a layout that its ranks would refuse."""
    before = sorted(cluster.folder.rglob("*"))
    result = cluster.submit(f"{script}.sh", "optimizer.lr=1e-3", DRY_RUN="1", GPU_OPTION="--gpus-per-node=")
    assert result.returncode == 0, result.stderr
    assert sorted(cluster.folder.rglob("*")) == before
    shown, _, commands = result.stdout.partition("# submitted:\n")
    config = load(ROOT / f"configs/{recipe}.yaml", [*layout, "optimizer.lr=1e-3"])
    assert shown == dump(config)
    sbatch, health, srun = (shlex.split(line) for line in commands.splitlines() if not line.startswith("#"))
    assert {f"--nodes={nodes}", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"} <= set(sbatch)
    assert {"--signal=B:USR1@300", "--open-mode=append", "--partition=test"} <= set(sbatch)
    assert {f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"} <= set(health)
    assert {f"--nodes={nodes}", f"--ntasks={ranks}", "--ntasks-per-node=8"} <= set(srun)
    assert srun[-1] == "optimizer.lr=1e-3"


def test_a_layout_that_cannot_run_is_not_queued(cluster: Cluster) -> None:
    """Guards against a day in the queue for a job whose ranks refuse to start."""
    result = cluster.submit("cpt_qwen3_8b_64gpus.sh", "training.global_batch_size=16")
    assert result.returncode == 2
    assert "training.global_batch_size: expected a multiple of 32 (data-parallel size 32), got 16" in result.stderr
    assert not cluster.jobs()


def test_a_dry_run_of_a_sweep_lists_its_runs(cluster: Cluster) -> None:
    """Guards against a strategy whose name is misspelt in the third run of an array."""
    script = str(ROOT / "launch/slurm/pretrain_gpt2_xl_8gpus.sh")
    result = cluster.submit("sweep.sh", script, DRY_RUN="1", SEEDS="1", STRATEGIES="opus ado")
    assert result.returncode == 0, result.stderr
    assert "# array index 1: name=ado-1 output_dir=" in result.stdout
    first, _, _ = result.stdout.partition("# array index 1")
    assert yaml.safe_load(first)["name"] == "opus-1"
    result = cluster.submit("sweep.sh", script, DRY_RUN="1", SEEDS="1", STRATEGIES="opus oppus")
    assert result.returncode == 2
    assert "oppus" in result.stderr


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SITE_FILE": ""}, "SITE is not set: expected the name of a file in"),
        ({"SITE_FILE": "", "SITE": "nowhere"}, "launch/env/nowhere.sh: not found"),
        ({"PARTITION": "", "TIME": ""}, "expected PARTITION TIME to be set"),
        ({"STOP_MARGIN": "300"}, "SIGNAL_SECONDS: expected more than STOP_MARGIN (300), got 300"),
        ({"MAX_REQUEUES": "many"}, "MAX_REQUEUES: expected a whole number, got many"),
        ({"CONTAINER_RUNTIME": "pyxis"}, "CONTAINER_IMAGE is not set, but CONTAINER_RUNTIME is pyxis"),
        ({"CONTAINER_RUNTIME": "docker"}, "expected pyxis, apptainer, singularity or nothing, got docker"),
        ({"OUTPUT_DIR": ""}, "CHECK_RECIPE=0 needs NAME and OUTPUT_DIR"),
    ],
)
def test_missing_settings_are_named(cluster: Cluster, env: dict[str, str], expected: str) -> None:
    """Guards against `unbound variable` from line 143, and against sbatch complaining of an empty option."""
    values = {**QUICK, "OUTPUT_DIR": "runs", **env}
    result = cluster.submit("submit.sh", "pretrain_gpt2_tiny", "1", "2", **values)
    assert result.returncode == 2, result.stdout
    assert expected in result.stderr
    assert not cluster.jobs()


def test_the_example_of_a_site_is_one(cluster: Cluster) -> None:
    """Guards against an example that misses or misspells a setting."""
    values = {**QUICK, "OUTPUT_DIR": "runs", "SITE_FILE": "", "SITE": "example", "GPU_OPTION": "--gpus-per-node="}
    result = cluster.submit("submit.sh", "pretrain_gpt2_tiny", "1", "2", DRY_RUN="1", **values)
    assert result.returncode == 0, result.stderr
    assert "--partition=gpu --time=24:00:00 --nodes=1 --ntasks-per-node=2 --cpus-per-task=12" in result.stdout
    assert "--exclusive --mem=0" in result.stdout


# --- containers -----------------------------------------------------------------------------------------------------


def test_apptainer_stands_before_the_rank(cluster: Cluster) -> None:
    """Guards against ranks outside the container, and a container without the checkout or the run folder."""
    cluster.command("apptainer", 'echo "$@"\nwhile [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"\n')
    runtime = {"CONTAINER_RUNTIME": "apptainer", "CONTAINER_IMAGE": "image.sif", "CONTAINER_MOUNTS": "/data:/data"}
    submit(cluster, "0 10", **runtime)
    assert cluster.start().wait() == 0
    called, variables, arguments = log(cluster, 0, 1)
    runs = cluster.folder / "runs"
    mounts = f"{ROOT}:{ROOT},{cluster.folder}:{cluster.folder},{runs}:{runs},/data:/data"
    assert called.startswith(f"exec --bind {mounts} --pwd {cluster.folder} image.sif bash {ROOT}/launch/slurm/rank.sh")
    assert variables.startswith("RANK=1 ")
    assert arguments == "pretrain_gpt2_tiny"


def test_pyxis_is_asked_through_srun(cluster: Cluster) -> None:
    """Guards against the health check looking at another environment than the ranks have."""
    values = {**QUICK, "HEALTH_CHECK": "1", "OUTPUT_DIR": "runs", "CONTAINER_RUNTIME": "pyxis", "DRY_RUN": "1"}
    result = cluster.submit("submit.sh", "pretrain_gpt2_tiny", "1", "2", **values, CONTAINER_IMAGE="/opus.sqsh")
    health, srun = (line for line in result.stdout.splitlines() if line.startswith("srun"))
    for command in (health, srun):
        options = shlex.split(command)
        assert {"--container-image=/opus.sqsh", f"--container-workdir={cluster.folder}"} <= set(options)
