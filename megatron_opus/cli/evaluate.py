"""Benchmarks and perplexity of a run's checkpoint, offline: exported to Hugging Face files and put to lm-eval.

    megatron-opus evaluate runs/NAME --benchmarks mmlu=mmlu/test.jsonl arc_easy=arc_easy_test.jsonl
    megatron-opus evaluate runs/NAME --checkpoint 500 --benchmarks piqa=piqa_val.jsonl --limit 200
    megatron-opus evaluate --model exported/qwen3_8b --benchmarks winogrande=winogrande_val.jsonl --device cuda

A benchmark is a JSONL or Parquet file with the fields of its Hugging Face data set, or with query, choices and gold.
Writes evaluation.json into the run folder; docs/evaluation.md has its schema, the prompts and the scoring rules.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opus.cli import parser_of


def name_and_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, Path(path)


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("evaluate", program, __doc__)
    add = parser.add_argument
    add("run_dir", type=Path, nargs="?", metavar="RUN", help="run folder; its export is kept in RUN/exported")
    add("--model", type=Path, metavar="DIR", help="an exported Hugging Face model instead of a run")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest complete one")
    add("--benchmarks", type=name_and_file, nargs="+", default=[], metavar="NAME=FILE")
    add("--fewshot", type=name_and_file, nargs="+", default=[], metavar="NAME=FILE", help="where examples come from")
    add("--num-fewshot", type=int, default=0, metavar="N", help="examples before each question (default 0)")
    add("--limit", type=int, metavar="N", help="questions per benchmark, at even distances (default: all)")
    add("--no-perplexity", action="store_true", help="benchmarks only; the run's data is not needed then")
    add("--eval-sequences", type=int, metavar="N", help="per validation domain; 0: all (default: as the run did)")
    add("--data", type=Path, metavar="DIR", help="prepared data whose validation sets a --model is evaluated on")
    add("--batch-size", type=int, default=8, metavar="N")
    add("--device", default="auto", metavar="cpu|cuda", help="default: cuda where there is one")
    add("--max-length", type=int, metavar="N", help="tokens that the model reads at once (default: the model's)")
    add("--skip-too-long", action="store_true", help="leave out, and count, questions whose answers are longer")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer files for the export (default: the run's)")
    add("--tasks-dir", type=Path, metavar="DIR", help="keep the task files, for lm_eval --include_path DIR")
    add("--output", type=Path, metavar="FILE", help="default: RUN/evaluation.json; an earlier one is renamed")
    return parser.parse_args(argv)


def main(argv: Sequence[str], program: str) -> int:
    arguments = vars(parse(argv, program))
    with warnings.catch_warnings():
        # Here rather than above: the imports take seconds, and a mistyped option should not.
        warnings.simplefilter("ignore")
        from megatron_opus.evaluation.harness import offline

        with offline():  # before anything imports the libraries that read it
            from megatron_opus.evaluation.evaluate import Settings, evaluate, summary
    arguments["perplexity"] = not arguments.pop("no_perplexity")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    settings = Settings(**given)
    print(summary(evaluate(settings, say=lambda text: print(text, file=sys.stderr, flush=True))))
    return 0
