"""`python -m megatron_opus.training RECIPE.yaml [key=value ...] [--resume]`: one run in this process alone.

The launch scripts start the same trainer on several ranks; tools/experiment.py starts many of these side by side.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_opus.training.main import main

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python -m megatron_opus.training RECIPE.yaml [key=value ...] [--resume] [--dry-run]")
        sys.exit(2)
    status = main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # an orderly end would close process groups in which something may still wait
