"""A proxy out of a prepared corpus: the documents most like benchmarks (BENCH-PROXY), or a random held-out split.

    megatron-opus build-proxy --corpus data/pile --output data/pile_benchproxy --token-budget 30M \\
        --benchmarks mmlu=mmlu_test.jsonl arc_easy=arc_easy_test.jsonl --encoder lexical
    megatron-opus build-proxy --corpus data/pile --output data/pile_std --kind std --token-budget 30M

The output trains as data=DIR: candidates without the proxy documents, the proxy, the corpus' validation sets. It refers
to the corpus' files instead of copying them. Run the same command again to go on with an interrupted one.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.config import ConfigError
from megatron_opus.data.manifest import Manifest

ARCTIC = "Snowflake/snowflake-arctic-embed-l-v2.0"


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("build-proxy", program, __doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="made by megatron-opus prepare-data")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--kind", choices=("bench", "std"), default="bench", help="by similarity (default), or random")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="JSONL or Parquet; mmlu, anli, hellaswag, piqa, siqa, winogrande, arc_easy, arc_challenge, "
        "commonsense_qa, wsc, openbookqa, sciq, race_m, race_h, ax_b, ax_g, story_cloze, "
        "or any name for rows of query, choices, gold",
    )
    parser.add_argument("--token-budget", default="30M", metavar="N", help="tokens of the proxy (default 30M)")
    parser.add_argument(
        "--encoder",
        default=ARCTIC,
        metavar="NAME",
        help=f"`lexical` (needs no model), or a sentence-transformers name or directory (default {ARCTIC})",
    )
    parser.add_argument("--device", help="of the encoder: cuda, cuda:1, cpu (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts that the encoder sees at once (default 16)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="of a document at once (default: what fits)")
    parser.add_argument(
        "--windows",
        choices=("first", "all"),
        default="first",
        help="of documents longer than that: compare the first (default), or all and take the best",
    )
    parser.add_argument("--scores", type=Path, metavar="DIR", help="of the similarities (default OUTPUT/scores)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="score only part I of N, for N processes at once")
    parser.add_argument("--seed", type=int, default=42, help="of a random proxy (default 42)")
    return parser.parse_args(argv)


def pairs(values: list[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for value in values:
        name, sep, path = value.partition("=")
        if not sep or not name or not path:
            raise ConfigError(f"--benchmarks {value!r}: expected NAME=FILE, for example arc_easy=arc_easy_test.jsonl")
        found.append((name, path))
    return tuple(found)


def part(text: str) -> tuple[int, int]:
    first, sep, second = text.partition("/")
    if not sep or not first.isdecimal() or not second.isdecimal():
        raise ConfigError(f"--part {text!r}: expected I/N, for example 0/8 to 7/8")
    return int(first), int(second)


def build(arguments: argparse.Namespace) -> Manifest | None:
    from megatron_opus.data.proxy import build as bench_proxy
    from megatron_opus.data.proxy import encoders
    from megatron_opus.data.proxy import report as proxy_report

    benchmarks, budget = pairs(arguments.benchmarks), bench_proxy.parse_tokens(arguments.token_budget)
    proxy_report.check_pictures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
    encoder: encoders.Encoder | None = None
    if arguments.kind == "bench" and benchmarks:
        if arguments.encoder == encoders.LEXICAL:
            encoder = encoders.LexicalEncoder(window=arguments.window)
        else:
            encoder = encoders.SentenceEncoder(
                arguments.encoder, arguments.device, arguments.batch_size, arguments.precision, arguments.window
            )
    return bench_proxy.build(
        bench_proxy.ProxyConfig(
            corpus=arguments.corpus,
            output=arguments.output,
            kind=arguments.kind,
            benchmarks=benchmarks,
            encoder=encoder,
            token_budget=budget,
            windows=arguments.windows,
            scores=arguments.scores,
            seed=arguments.seed,
            part=part(arguments.part),
        ),
        indexed,
        log=print,
    )


def main(argv: Sequence[str], program: str) -> int:
    arguments = parse(argv, program)
    manifest = build(arguments)
    if manifest is not None:
        for entry in manifest.datasets:
            print(f"{entry.role:<12}{entry.name:<24}{entry.documents:>12,} documents{entry.tokens:>16,} tokens")
        print(f"\n{arguments.output}: train on it with data={arguments.output}; read {arguments.output / 'report.txt'}")
    return 0
