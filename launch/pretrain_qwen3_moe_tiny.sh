#!/bin/sh
''':'
# Pre-trains a mixture of experts in miniature: every value is in configs/pretrain_qwen3_moe_tiny.yaml.
#   deepspeed [--num_gpus N] launch/pretrain_qwen3_moe_tiny.sh [key=value ...] [--resume]
#   bash launch/pretrain_qwen3_moe_tiny.sh [key=value ...]     (DRY_RUN=1 only prints what would run)
# `deepspeed` runs this file with Python, a shell runs it as a shell script: these lines are a string to Python, and
# what follows the here-document mark is not read by the shell. No three single quotes in a row may stand in between.
exec bash "$(dirname -- "$0")/run.sh" "$0" "$@"
: <<'# END'
'''
if __name__ == "__main__":  # worker processes of data loading import this file again
    import sys

    from start import start

    sys.exit(start("pretrain_qwen3_moe_tiny"))
# END
