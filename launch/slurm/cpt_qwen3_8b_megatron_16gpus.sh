#!/usr/bin/env bash
# Qwen3-8B under Megatron's engine (configs/cpt_qwen3_8b_megatron.yaml) on two nodes of 8 GPUs: tensor parallel 2 and two
# pipeline stages inside a node, data parallel 4. An update is 32 sequences, as in the recipe: eight microbatches of one.
#   SITE=<site> launch/slurm/cpt_qwen3_8b_megatron_16gpus.sh [key=value ...] [--resume]
set -euo pipefail
layout=(parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true parallel.pipeline_model_parallel_size=2
  training.micro_batch_size=1 training.global_batch_size=32)
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh" cpt_qwen3_8b_megatron 2 8 "${layout[@]}" "$@"
