"""One number for every candidate document of a prepared corpus.

    megatron-opus score-corpus --corpus data/web --scorer dsir --target proxy --output scores/dsir
    megatron-opus score-corpus --corpus data/web --scorer betr --benchmarks mmlu=mmlu_test.jsonl --output scores/betr
    megatron-opus score-corpus --corpus data/web --scorer column --score-key edu --output scores/edu

Run the same command again to go on with an interrupted one. `megatron-opus keep` takes part of the corpus by it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.cli.build_proxy import pairs, part

SCORERS = ("dsir", "classifier", "similarity", "betr", "column")


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("score-corpus", program, __doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="a prepared corpus")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the scores")
    parser.add_argument("--scorer", choices=SCORERS, required=True)
    parser.add_argument(
        "--target",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE",
        help="of dsir and classifier: files of text, NAME=FILE of a benchmark, or `proxy` for the corpus's own proxy",
    )
    parser.add_argument(
        "--benchmarks", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="of similarity and betr"
    )
    parser.add_argument("--encoder", default="lexical", help="of similarity and betr (default lexical)")
    parser.add_argument("--device", help="of a sentence encoder (default: cuda where there is one)")
    parser.add_argument("--similarities", type=Path, metavar="DIR", help="of build-proxy --scores, used again")
    parser.add_argument("--score-key", default="", help="of column: the one with which the corpus was prepared")
    parser.add_argument("--per", choices=("document", "ngram"), default="document", help="of dsir (default document)")
    parser.add_argument("--columns", type=int, help="of hashed n-grams, a power of two")
    parser.add_argument("--sample-tokens", metavar="N", help="of the corpus, to learn from: 10M, 1B, ...")
    parser.add_argument("--seed", type=int, default=0, help="of that sample (default 0)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="score only part I of N, for N processes at once")
    return parser.parse_args(argv)


def main(argv: Sequence[str], program: str) -> int:
    arguments = parse(argv, program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
    from megatron_opus.corpus_scores.documents import CorpusDocuments
    from megatron_opus.corpus_scores.score_corpus import score_corpus

    corpus = CorpusDocuments(arguments.corpus, indexed.open_documents)
    scorer = build_scorer(arguments)
    if score_corpus(corpus, scorer, arguments.output, part=part(arguments.part), say=print):
        print(f"{arguments.output}: choose with `megatron-opus keep --scores {arguments.output}`")
    return 0


def build_scorer(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """Return the scorer that the arguments describe. Raises ScoreError, BenchmarkError, EncoderError."""
    from megatron_opus.corpus_scores.documents import ScoreError
    from megatron_opus.corpus_scores.lexical import Betr, Classifier, Column, Dsir, Similarity
    from megatron_opus.data.benchmarks.items import load_benchmarks
    from megatron_opus.data.proxy import encoders
    from megatron_opus.data.proxy.build import parse_tokens
    from megatron_opus.data.proxy.similarity import Scoring

    chosen = {"columns": arguments.columns, "sample_tokens": arguments.sample_tokens}
    options = {name: value for name, value in chosen.items() if value is not None}
    if "sample_tokens" in options:
        options["sample_tokens"] = parse_tokens(options["sample_tokens"])
    if arguments.scorer == "column":
        if not arguments.score_key:
            raise ScoreError("column: expected --score-key NAME, got none")
        return Column(arguments.score_key)
    if arguments.scorer == "dsir":
        return Dsir(arguments.target, per=arguments.per, seed=arguments.seed, **options)
    if arguments.scorer == "classifier":
        return Classifier(arguments.target, seed=arguments.seed, **options)
    lexical = arguments.encoder == encoders.LEXICAL
    encoder = encoders.LexicalEncoder() if lexical else encoders.SentenceEncoder(arguments.encoder, arguments.device)
    items = load_benchmarks(pairs(arguments.benchmarks))
    scoring = Scoring(directory=arguments.output / "similarity", items=items, encoder=encoder, seed=42)
    if arguments.scorer == "similarity":
        return Similarity(scoring, arguments.similarities)
    return Betr(scoring, seed=arguments.seed, **options)
