"""One HTML page about the scores of a corpus: histograms, documents with their text, agreement, what rules would keep.

    megatron-opus score-report --corpus data/web --scores scores/dsir
    megatron-opus score-report --corpus data/web --scores d=scores/dsir e=scores/edu --rules "top@d and top@e" \\
        --share 0.3 --output scores.html

The file needs nothing beside itself: no scripts, no network.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.cli.keep import named


def main(argv: Sequence[str], program: str) -> int:
    parser = parser_of("score-report", program, __doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="the corpus that was scored")
    parser.add_argument("--scores", nargs="+", required=True, metavar="[NAME=]DIR", help="of score-corpus")
    parser.add_argument("--rules", nargs="+", default=[], help="as of keep; default: the usual ones of every scoring")
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens that they may keep (default 0.5)")
    parser.add_argument("--output", type=Path, default=Path("scores.html"), help="default scores.html")
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
    from megatron_opus.corpus_scores.documents import CorpusDocuments
    from megatron_opus.corpus_scores.score_page import write_score_page

    write_score_page(
        CorpusDocuments(arguments.corpus, indexed.open_documents),
        named(arguments.scores),
        arguments.output,
        rules=arguments.rules,
        share=arguments.share,
        command=f"{program} {shlex.join(argv)}",
    )
    print(arguments.output)
    return 0
