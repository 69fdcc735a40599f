#!/usr/bin/env bash
# Qwen3-8B (configs/cpt_qwen3_8b.yaml) on eight nodes of 8 GPUs: tensor parallel 2 inside a node, data parallel 32. An
# update is 32 sequences, as in the recipe: one on every data-parallel rank, more ranks would need a larger batch.
#   SITE=<site> launch/slurm/cpt_qwen3_8b_64gpus.sh [key=value ...] [--resume]
set -euo pipefail
layout=(parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true parallel.zero_stage=2
  training.micro_batch_size=1 training.global_batch_size=32)
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh" cpt_qwen3_8b 8 8 "${layout[@]}" "$@"
