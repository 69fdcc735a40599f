#!/usr/bin/env bash
# Submits one run, or a sweep of runs, to Slurm; the scripts <recipe>_<n>gpus.sh beside it call it with their values.
#   submit.sh RECIPE NODES TASKS_PER_NODE [key=value ...] [--resume]
# RECIPE is a name in configs/ or a YAML file, a task is a rank and has one GPU. docs/slurm.md has the whole story.
#   SITE=<site> | SITE_FILE=<path>   cluster settings: launch/env/<site>.sh (launch/env/example.sh describes them)
#   DRY_RUN=1                        check and print the recipe, the sbatch and the srun commands; write nothing
#   CHECK_RECIPE=0                   leave the check of the recipe to the job (then NAME and OUTPUT_DIR are needed)
#   SWEEP, SEEDS, STRATEGIES         set by sweep.sh: an array of runs
#   MAX_RUNNING                      how many runs of a sweep at a time
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

[[ $# -ge 3 && $2 =~ ^[1-9][0-9]*$ && $3 =~ ^[1-9][0-9]*$ ]] ||
  fail "expected RECIPE NODES TASKS_PER_NODE [key=value ...] [--resume], got: $*"
RECIPE=$1 NODES=$2 TASKS_PER_NODE=$3
shift 3
ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

# --- the site -------------------------------------------------------------------------------------------------------

if [[ -z ${SITE_FILE:-} ]]; then
  [[ -n ${SITE:-} ]] || fail "SITE is not set: expected the name of a file in $ROOT/launch/env," \
    "found $(cd -- "$ROOT/launch/env" && echo *.sh). Copy example.sh to <site>.sh, change it, and set SITE=<site>."
  SITE_FILE=$ROOT/launch/env/$SITE.sh
fi
[[ -r $SITE_FILE ]] || fail "$SITE_FILE: not found. Expected cluster settings like those of $ROOT/launch/env/example.sh."
SITE_FILE=$(CDPATH="" cd -- "$(dirname -- "$SITE_FILE")" && pwd)/$(basename -- "$SITE_FILE")
# shellcheck source=../env/example.sh
source "$SITE_FILE"
missing=()
for variable in PARTITION TIME PYTHON; do
  [[ -n ${!variable:-} ]] || missing+=("$variable")
done
((${#missing[@]} == 0)) || fail "$SITE_FILE: expected ${missing[*]} to be set;" \
  "$ROOT/launch/env/example.sh says what they mean."

# A site file may leave out what it does not change: the defaults are those of example.sh.
ACCOUNT=${ACCOUNT:-} CPUS_PER_TASK=${CPUS_PER_TASK:-} GPU_OPTION=${GPU_OPTION---gpus-per-node=} EXCLUDE=${EXCLUDE:-}
SIGNAL_SECONDS=${SIGNAL_SECONDS:-300} STOP_MARGIN=${STOP_MARGIN:-60} WAIT_SECONDS=${WAIT_SECONDS:-120}
MAX_REQUEUES=${MAX_REQUEUES:-20} MAX_STALLED=${MAX_STALLED:-2} MAX_FAILURES=${MAX_FAILURES:-0}
HEALTH_CHECK=${HEALTH_CHECK:-1} HEALTH_TIMEOUT=${HEALTH_TIMEOUT:-300} HEALTH_RETRIES=${HEALTH_RETRIES:-0}
HEALTH_IMPORTS=${HEALTH_IMPORTS:-torch,deepspeed,megatron.core}
MIN_GPU_FREE=${MIN_GPU_FREE:-0.9} MIN_DISK_GIB=${MIN_DISK_GIB:-100} MAX_CLOCK_SKEW=${MAX_CLOCK_SKEW:-5}
SUBMIT_PYTHON=${SUBMIT_PYTHON:-$PYTHON} GPU_MEMORY_GIB=${GPU_MEMORY_GIB:-}
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-} CONTAINER_IMAGE=${CONTAINER_IMAGE:-} CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}
for variable in SIGNAL_SECONDS STOP_MARGIN WAIT_SECONDS MAX_REQUEUES MAX_STALLED MAX_FAILURES HEALTH_RETRIES; do
  [[ ${!variable} =~ ^[0-9]+$ ]] || fail "$variable: expected a whole number, got ${!variable}"
done
((SIGNAL_SECONDS > STOP_MARGIN)) || fail "SIGNAL_SECONDS: expected more than STOP_MARGIN ($STOP_MARGIN)," \
  "got $SIGNAL_SECONDS; the difference is the time in which a run must stop and save"
case $CONTAINER_RUNTIME in
  "") ;;
  pyxis | apptainer | singularity)
    [[ -n $CONTAINER_IMAGE ]] || fail "CONTAINER_IMAGE is not set, but CONTAINER_RUNTIME is $CONTAINER_RUNTIME"
    ;;
  *) fail "CONTAINER_RUNTIME: expected pyxis, apptainer, singularity or nothing, got $CONTAINER_RUNTIME" ;;
esac

# --- the recipe -----------------------------------------------------------------------------------------------------

world=$((NODES * TASKS_PER_NODE))
RESUME=0 OVERRIDES=()
for argument in "$@"; do
  case $argument in
    --resume) RESUME=1 ;;
    -*) fail "$argument: expected key=value or --resume" ;;
    *) OVERRIDES+=("$argument") ;;
  esac
done

# plan WHAT [key=value ...]: checks the recipe for this number of ranks and prints WHAT of it (recipe, name, output_dir)
plan() {
  PYTHONPATH=$ROOT "$SUBMIT_PYTHON" -m megatron_opus.cluster.check_recipe "$RECIPE" --ranks "$world" \
    --show "$1" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "${@:2}"
}

if [[ ${CHECK_RECIPE:-1} != 0 ]]; then
  command -v "$SUBMIT_PYTHON" >/dev/null || fail "$SUBMIT_PYTHON: not found, and it is to check the recipe. Set" \
    "SUBMIT_PYTHON to a Python 3.10 with PyYAML, or CHECK_RECIPE=0 to leave the check to the job."
  NAME=$(plan name ${GPU_MEMORY_GIB:+--gpu-memory-gib "$GPU_MEMORY_GIB"}) || exit 2
  OUTPUT_DIR=$(plan output_dir) || exit 2
fi
[[ -n ${NAME:-} && -n ${OUTPUT_DIR:-} ]] || fail "CHECK_RECIPE=0 needs NAME and OUTPUT_DIR, the recipe's own values"
[[ $OUTPUT_DIR == /* ]] || OUTPUT_DIR=$PWD/$OUTPUT_DIR

SWEEP=${SWEEP:-} SEEDS=${SEEDS:-} STRATEGIES=${STRATEGIES:-}
array=()
# shellcheck source=runs.sh
source "$ROOT/launch/slurm/runs.sh"
if [[ -n $SWEEP ]]; then
  [[ $SWEEP =~ ^[A-Za-z0-9._-]+$ ]] || fail "SWEEP: expected letters, digits, . _ -, got $SWEEP"
  for argument in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
    case $argument in
      name=* | seed=* | selection.strategy=*) fail "$argument: in a sweep, SWEEP, SEEDS and STRATEGIES say this" ;;
    esac
  done
  OUTPUT_DIR=$OUTPUT_DIR/$SWEEP NAME=$SWEEP
  count=$(sweep_size)
  ((count > 0)) || fail "a sweep needs SEEDS and STRATEGIES, got SEEDS=\"$SEEDS\" STRATEGIES=\"$STRATEGIES\""
  array=("--array=0-$((count - 1))${MAX_RUNNING:+%$MAX_RUNNING}")
  folder=$OUTPUT_DIR
else
  count=1 folder=$OUTPUT_DIR/$NAME
fi
for ((index = 0; index < count; index++)); do
  select_run "$index"
  if [[ ${CHECK_RECIPE:-1} != 0 ]]; then
    # every run is checked, and the first one shown whole
    what=name
    ((index > 0)) || what=recipe
    shown=$(plan "$what" ${RUN_OVERRIDES[@]+"${RUN_OVERRIDES[@]}"}) || exit 2
    if [[ ${DRY_RUN:-0} != 0 ]]; then
      [[ -z $SWEEP ]] || echo "# array index $index: ${RUN_OVERRIDES[*]}"
      ((index > 0)) || printf '%s\n' "$shown"
    fi
  fi
  if ((!RESUME)) && [[ -e $run_dir/config.yaml ]]; then
    fail "$run_dir already holds a run: continue it with --resume, or choose another name"
  fi
done

# --- the job --------------------------------------------------------------------------------------------------------

SUBMISSION=$(date +%Y%m%d-%H%M%S)-$$ # counts starts over requeues and over submissions that exclude bad nodes
output=$folder/slurm/%j.out
[[ -z $SWEEP ]] || output=$folder/slurm/%A_%a.out
SBATCH_OPTIONS=(
  --job-name="$NAME" --partition="$PARTITION" ${ACCOUNT:+--account="$ACCOUNT"} --time="$TIME"
  --nodes="$NODES" --ntasks-per-node="$TASKS_PER_NODE" ${CPUS_PER_TASK:+--cpus-per-task="$CPUS_PER_TASK"}
  ${GPU_OPTION:+"$GPU_OPTION$TASKS_PER_NODE"} ${EXCLUDE:+--exclude="$EXCLUDE"}
  --signal="B:USR1@$SIGNAL_SECONDS" --requeue --open-mode=append --output="$output" ${array[@]+"${array[@]}"}
)
# Two jobs must not write one run folder: a second submission of a run waits for the first.
[[ -n $SWEEP ]] || SBATCH_OPTIONS+=(--dependency=singleton)
SBATCH_OPTIONS+=(${SBATCH_ARGS[@]+"${SBATCH_ARGS[@]}"})

settings() {
  echo "# Written by launch/slurm/submit.sh for submission $SUBMISSION; launch/slurm/job.sh reads it at every start."
  printf 'ROOT=%q\nsource %q\n' "$ROOT" "$SITE_FILE"
  local variable
  for variable in SUBMISSION RECIPE NODES TASKS_PER_NODE PYTHON NAME OUTPUT_DIR RESUME SWEEP SEEDS \
    STRATEGIES CPUS_PER_TASK GPU_OPTION EXCLUDE SIGNAL_SECONDS STOP_MARGIN WAIT_SECONDS MAX_REQUEUES MAX_STALLED \
    MAX_FAILURES HEALTH_CHECK HEALTH_TIMEOUT HEALTH_RETRIES HEALTH_IMPORTS MIN_GPU_FREE MIN_DISK_GIB MAX_CLOCK_SKEW \
    CONTAINER_RUNTIME CONTAINER_IMAGE CONTAINER_MOUNTS; do
    printf '%s=%q\n' "$variable" "${!variable}"
  done
  for variable in OVERRIDES SBATCH_OPTIONS SRUN_ARGS CONTAINER_ARGS; do
    local -n values=$variable
    printf '%s=(' "$variable"
    ((${#values[@]} == 0)) || printf ' %q' "${values[@]}"
    printf ' )\n'
  done
}

SRUN_ARGS=(${SRUN_ARGS[@]+"${SRUN_ARGS[@]}"})
CONTAINER_ARGS=(${CONTAINER_ARGS[@]+"${CONTAINER_ARGS[@]}"})
settings_file=$folder/slurm/$SUBMISSION.sh
command=(sbatch "${SBATCH_OPTIONS[@]}" "$ROOT/launch/slurm/job.sh" "$settings_file")
if [[ ${DRY_RUN:-0} != 0 ]]; then
  echo "# submitted:"
  printf '%q ' "${command[@]}"
  echo
  temporary=$(mktemp)
  trap 'rm -f -- "$temporary"' EXIT
  settings >"$temporary"
  DRY_RUN=1 bash "$ROOT/launch/slurm/job.sh" "$temporary"
  exit
fi
command -v sbatch >/dev/null || fail "sbatch: not found on PATH; submit on a machine of the cluster"
mkdir -p -- "$folder/slurm"
settings >"$settings_file.partial"
mv -- "$settings_file.partial" "$settings_file"
"${command[@]}" || fail "sbatch did not take the job (status $?); it says why above"
echo "Logs, settings and the record of starts: $folder/slurm"
