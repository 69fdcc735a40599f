#!/usr/bin/env bash
# From a fresh clone to a pre-trained model, on a machine without a GPU:
#   ./launch/quickstart.sh             OPUS on the embedded corpus, tensor-parallel over two processes
#   ./launch/quickstart.sh --compare   also the random baseline with the same update tokens, and both side by side
# Further arguments override the recipe (configs/pretrain_gpt2_tiny.yaml): training.train_steps=100 name=mine
# Every start is a new run folder, unless name= says which; add --resume to continue that one.
#   RANKS   processes to start (2, or as many as there are GPUs where that is 1)
set -euo pipefail

cd -- "$(dirname -- "$0")/.."
compare=false
name=quickstart-$(date +%Y%m%d-%H%M%S)
runs=runs
overrides=()
for argument in "$@"; do
  case $argument in
    --compare) compare=true ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
    name=*) name=${argument#name=} ;;
    output_dir=*) runs=${argument#output_dir=} overrides+=("$argument") ;;
    *) overrides+=("$argument") ;;
  esac
done

bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
if [[ -z ${RANKS:-} ]]; then
  RANKS=$(python3 -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
fi

# train NAME [key=value ...]: one run. Its processes are a group of their own, so that one signal ends all of them:
# the launcher alone does not pass a SIGTERM on.
train() {
  local port command status=0
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  command=(deepspeed --quiet --num_gpus "$RANKS" --master_port "$port" launch/pretrain_gpt2_tiny.sh
    "parallel.tensor_model_parallel_size=$RANKS" ${overrides[@]+"${overrides[@]}"} "name=$1" "${@:2}")
  printf '\n+'
  printf ' %q' "${command[@]}"
  printf '\n'
  interrupted=false group=
  trap 'interrupted=true; [[ -z $group ]] || kill -TERM -- "-$group" 2>/dev/null || true' INT TERM HUP
  set -m
  "${command[@]}" &
  group=$!
  set +m
  wait "$group" || status=$?
  if $interrupted; then
    while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
    printf '\nInterrupted. To continue:\n  ' >&2
    printf '%q ' ./launch/quickstart.sh "name=$1" ${overrides[@]+"${overrides[@]}"} "${@:2}" --resume >&2
    echo >&2
    exit 130
  fi
  trap - INT TERM HUP
  if ((status != 0)); then
    echo "error: the run $1 ended with status $status; its last lines above say why." >&2
    exit "$status"
  fi
}

train "$name"
if $compare; then
  train "$name-random" selection.strategy=random
fi

cat <<END

Everything of this run is in $runs/$name:
  config.yaml     every value it ran with
  metrics.jsonl   one line per step: losses, tokens, learning rate, selection, times
  ledger/         Parquet, one row per candidate and step: what was offered, its score, what was drawn
  tensorboard/    .venv/bin/tensorboard --logdir $runs
END
if $compare; then
  echo
  python3 tools/compare_runs.py "$runs/$name" "$runs/$name-random"
fi
