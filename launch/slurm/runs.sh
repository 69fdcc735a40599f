# shellcheck shell=bash disable=SC2153,SC2154  # what is not set here, the sourcing script sets
# What submit.sh and job.sh agree on: which run an array index is, where it lies, how far it has come.

sweep_size() {
  local -a seeds strategies
  read -r -a seeds <<<"$SEEDS"
  read -r -a strategies <<<"$STRATEGIES"
  echo $((${#seeds[@]} * ${#strategies[@]}))
}

# select_run INDEX: sets run_name, run_dir and RUN_OVERRIDES, what this run adds to the common overrides. Strategies
# change fastest: the first indices are all strategies at the first seed, which can be compared before the rest has run.
select_run() {
  if [[ -z $SWEEP ]]; then
    run_name=$NAME run_dir=$OUTPUT_DIR/$NAME
    RUN_OVERRIDES=()
    return
  fi
  local -a seeds strategies
  read -r -a seeds <<<"$SEEDS"
  read -r -a strategies <<<"$STRATEGIES"
  local strategy=${strategies[$1 % ${#strategies[@]}]} seed=${seeds[$1 / ${#strategies[@]}]}
  run_name=$strategy-$seed run_dir=$OUTPUT_DIR/$strategy-$seed
  # shellcheck disable=SC2034  # read by those that source this file
  RUN_OVERRIDES=("name=$run_name" "output_dir=$OUTPUT_DIR" "seed=$seed" "selection.strategy=$strategy")
}

# The step of the newest complete checkpoint of the run, 0 without one.
newest_step() {
  local marker step newest=0
  for marker in "$run_dir"/checkpoints/step_*/complete.json; do
    if [[ -e $marker && $marker =~ /step_([0-9]+)(\.[0-9]+)?/complete\.json$ ]]; then
      step=$((10#${BASH_REMATCH[1]}))
      newest=$((step > newest ? step : newest))
    fi
  done
  echo "$newest"
}

# --- the record of starts: slurm/starts.tsv in the run folder, one line per event, never rewritten -------------------
#   submission  event  job  restart  step  time  [status  what was decided]

note() { # note EVENT [STATUS DECISION]
  mkdir -p -- "$run_dir/slurm"
  printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$SUBMISSION" "$1" "$job" "$restart" "$(newest_step)" \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${2:--}" "${3:--}" >>"$run_dir/slurm/starts.tsv"
}

# noted EVENT [DECISION]: how often this submission has noted it.
noted() {
  [[ -e $run_dir/slurm/starts.tsv ]] || { echo 0; return; }
  awk -F '\t' -v s="$SUBMISSION" -v e="$1" -v d="${2:-}" \
    '$1 == s && $2 == e && (d == "" || $8 == d) { n++ } END { print n + 0 }' "$run_dir/slurm/starts.tsv"
}

# How many of the last starts of this submission in a row began at the step where the run stands now.
starts_at_this_step() {
  [[ -e $run_dir/slurm/starts.tsv ]] || { echo 0; return; }
  awk -F '\t' -v s="$SUBMISSION" -v step="$(newest_step)" \
    '$1 == s && $2 == "start" { n = $5 == step ? n + 1 : 0 } END { print n + 0 }' "$run_dir/slurm/starts.tsv"
}
