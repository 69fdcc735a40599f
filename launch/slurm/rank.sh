#!/usr/bin/env bash
# One task of srun becomes one rank: `rank.sh RECIPE [key=value ...] [--resume]`, inside the container where there is one.
# job.sh exports the rest: ROOT, PYTHON, TASKS_PER_NODE, RANKS, MASTER_ADDR, MASTER_PORT.
# shellcheck disable=SC2153  # RANKS is job.sh's
set -euo pipefail

for variable in SLURM_PROCID SLURM_LOCALID SLURM_NTASKS ROOT PYTHON TASKS_PER_NODE RANKS MASTER_ADDR MASTER_PORT; do
  if [[ -z ${!variable:-} ]]; then
    echo "error: $variable is not set: expected to be started by srun in launch/slurm/job.sh. Does the site's" \
      "srun or container pass the environment on (--export=ALL)?" >&2
    exit 2
  fi
done
if ((SLURM_NTASKS != RANKS)); then
  echo "error: srun started $SLURM_NTASKS tasks, expected $RANKS: one for each rank" >&2
  exit 2
fi
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$RANKS
# Slurm binds a task to its own cores; without a number, launch/start.py shares those of the node.
[[ -z ${CPUS_PER_TASK:-} ]] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS_PER_TASK}"
export LOCAL_SIZE=$TASKS_PER_NODE LOCAL_WORLD_SIZE=$TASKS_PER_NODE
# The signal before the time limit goes to every process of the task: nothing but the trainer may stand there.
exec "$PYTHON" -u "$ROOT/launch/start.py" "$@"
