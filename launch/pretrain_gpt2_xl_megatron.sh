#!/bin/sh
''':'
# Pre-trains GPT-2 XL under Megatron's own engine: every value is in configs/pretrain_gpt2_xl_megatron.yaml.
#   deepspeed [--num_gpus N] launch/pretrain_gpt2_xl_megatron.sh [key=value ...] [--resume]
#   bash launch/pretrain_gpt2_xl_megatron.sh [key=value ...]     (DRY_RUN=1 only prints what would run)
# `deepspeed` runs this file with Python, a shell runs it as a shell script: these lines are a string to Python, and
# what follows the here-document mark is not read by the shell. No three single quotes in a row may stand in between.
exec bash "$(dirname -- "$0")/run.sh" "$0" "$@"
: <<'# END'
'''
if __name__ == "__main__":  # worker processes of data loading import this file again
    import sys

    from start import start

    sys.exit(start("pretrain_gpt2_xl_megatron"))
# END
