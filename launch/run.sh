#!/usr/bin/env bash
# The bash half of launch/pretrain_*.sh and cpt_*.sh: `run.sh SCRIPT [key=value ...]` becomes
# `deepspeed SCRIPT [key=value ...]`.
#   DEEPSPEED_ARGS   options of the launcher: DEEPSPEED_ARGS="--num_gpus 2 --master_port 29501"
#   DRY_RUN=1        print the command and the resolved configuration, start nothing
set -euo pipefail

script=$1
shift
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)

if ! command -v deepspeed >/dev/null 2>&1; then
  if [[ ! -x $root/.venv/bin/deepspeed ]]; then
    echo "error: deepspeed: expected on PATH or in $root/.venv/bin, found in neither." \
      "Run $root/launch/quickstart.sh once, or activate the environment it is installed in." >&2
    exit 127
  fi
  export PATH="$root/.venv/bin:$PATH"
fi
python=$(dirname -- "$(command -v deepspeed)")/python3 # PATH's own python3 may belong to another environment
[[ -x $python ]] || python=python3

if [[ -n ${LOCAL_RANK:-} ]]; then # a launcher started this file itself: `deepspeed --no_python`, `torchrun --no-python`
  exec "$python" -u "$script" "$@"
fi

read -r -a launcher_args <<<"${DEEPSPEED_ARGS:-}"
command=(deepspeed ${launcher_args[@]+"${launcher_args[@]}"} "$script" "$@")
if [[ ${DRY_RUN:-0} != 0 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exec "$python" -u "$script" "$@"
fi
exec "${command[@]}"
