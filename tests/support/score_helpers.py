"""A small corpus of three topics with an empty document, and what the tests of static scores share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_helpers import run, spec, write_jsonl
from proxy_helpers import TOPICS, sentence

from megatron_opus.backends.formats import indexed
from megatron_opus.corpus_scores.documents import CorpusDocuments
from megatron_opus.corpus_scores.score_corpus import score_corpus
from megatron_opus.corpus_scores.score_files import Scores, read_scores
from megatron_opus.corpus_scores.scorer import DocumentScorer


def topic_corpus(root: Path, documents: int = 40, **settings: object) -> Path:
    """Domains `mixed` (all topics in turn), `science` and `sports`; a science proxy, a finance validation set."""
    topics = list(TOPICS)
    mixed = [sentence(topics[i % 3], 100 + i, 20 + 7 * (i % 9)) for i in range(documents)]
    files = {
        "mixed": mixed,
        "science": [sentence("science", i, 30) for i in range(documents // 2)],
        "sports": [sentence("sports", i, 30) for i in range(documents // 2)],
    }
    sets = [spec(name, "candidates", write_jsonl(root / f"{name}.jsonl", texts)) for name, texts in files.items()]
    goal = write_jsonl(root / "goal.jsonl", [sentence("science", 500 + i) for i in range(20)])
    held = write_jsonl(root / "held.jsonl", [sentence("finance", 900 + i) for i in range(10)])
    output = root / "corpus"
    run(output, *sets, spec("goal", "proxy", goal), spec("money", "validation", held), **settings)
    return output


def opened(directory: Path) -> CorpusDocuments:
    return CorpusDocuments(directory, indexed.open_documents)


def scored(directory: Path, scorer: DocumentScorer, output: Path) -> Scores:
    corpus = opened(directory)
    assert score_corpus(corpus, scorer, output, progress=False, say=lambda _: None)
    return read_scores(output, corpus)


def topic_of(corpus: CorpusDocuments, domain: str) -> np.ndarray:
    """[documents] of the topics that the documents of a domain name at their ends."""
    number = [entry.name for entry in corpus.entries].index(domain)
    texts = [corpus.text(corpus.one(number, i)) for i in range(corpus.entries[number].documents)]
    return np.array([next(topic for topic in TOPICS if topic in text) for text in texts])
