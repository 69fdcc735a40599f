#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: tools/gpu_check.sh [--rehearse] [--parts PART ...]
set -euo pipefail

exec python3 -m megatron_opus gpu-check "$@"
