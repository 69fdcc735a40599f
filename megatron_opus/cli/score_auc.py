"""How well scores tell good documents from bad ones, where two domains of a corpus say which are which.

    megatron-opus score-auc --corpus data/mail --scores scores/loss scores/opus --good mail --bad spam

Prints a Markdown table: AUC with its bootstrap interval, and the same over pairs of equal length. The length of a
document is a row of its own: a score that does no better is no filter.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.cli.keep import named


def main(argv: Sequence[str], program: str) -> int:
    parser = parser_of("score-auc", program, __doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="the corpus that was scored")
    parser.add_argument("--scores", nargs="+", required=True, metavar="[NAME=]DIR", help="of score-corpus")
    parser.add_argument("--good", required=True, metavar="DOMAIN", help="whose documents should score high")
    parser.add_argument("--bad", required=True, metavar="DOMAIN", help="whose documents should score low")
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
    from megatron_opus.corpus_scores.documents import CorpusDocuments
    from megatron_opus.corpus_scores.score_files import read_scores
    from megatron_opus.corpus_scores.separation import as_markdown, separations

    corpus = CorpusDocuments(arguments.corpus, indexed.open_documents)
    scores = {name: read_scores(directory, corpus) for name, directory in named(arguments.scores).items()}
    rows = separations(corpus, scores, arguments.good, arguments.bad)
    print(f"{rows[0].good} documents of {arguments.good}, {rows[0].bad} of {arguments.bad}\n")
    print(as_markdown(rows))
    return 0
