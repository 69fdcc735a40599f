#!/usr/bin/env python3
"""Tokens per second of tools/prepare_data.py beside Megatron-LM's approach to preprocessing, on the same file.

    python tools/bench_prepare.py --input wiki.jsonl --tokenizer gpt2:gpt2_files --workers 2 --repeats 5

Both sides use the same tokenizer and as many worker processes, take turns, and must give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_opus.data.plan import expand_files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="a .jsonl file")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="as of tools/prepare_data.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--decontaminate", action="append", default=[], metavar="FILES", help="also time this")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to write (default: the system's)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.workers < 1 or arguments.repeats < 1:
            raise ValueError("--workers and --repeats: expected at least 1")
        if not arguments.input.is_file() or arguments.input.suffix != ".jsonl":
            raise ValueError(f"--input {arguments.input}: expected a .jsonl file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPU libraries that are missing here and not needed
            from megatron_opus.training.bench_prepare import compare, table
        timings = compare(
            arguments.input,
            arguments.tokenizer,
            workers=arguments.workers,
            repeats=arguments.repeats,
            text_key=arguments.text_key,
            benchmarks=expand_files("--decontaminate", arguments.decontaminate),
            directory=arguments.directory,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        print(f"bench_prepare: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.input}, {arguments.workers} workers, median of {arguments.repeats} turns\n")
    print(table(timings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
