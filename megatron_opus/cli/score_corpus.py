"""One number for every candidate document of a prepared corpus.

    megatron-opus score-corpus --corpus data/web --scorer dsir --target proxy --output scores/dsir
    megatron-opus score-corpus --corpus data/web --scorer betr --benchmarks mmlu=mmlu_test.jsonl --output scores/betr
    megatron-opus score-corpus --corpus data/web --scorer column --score-key edu --output scores/edu
    megatron-opus score-corpus --corpus data/web --scorer loss --model SmolLM2-135M --output scores/loss
    megatron-opus score-corpus --corpus data/web --scorer color --prior runs/prior --conditional runs/conditional \\
        --output scores/color
    megatron-opus score-corpus --corpus data/web --scorer opus --model runs/tiny --target proxy --output scores/opus
    megatron-opus score-corpus --corpus data/web --scorer nag --model SmolLM2-135M --target proxy --output scores/nag

Run the same command again to go on with an interrupted one. `megatron-opus keep` takes part of the corpus by it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opus.cli import parser_of
from megatron_opus.cli.build_proxy import pairs, part

if TYPE_CHECKING:
    from megatron_opus.corpus_scores.documents import CorpusDocuments

LEXICAL = ("dsir", "classifier", "similarity", "betr", "column")
MODELS = ("loss", "min-k", "color", "opus", "nag")


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("score-corpus", program, __doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="a prepared corpus")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the scores")
    parser.add_argument("--scorer", choices=LEXICAL + MODELS, required=True)
    parser.add_argument(
        "--target",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE",
        help="files of text, NAME=FILE of a benchmark, or `proxy`, the corpus's own; of all but column and losses",
    )
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="of similarity and betr, beside or instead of a target",
    )
    parser.add_argument("--encoder", default="lexical", help="of similarity and betr (default lexical)")
    parser.add_argument("--device", help="of a sentence encoder (default: cuda where there is one)")
    parser.add_argument("--similarities", type=Path, metavar="DIR", help="of build-proxy --scores, used again")
    parser.add_argument("--score-key", default="", help="of column: the one with which the corpus was prepared")
    parser.add_argument("--fasttext", type=Path, metavar="FILE", help="of classifier: a fastText model (.bin) as it is")
    parser.add_argument("--label", default="__label__1", help="of that model: whose probability is the score")
    parser.add_argument("--per", choices=("document", "ngram"), default="document", help="of dsir (default document)")
    parser.add_argument("--columns", type=int, help="of hashed n-grams, a power of two")
    parser.add_argument("--sample-tokens", metavar="N", help="of the corpus, to learn from: 10M, 1B, ...")
    parser.add_argument("--seed", type=int, default=0, help="of that sample, or of the proxy's windows (default 0)")
    model = parser.add_argument_group("models: a Hugging Face directory (GPT-2, Qwen3, Llama), a run or a checkpoint")
    model.add_argument(
        "--model", nargs="+", action="extend", default=[], type=Path, metavar="DIR",
        help="of loss, min-k, opus and nag; the scores of several are averaged",
    )  # fmt: skip
    model.add_argument("--prior", type=Path, metavar="DIR", help="of color: the model before it saw the target")
    model.add_argument(
        "--conditional", type=Path, metavar="DIR", help="of color: the same model, trained on the target"
    )
    model.add_argument("--window", type=int, default=512, help="tokens that a model reads at once (default 512)")
    model.add_argument(
        "--windows", type=int, default=8, help="at most so many of a document, evenly spread (default 8)"
    )
    model.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default fp32)")
    model.add_argument("--min-k", type=float, default=0.2, metavar="SHARE", help="of min-k (default 0.2)")
    model.add_argument(
        "--geometry", choices=("auto", "adamw", "muon", "sgd"), default="auto",
        help="of opus: auto is the checkpoint's own optimizer state, sgd needs none (default auto)",
    )  # fmt: skip
    model.add_argument("--neurons", type=int, default=20, help="of nag: neurons of a layer in a graph (default 20)")
    model.add_argument("--normalise", action="store_true", help="of opus: divide by the norm of the update")
    model.add_argument("--proxy-windows", type=int, default=64, help="of opus: windows of the target (default 64)")
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
    scorer = build_model_scorer(arguments) if arguments.scorer in MODELS else build_scorer(arguments, corpus)
    if score_corpus(corpus, scorer, arguments.output, part=part(arguments.part), say=print):
        print(f"{arguments.output}: choose with `megatron-opus keep --scores {arguments.output}`")
    return 0


def build_scorer(arguments: argparse.Namespace, corpus: CorpusDocuments):  # type: ignore[no-untyped-def]
    """Return the scorer that the arguments describe. Raises ScoreError, BenchmarkError, EncoderError."""
    from megatron_opus.corpus_scores.documents import ScoreError
    from megatron_opus.corpus_scores.lexical import Betr, Classifier, Column, Dsir, FastText, Similarity
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
    if arguments.scorer == "classifier" and arguments.fasttext is not None:
        return FastText(arguments.fasttext, arguments.label)
    if arguments.scorer == "classifier":
        return Classifier(arguments.target, seed=arguments.seed, **options)
    lexical = arguments.encoder == encoders.LEXICAL
    encoder = encoders.LexicalEncoder() if lexical else encoders.SentenceEncoder(arguments.encoder, arguments.device)
    items = load_benchmarks(pairs(arguments.benchmarks)) if arguments.benchmarks or not arguments.target else []
    if arguments.target:
        items += corpus.target_items(arguments.target)
    scoring = Scoring(directory=arguments.output / "similarity", items=items, encoder=encoder, seed=42)
    if arguments.scorer == "similarity":
        return Similarity(scoring, arguments.similarities)
    return Betr(scoring, seed=arguments.seed, **options)


def build_model_scorer(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """Return the scorer by models that the arguments describe. Raises ScoreError."""
    from megatron_opus.corpus_scores.documents import ScoreError
    from megatron_opus.corpus_scores.model_losses import Color, Loss, MinK
    from megatron_opus.corpus_scores.neuron_graph import NeuronGraph
    from megatron_opus.corpus_scores.reference_model import Windowing, take_gpu
    from megatron_opus.corpus_scores.update_utility import Opus

    take_gpu(part(arguments.part)[0])
    how = {
        "windowing": Windowing(tokens=arguments.window, most=arguments.windows),
        "precision": arguments.precision,
    }
    if arguments.scorer == "loss":
        return Loss(arguments.model, **how)
    if arguments.scorer == "min-k":
        return MinK(arguments.model, share=arguments.min_k, **how)
    if arguments.scorer == "nag":
        return NeuronGraph(arguments.model, arguments.target, neurons=arguments.neurons, **how)
    if arguments.scorer == "opus":
        return Opus(
            arguments.model,
            arguments.target,
            geometry=arguments.geometry,
            normalise=arguments.normalise,
            proxy_windows=arguments.proxy_windows,
            seed=arguments.seed,
            **how,
        )
    if arguments.prior is None or arguments.conditional is None:
        raise ScoreError("color: expected --prior DIR and --conditional DIR, got one or none of them")
    return Color(arguments.prior, arguments.conditional, **how)
