#!/usr/bin/env bash
# GPT-2 XL (configs/pretrain_gpt2_xl.yaml) on one node of 8 GPUs: data parallel 8, two microbatches for each of the 16
# sequences of an update. submit.sh says what SITE, DRY_RUN and the rest do.
#   SITE=<site> launch/slurm/pretrain_gpt2_xl_8gpus.sh [key=value ...] [--resume]
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh" pretrain_gpt2_xl 1 8 "$@"
