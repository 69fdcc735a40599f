#!/usr/bin/env bash
# Qwen3-8B (configs/cpt_qwen3_8b.yaml) on two nodes of 8 GPUs: tensor parallel 2 inside a node, data parallel 8. An update
# is 32 sequences, as in the recipe: four microbatches of one on every data-parallel rank.
#   SITE=<site> launch/slurm/cpt_qwen3_8b_16gpus.sh [key=value ...] [--resume]
set -euo pipefail
layout=(parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true parallel.zero_stage=2
  training.micro_batch_size=1 training.global_batch_size=32)
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh" cpt_qwen3_8b 2 8 "${layout[@]}" "$@"
