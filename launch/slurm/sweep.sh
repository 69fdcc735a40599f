#!/usr/bin/env bash
# A sweep over seeds and strategies as one job array: every run is an ordinary run folder <output_dir>/<SWEEP>/<strategy>-
# <seed>, which stops, is requeued and resumes by itself.
#   SITE=<site> sweep.sh SCRIPT [key=value ...] [--resume]
# SCRIPT is one of those beside this file that submit a run: launch/slurm/pretrain_gpt2_xl_8gpus.sh
#   SEEDS         ("1 2 3")         STRATEGIES   ("opus random")
#   SWEEP         (sweep)           the folder of all runs
#   MAX_RUNNING   (all)             how many at a time
set -euo pipefail
if [[ $# -lt 1 || ! -f $1 ]]; then
  echo "error: expected the script that submits one run, for example launch/slurm/pretrain_gpt2_xl_8gpus.sh, got: ${1:-}" >&2
  exit 2
fi
export SWEEP=${SWEEP:-sweep} SEEDS=${SEEDS:-1 2 3} STRATEGIES=${STRATEGIES:-opus random}
exec bash "$@"
