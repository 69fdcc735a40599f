"""Part of a prepared corpus, by its scores. Nothing is copied: the output refers to the corpus's files.

    megatron-opus keep --corpus data/web --scores scores/dsir --rule gumbel:0.5 --token-budget 10B --output kept
    megatron-opus keep --corpus data/web --scores d=scores/dsir e=scores/edu --rule "top@d and top@e" --share 0.3 \\
        --output data/web_both

Rules: top, bottom, band:A-B, gumbel:TAU[:raw], axes:K, each also after `per-domain:`, joined by `and` and `or`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("keep", program, __doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="the corpus that was scored")
    parser.add_argument("--scores", nargs="+", required=True, metavar="[NAME=]DIR", help="of score-corpus")
    parser.add_argument("--rule", required=True, help="for example top, or `gumbel:0.5@NAME and band:0.1-0.9@OTHER`")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--token-budget", metavar="N", help="tokens to keep: 10B, 300M, ...")
    parser.add_argument("--share", type=float, help="of the candidates' tokens to keep, instead of a budget")
    parser.add_argument(
        "--duplicates", default="", metavar="KIND", help="leave copies out first: exact, or near:0.8 (needs datasketch)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of Gumbel noise (default 0)")
    return parser.parse_args(argv)


def named(values: Sequence[str]) -> dict[str, Path]:
    """Return name -> directory of `NAME=DIR` or `DIR`, whose name is that of the folder. Raises ScoreError."""
    from megatron_opus.corpus_scores.documents import ScoreError

    found: dict[str, Path] = {}
    for value in values:
        name, sep, path = value.partition("=")
        directory = Path(path if sep else value)
        name = name if sep else directory.resolve().name
        if name in found:
            raise ScoreError(f"--scores: expected another name for each directory, got {name} twice; write NAME=DIR")
        found[name] = directory
    return found


def main(argv: Sequence[str], program: str) -> int:
    arguments = parse(argv, program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
    from megatron_opus.corpus_scores.documents import CorpusDocuments
    from megatron_opus.corpus_scores.keep import KeepConfig, keep
    from megatron_opus.data.proxy.build import parse_tokens

    budget = None if arguments.token_budget is None else parse_tokens(arguments.token_budget)
    config = KeepConfig(
        corpus=arguments.corpus,
        scores=named(arguments.scores),
        rule=arguments.rule,
        output=arguments.output,
        token_budget=budget,
        share=arguments.share,
        seed=arguments.seed,
        duplicates=arguments.duplicates,
    )
    manifest = keep(config, CorpusDocuments(arguments.corpus, indexed.open_documents), print)
    for entry in manifest.datasets:
        print(f"{entry.role:<12}{entry.name:<24}{entry.documents:>12,} documents{entry.tokens:>16,} tokens")
    print(f"\n{arguments.output}: train on it with data={arguments.output}; who left is in dropped.parquet")
    return 0
