"""Hugging Face GPT-2, Qwen3 and Llama models to sharded weights, and trained weights back to Hugging Face.

    megatron-opus convert-checkpoint hf-to-opus --input Qwen3-8B --output weights/qwen3_8b_tp2 \\
        --tensor-model-parallel-size 2
    megatron-opus convert-checkpoint opus-to-hf --input runs/cpt_qwen3_8b --output exported/qwen3_8b

A run starts from either directory with model.init_from=DIR (the Hugging Face one as it is, at any tensor-parallel
degree). opus-to-hf takes a run folder (its newest checkpoint), one checkpoint, or a directory of hf-to-opus; it needs
no GPU and no second process, and holds about one tensor in memory.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("convert-checkpoint", program, __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("hf-to-opus", help="a Hugging Face directory to one file per tensor-parallel rank")
    back = commands.add_parser("opus-to-hf", help="a run, a checkpoint or converted weights to a Hugging Face one")
    for command in (there, back):
        command.add_argument("--input", type=Path, required=True, metavar="DIR")
        command.add_argument("--output", type=Path, required=True, metavar="DIR")
        command.add_argument("--overwrite", action="store_true", help="replace a model that is in DIR already")
        command.add_argument(
            "--precision", choices=("keep", "fp32", "bf16"), default="keep", help="of the output (default: as it is)"
        )
    there.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T")
    there.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="as in the recipe")
    back.add_argument("--max-shard-gb", type=float, default=5.0, help="size of one weight file (default 5)")
    back.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer files to copy (default: the weights' or the data's)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str], program: str) -> int:
    arguments = parse(argv, program)
    with warnings.catch_warnings():
        # Here rather than above: the imports take seconds, and a mistyped option should not.
        warnings.simplefilter("ignore")
        from megatron_opus.weights.convert import hf_to_opus, opus_to_hf
    if arguments.command == "hf-to-opus":
        done = hf_to_opus(
            arguments.input,
            arguments.output,
            tp_size=arguments.tensor_model_parallel_size,
            make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
            precision=arguments.precision,
            overwrite=arguments.overwrite,
        )
    else:
        done = opus_to_hf(
            arguments.input,
            arguments.output,
            precision=arguments.precision,
            max_shard_bytes=int(arguments.max_shard_gb * 1e9),
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
        )
    beside = ", ".join(done.companions) or "no tokenizer files found"
    print(f"{done.output}: {done.tensors} tensors, {done.bytes / 1e9:.3f} GB; {beside}")
    if done.notice:
        print(f"convert_checkpoint: {done.notice}", file=sys.stderr)
    return 0
