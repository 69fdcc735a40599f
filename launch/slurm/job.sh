#!/usr/bin/env bash
# The batch script that submit.sh gives to sbatch: `job.sh SETTINGS`. One start of one run: health check, ranks, and what
# their end means. Statuses of the trainer: 0 done, 75 stopped with a checkpoint, 2 refused, everything else failed.
# DRY_RUN=1 prints what it would start. Slurm runs a copy of this file: what it needs is found through SETTINGS.
# shellcheck disable=SC2153,SC2329  # capitals come from SETTINGS; traps call functions
set -euo pipefail

# shellcheck source=/dev/null
source "$1"
settings=$1
# shellcheck source=runs.sh
source "$ROOT/launch/slurm/runs.sh"

# bash's own clock: a signal to the whole job would end a `date`, too
say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

# The job id of an array's last run is also that of the whole array: scontrol must be given the run's index with it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-${SLURM_JOB_ID:-JOB}}
restart=${SLURM_RESTART_COUNT:-0}
select_run "${SLURM_ARRAY_TASK_ID:-0}"
attempt=$run_dir/slurm/$job.$restart # logs of this start

# --- the commands ---------------------------------------------------------------------------------------------------

srun_container=() in_container=()
mounts=$ROOT:$ROOT,$PWD:$PWD,$OUTPUT_DIR:$OUTPUT_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
case $CONTAINER_RUNTIME in
  pyxis)
    srun_container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD"
      ${CONTAINER_ARGS[@]+"${CONTAINER_ARGS[@]}"})
    ;;
  apptainer | singularity)
    in_container=("$CONTAINER_RUNTIME" exec ${GPU_OPTION:+--nv} --bind "$mounts" --pwd "$PWD"
      ${CONTAINER_ARGS[@]+"${CONTAINER_ARGS[@]}"} "$CONTAINER_IMAGE")
    ;;
esac

RANKS=$((NODES * TASKS_PER_NODE))
# srun does not take --cpus-per-task from sbatch since Slurm 22.05, and --export may be set to NONE by the site.
common=(srun --nodes="$NODES" --export=ALL --distribution=block --kill-on-bad-exit=0)
ranks_command=("${common[@]}" --job-name=ranks --ntasks="$RANKS" --ntasks-per-node="$TASKS_PER_NODE"
  ${CPUS_PER_TASK:+--cpus-per-task="$CPUS_PER_TASK"} --wait="$WAIT_SECONDS"
  --open-mode=append --output="$attempt/rank_%5t.log" ${srun_container[@]+"${srun_container[@]}"}
  ${SRUN_ARGS[@]+"${SRUN_ARGS[@]}"} ${in_container[@]+"${in_container[@]}"}
  bash "$ROOT/launch/slurm/rank.sh" "$RECIPE"
  ${OVERRIDES[@]+"${OVERRIDES[@]}"} ${RUN_OVERRIDES[@]+"${RUN_OVERRIDES[@]}"})

# The port lies below the range that systems hand out by themselves (32768 and up), and moves with every start.
port=$((20000 + (${SLURM_JOB_ID:-0} + 101 * restart) % 12000))

health_command() { # health_command NODES ADDRESS
  local gpus=0
  [[ -z $GPU_OPTION ]] || gpus=$TASKS_PER_NODE
  health=("${common[@]}" --job-name=health --ntasks="$NODES" --ntasks-per-node=1
    ${srun_container[@]+"${srun_container[@]}"} ${in_container[@]+"${in_container[@]}"}
    env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m megatron_opus.cluster.health
    --nodes "$1" --address "$2" --port "$port" --directory "$attempt" --output-dir "$OUTPUT_DIR"
    --imports "$HEALTH_IMPORTS" --gpus "$gpus" --min-gpu-free "$MIN_GPU_FREE" --min-disk-gib "$MIN_DISK_GIB"
    --max-clock-skew "$MAX_CLOCK_SKEW" --timeout "$HEALTH_TIMEOUT")
}

if [[ ${DRY_RUN:-0} != 0 ]]; then
  echo "# in the job, at every start (--resume is added where there is a run to continue), with"
  echo "# MASTER_ADDR=<address of the first node> MASTER_PORT=$port + (job id + 101 x number of restarts) mod 12000:"
  health_command "<nodes>" "<address of the first node>"
  [[ $HEALTH_CHECK == 0 ]] || { printf '%q ' "${health[@]}"; echo; }
  printf '%q ' "${ranks_command[@]}"
  echo
  exit
fi

# --- waiting, although signals come ---------------------------------------------------------------------------------

time_is_up=false cancelled=false interrupted=false step_pid='' timer=''
started=$SECONDS

# To the ranks through srun, which passes USR1 on to all tasks. (TERM would make srun kill them.)
on_usr1() {
  interrupted=true
  $time_is_up || say "SIGUSR1 after $((SECONDS - started)) s: asking the ranks to stop with a checkpoint"
  time_is_up=true
  [[ -z $step_pid ]] || kill -USR1 "$step_pid" 2>/dev/null || true
  [[ -n $timer ]] || start_timer
}
# Ranks that hang must not take the requeue along when the time limit kills this script.
start_timer() {
  (
    sleep "$((SIGNAL_SECONDS - STOP_MARGIN))" &
    trap 'kill $! 2>/dev/null; exit' TERM
    wait $! && kill -ALRM $$
  ) &
  timer=$!
}
on_alarm() {
  interrupted=true
  say "the ranks have not stopped within $((SIGNAL_SECONDS - STOP_MARGIN)) s: ending them"
  [[ -z $step_pid ]] || kill -TERM "$step_pid" 2>/dev/null || true
}
# scancel, or preemption: Slurm ends the ranks by itself and requeues the job if that is what it wants.
on_term() {
  interrupted=true cancelled=true
  say "SIGTERM: the job is being cancelled or preempted"
}
trap on_usr1 USR1
trap on_alarm ALRM
trap on_term TERM
trap '[[ -z $timer ]] || kill "$timer" 2>/dev/null || true' EXIT

# run_step COMMAND...: its status in `status`, however often a signal interrupts the waiting.
run_step() {
  "$@" &
  step_pid=$!
  while :; do
    interrupted=false status=0
    wait "$step_pid" || status=$?
    $interrupted || break
  done
  step_pid=
}

# --- ends -----------------------------------------------------------------------------------------------------------

finish() { # finish STATUS DECISION WORDS...
  note end "$1" "$2"
  say "${*:3}"
  exit "$1"
}

requeue() { # requeue STATUS WHY: or the reason why not
  local why=$2 restarts starts
  restarts=$(noted start) # this one included: the number of the next restart
  restarts=$((restarts > restart + 1 ? restarts : restart + 1))
  starts=$(starts_at_this_step)
  if ((restarts > MAX_REQUEUES)); then
    finish "$1" stop "$why. Not requeued: MAX_REQUEUES=$MAX_REQUEUES is reached;" \
      "submit the same run with --resume to go on from step $(newest_step)"
  fi
  if ((starts > MAX_STALLED)); then
    finish "$1" stop "$why. Not requeued: $starts starts in a row began at step $(newest_step) and left no new" \
      "checkpoint (MAX_STALLED=$MAX_STALLED). Is the time limit too short for the first checkpoint?"
  fi
  note end "$1" requeue
  trap '' TERM # by which Slurm ends what it requeues
  say "$why. Requeue $restarts of at most $MAX_REQUEUES"
  scontrol requeue "$job" || {
    say "error: scontrol would not requeue $job; submit the same run with --resume to go on"
    exit "$1"
  }
  exit 0
}

resubmit_without() { # resubmit_without NODES: a running job's excluded nodes cannot be changed, so this is a new job
  local excluded=${EXCLUDE:+$EXCLUDE,}$1 file=$run_dir/slurm/excluded
  [[ ! -s $file ]] || excluded=$(<"$file"),$1
  printf '%s\n' "$excluded" >"$file"
  note end 1 exclude
  say "submitting the run again without $excluded"
  (
    # what Slurm has set for this job would become options of the new one
    for variable in "${!SLURM_@}"; do [[ $variable == SLURM_CONF ]] || unset "$variable"; done
    exec sbatch "${SBATCH_OPTIONS[@]}" --exclude="$excluded" ${array_index:+--array="$array_index"} \
      "$ROOT/launch/slurm/job.sh" "$settings"
  ) || finish 1 stop "error: sbatch did not take the new job"
  exit 1
}

# --- this start -----------------------------------------------------------------------------------------------------

# A node's name need not resolve, nor lead where the other nodes reach it: Slurm knows the address.
node_address() { # node_address NODE
  local address
  address=$(scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || address=
  [[ -n $address ]] || say "scontrol show node $1 gives no NodeAddr: taking its name for its address" >&2
  echo "${address:-$1}"
}

array_index=${SLURM_ARRAY_TASK_ID:-}
mkdir -p -- "$attempt"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#hosts[@]} == NODES)) ||
  finish 2 stop "error: scontrol show hostnames $SLURM_JOB_NODELIST gave ${#hosts[@]} nodes, expected $NODES"
nodes=$(IFS=,; echo "${hosts[*]}")
MASTER_ADDR=$(node_address "${hosts[0]}")
export ROOT PYTHON CPUS_PER_TASK TASKS_PER_NODE RANKS MASTER_ADDR MASTER_PORT=$port
say "$run_name: job $job, start $((restart + 1)), from step $(newest_step), $RANKS ranks on $nodes," \
  "rendezvous $MASTER_ADDR:$MASTER_PORT, logs in $attempt"

# A run is continued when --resume was asked for, or when this submission began it.
resume=()
if [[ -e $run_dir/config.yaml ]]; then
  if ((RESUME)) || (($(noted start) > 0 && $(noted found-a-run) == 0)); then resume=(--resume); fi
elif ((RESUME)) && [[ -z $SWEEP ]] && (($(noted start) == 0)); then
  resume=(--resume) # there is none: the trainer says so. In a sweep, runs without a folder just begin
fi
if [[ -e $run_dir/config.yaml ]] && (($(noted start) == 0 && !RESUME)); then note found-a-run; fi

earlier=$(noted start)
earlier=$((earlier > restart ? earlier : restart)) # a start whose node died early may have left no note
stalled=$(starts_at_this_step)
note start
if ((earlier > MAX_REQUEUES)); then # requeued by Slurm itself, after a lost node or a preemption
  finish 1 stop "error: this is start $((earlier + 1)); MAX_REQUEUES=$MAX_REQUEUES allows $((MAX_REQUEUES + 1))"
elif ((stalled > MAX_STALLED)); then
  finish 1 stop "error: $stalled starts in a row began at step $(newest_step) and left no new checkpoint" \
    "(MAX_STALLED=$MAX_STALLED)"
fi

if [[ $HEALTH_CHECK != 0 ]]; then
  health_command "$nodes" "$MASTER_ADDR"
  run_step "${health[@]}"
  if $cancelled; then finish 143 cancelled "cancelled during the health check"; fi
  if $time_is_up; then requeue 75 "the time was up before training began"; fi
  if ((status != 0)); then
    bad=
    [[ ! -s $attempt/bad_nodes ]] || bad=$(<"$attempt/bad_nodes")
    if [[ -n $bad && $bad != "$nodes" ]] && (($(noted end exclude) < HEALTH_RETRIES)); then resubmit_without "$bad"; fi
    finish 1 unhealthy "error: the health check failed on ${bad:-a node that it could not name (status $status)};" \
      "nothing was started. The reasons are above and in $attempt/health.json"
  fi
fi
if $cancelled; then finish 143 cancelled "cancelled before training began"; fi
if $time_is_up; then requeue 75 "the time was up before training began"; fi

run_step "${ranks_command[@]}" ${resume[@]+"${resume[@]}"}
# No rank is left: the lock of one that was killed must not keep a later job away, which may run on other nodes.
! grep -qs "\"job\": \"${SLURM_JOB_ID:-}\"" "$run_dir/lock" || rm -f -- "$run_dir/lock"
say "the ranks ended with status $status after $((SECONDS - started)) s, at step $(newest_step)"

# The first rank's last words; the others' are beside it.
tail_of_the_log() {
  local log=$attempt/rank_00000.log
  [[ ! -s $log ]] || { echo "--- the end of $log"; tail -n 15 -- "$log"; echo "---"; }
}

case $status in
  0) finish 0 finished "finished" ;;
  75)
    if $cancelled; then finish 75 cancelled "stopped with a checkpoint; cancelled or preempted, so Slurm decides"; fi
    requeue 75 "stopped in order with a checkpoint after step $(newest_step)"
    ;;
  2)
    tail_of_the_log
    finish 2 refused "error: the run was refused (status 2); starting it again would change nothing, so it is not requeued"
    ;;
esac
tail_of_the_log
if $cancelled; then finish "$status" cancelled "cancelled or preempted: Slurm decides whether the job runs again"; fi
# Too early in a start for the signal to be taken, or too long in a step: what was saved before is intact.
if $time_is_up; then requeue 75 "the time was up and the ranks did not stop in order (status $status)"; fi
failures=$(($(noted failed) + 1))
if ((failures > MAX_FAILURES)); then
  finish "$status" failed "error: the run failed with status $status ($failures failed starts, MAX_FAILURES=$MAX_FAILURES):" \
    "not requeued. Submit the same run with --resume to go on from step $(newest_step)"
fi
note failed "$status"
requeue "$status" "the run failed with status $status (failure $failures of at most $MAX_FAILURES that are tried again)"
