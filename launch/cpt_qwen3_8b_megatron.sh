#!/bin/sh
''':'
# Continues Qwen3-8B under Megatron's own engine, on stages: every value is in configs/cpt_qwen3_8b_megatron.yaml.
#   deepspeed [--num_gpus N] launch/cpt_qwen3_8b_megatron.sh [key=value ...] [--resume]
#   bash launch/cpt_qwen3_8b_megatron.sh [key=value ...]     (DRY_RUN=1 only prints what would run)
# `deepspeed` runs this file with Python, a shell runs it as a shell script: these lines are a string to Python, and
# what follows the here-document mark is not read by the shell. No three single quotes in a row may stand in between.
exec bash "$(dirname -- "$0")/run.sh" "$0" "$@"
: <<'# END'
'''
if __name__ == "__main__":  # worker processes of data loading import this file again
    import sys

    from start import start

    sys.exit(start("cpt_qwen3_8b_megatron"))
# END
