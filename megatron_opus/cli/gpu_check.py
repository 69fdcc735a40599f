"""Check on one GPU what every other machine leaves unmeasured, and write one JSON and one Markdown table.

    megatron-opus gpu-check                      # everything, at most 9 minutes on one H100 or H200
    megatron-opus gpu-check --parts cost syncs   # every part can run alone
    megatron-opus gpu-check --rehearse           # the same lines with tiny sizes, on any machine

The files are named by the card. A rehearsal says that it is one; its numbers say nothing about a GPU.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.config import ConfigError

PARTS = ("tests", "precision", "cost", "syncs")


def main(argv: Sequence[str], program: str) -> int:
    parser = parser_of("gpu-check", program, __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of `cost` (default 5)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ConfigError(f"--repeats: expected at least 1, got {args.repeats}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that are not there
        import torch

        from megatron_opus.studies.bench import gpu_check, report

        if not args.rehearse and not torch.cuda.is_available():
            raise ConfigError("gpu-check: expected a GPU, found none; --rehearse runs the same lines with tiny sizes")
        shapes = (gpu_check.TINY,) if args.rehearse else gpu_check.SHAPES
        found = gpu_check.run(args.parts, shapes, args.repeats, lambda text: print(text, file=sys.stderr, flush=True))
    for part, rows in found.items():
        print(f"{part}\n\n{report.table(rows)}\n")
    for path in gpu_check.write(args.output, found, [*program.split(), *argv], rehearsal=args.rehearse):
        print(path)
    return 0
