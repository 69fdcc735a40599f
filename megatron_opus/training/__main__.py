"""`python -m megatron_opus.training RECIPE.yaml [key=value ...] [--resume]`: one run in this process alone.

The launch scripts start the same trainer on several ranks; the laboratory starts many of these side by side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.training.main import main


def run(recipe: str, argv: Sequence[str]) -> int:
    """Run one recipe and return 0. With another status the process ends here."""
    status = main(Path(recipe), argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # an orderly end would close process groups in which something may still wait
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python -m megatron_opus.training RECIPE.yaml [key=value ...] [--resume] [--dry-run]")
        sys.exit(2)
    sys.exit(run(sys.argv[1], sys.argv[2:]))
