"""One run in this process alone: the launch scripts start the same trainer on several ranks.

    megatron-opus train configs/pretrain_gpt2_tiny.yaml data=embedded training.train_steps=20

It ends with status 0 when it is done, 1 when it failed while running, 2 when it was refused before anything was built,
and 75 when it stopped in order with a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_opus.cli import parser_of


def main(argv: Sequence[str], program: str) -> int:
    parser = parser_of("train", program, __doc__)
    parser.usage = f"{program} RECIPE.yaml [key=value ...] [--resume] [--dry-run]"
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="overrides key=value, --resume, --dry-run"
    )
    arguments = parser.parse_args(argv)
    from megatron_opus.training.__main__ import run

    return run(arguments.recipe, arguments.rest)
