"""Lexical scorers: their numbers by hand, what they are for, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from data_helpers import run, spec, write_jsonl
from proxy_helpers import built, science_questions, sentence
from score_helpers import opened, scored, topic_corpus, topic_of

from megatron_opus.corpus_scores.documents import Block, ScoreError
from megatron_opus.corpus_scores.lexical import Betr, Classifier, Column, Dsir, Similarity
from megatron_opus.corpus_scores.ngrams import check_columns, counts_matrix, features, hashed_ngrams
from megatron_opus.data.benchmarks.items import load_benchmarks
from megatron_opus.data.prepare.records import ReadOptions
from megatron_opus.data.proxy.encoders import LexicalEncoder
from megatron_opus.data.proxy.similarity import Scoring

COLUMNS = 1 << 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topic_corpus(tmp_path_factory.mktemp("lexical"), documents=60)


def scoring(root: Path, directory: Path) -> Scoring:
    items = load_benchmarks([("mmlu", science_questions(root / "questions.jsonl"))])
    return Scoring(directory=directory, items=items, encoder=LexicalEncoder(), progress=False)


def block_of(*documents: list[int], eod: int = 9) -> Block:
    ids = [[*one, eod] for one in documents]
    stream = np.array(list(chain.from_iterable(ids)), dtype=np.int64)
    return Block(ids=stream, ends=np.cumsum([len(one) for one in ids]))


def test_ngrams_stay_within_their_document() -> None:
    """Guards against bigrams across the end of a document, and against the end token as a word of every document."""
    hashes, bounds = hashed_ngrams(block_of([1, 2, 1, 2], [], [2], [1, 2]), COLUMNS)
    assert np.diff(bounds).tolist() == [7, 0, 1, 3]
    parts = [hashes[a:b].tolist() for a, b in pairwise(bounds)]
    one, one_two, two, two_one = parts[0][0], parts[0][1], parts[0][2], parts[0][3]
    assert len({one, two, one_two, two_one}) == 4
    assert parts[0] == [one, one_two, two, two_one, one, one_two, two]
    assert parts[2:] == [[two], [one, one_two, two]]
    alone = hashed_ngrams(block_of([1, 2, 1, 2]), COLUMNS)[0]
    assert alone.tolist() == parts[0]  # whatever is beside it


def test_features_are_unit_rows_of_log_counts() -> None:
    """Guards against counts that are not summed per n-gram before the logarithm, and NaN for an empty document."""
    block = block_of([3, 3, 3], [])
    counts = counts_matrix(block, COLUMNS)
    assert sorted(counts.data.tolist()) == [2.0, 3.0]
    row = features(block, COLUMNS)
    values = np.array([1 + math.log(2), 1 + math.log(3)])
    np.testing.assert_allclose(np.sort(row.data), values / np.linalg.norm(values), rtol=1e-6)
    assert row.shape == (2, COLUMNS)


@pytest.mark.parametrize("columns", [0, 128, 1000, 1 << 27])
def test_columns_are_a_power_of_two(columns: int) -> None:
    """Guards against a mask that maps n-grams to a part of the columns only."""
    with pytest.raises(ScoreError, match="expected a power of two"):
        check_columns(columns)


def test_dsir_is_the_published_formula(corpus: Path, tmp_path: Path) -> None:
    """Guards against weights of target and corpus exchanged, a sum that is a mean, and a score of the wrong document.

    Everything is counted anew in Python dictionaries, a document at a time; float32 keeps about 7 digits.
    """
    documents = opened(corpus)

    def grams(ids: np.ndarray) -> list[int]:
        return hashed_ngrams(Block(ids=ids, ends=np.array([len(ids)])), COLUMNS)[0].tolist()

    def shares(parts: list[np.ndarray]) -> np.ndarray:
        counts = np.zeros(COLUMNS)
        for ids in parts:
            for gram in grams(ids):
                counts[gram] += 1
        return counts / counts.sum()

    proxy = [ids for block in documents.target(["proxy"]) for ids in block.documents()]
    assert len(proxy) == 20
    own = {
        entry.name: [documents.one(number, i).ids for i in range(entry.documents)]
        for number, entry in enumerate(documents.entries)
    }
    weights = np.log(shares(proxy) + 1e-8) - np.log(shares(list(chain.from_iterable(own.values()))) + 1e-8)
    whole = scored(corpus, Dsir(["proxy"], columns=COLUMNS), tmp_path / "document")
    mean = scored(corpus, Dsir(["proxy"], columns=COLUMNS, per="ngram"), tmp_path / "ngram")
    for name, texts in own.items():
        expected = [weights[grams(ids)].sum() for ids in texts]
        np.testing.assert_allclose(whole.of[name], expected, rtol=1e-5)
        np.testing.assert_allclose(mean.of[name], np.array(expected) / [len(grams(i)) for i in texts], rtol=1e-5)


@pytest.mark.parametrize("kind", ["dsir", "classifier", "similarity", "betr"])
def test_documents_of_the_target_topic_come_first(corpus: Path, tmp_path: Path, kind: str) -> None:
    """Guards against a scorer whose sign is turned or that does not see the text: science is wanted, a third has it."""
    scorer = {
        "dsir": lambda: Dsir(["proxy"], per="ngram"),
        "classifier": lambda: Classifier(["proxy"], columns=COLUMNS),
        "similarity": lambda: Similarity(scoring(tmp_path, tmp_path / "unused")),
        "betr": lambda: Betr(scoring(tmp_path, tmp_path / "unused"), columns=COLUMNS),
    }[kind]()
    found = scored(corpus, scorer, tmp_path / "scores")
    wanted = topic_of(opened(corpus), "mixed") == "science"
    best = np.argsort(-found.of["mixed"])[: wanted.sum()]
    assert wanted[best].mean() > 0.9  # a third by chance
    assert found.of["science"].mean() > found.of["sports"].mean()


def test_similarity_is_the_one_of_build_proxy(corpus: Path, tmp_path: Path) -> None:
    """Guards against a second similarity that drifts from the one by which BENCH-PROXY is chosen; either can use the
    other's files."""
    built(corpus, tmp_path / "with_proxy", scores=tmp_path / "similarities", token_budget=500)
    items = load_benchmarks([("mmlu", corpus.parent / "questions.jsonl")])
    shared = Scoring(directory=tmp_path / "unused", items=items, encoder=LexicalEncoder(), progress=False, seed=42)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "similarities").glob("0*.npy"))
    found = scored(corpus, Similarity(shared, tmp_path / "similarities"), tmp_path / "scores")
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "similarities").glob("0*.npy")) == before
    anew = scored(corpus, Similarity(replace(shared)), tmp_path / "anew")
    records = np.load(tmp_path / "similarities" / "000000.npy")
    np.testing.assert_array_equal(found.of["mixed"], records["score"])
    np.testing.assert_array_equal(found.of["mixed"], anew.of["mixed"])


def test_a_corpus_with_a_built_proxy_is_scored_without_it(corpus: Path, tmp_path: Path) -> None:
    """Guards against documents that are counted in the files of the base, where the proxy's still stand."""
    built(corpus, tmp_path / "with_proxy", token_budget=500)
    documents = opened(tmp_path / "with_proxy")
    assert sum(e.documents for e in documents.entries) < sum(e.documents for e in opened(corpus).entries)
    found = scored(tmp_path / "with_proxy", Dsir(["proxy"]), tmp_path / "scores")
    assert {name: len(values) for name, values in found.of.items()} == {e.name: e.documents for e in documents.entries}


def test_targets_of_every_kind(corpus: Path, tmp_path: Path) -> None:
    """Guards against a target that another tokenizer than the corpus's reads, or a benchmark that is read as text."""
    documents = opened(corpus)
    text = sentence("science", 7)
    lines = write_jsonl(tmp_path / "target.jsonl", [text, "  ", sentence("sports", 8)])
    (block,) = documents.target([str(lines)])
    assert [documents.tokenizer.decode(ids.tolist()) for ids in block.documents()] == [text, sentence("sports", 8)]
    (block,) = documents.target([f"mmlu={science_questions(tmp_path / 'questions.jsonl')}"])
    assert "What does an atom have?\nelectron\nplanet" in documents.tokenizer.decode(block.documents()[0].tolist())


def test_bad_targets_are_named(corpus: Path, tmp_path: Path) -> None:
    """Guards against scores toward nothing: an absent file, an empty one, broken records, no proxy, no target."""
    documents = opened(corpus)
    with pytest.raises(ScoreError, match="found no such file"):
        list(documents.target([str(tmp_path / "absent.jsonl")]))
    with pytest.raises(ScoreError, match="found no such file"):
        Dsir(["absent.jsonl"]).identity()
    with pytest.raises(ScoreError, match="got none"):
        Dsir([]).identity()
    empty = write_jsonl(tmp_path / "empty.jsonl", [" ", ""])
    with pytest.raises(ScoreError, match="expected documents, found none"):
        list(documents.target([str(empty)]))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"title": "no text"}\n')
    with pytest.raises(ScoreError, match="record 2"):
        list(documents.target([str(broken)]))
    alone = tmp_path / "alone"
    run(
        alone,
        spec("web", "candidates", write_jsonl(tmp_path / "web.jsonl", [sentence("sports", 1)] * 1)),
        vocab_size=290,
    )
    with pytest.raises(ScoreError, match="needs a corpus with a proxy"):
        list(opened(alone).target(["proxy"]))


def test_the_column_of_a_corpus(tmp_path: Path) -> None:
    """Guards against numbers of other documents once documents have left the corpus, and against a missing column."""
    rows = [{"text": sentence("science", i), "edu": i / 4} for i in range(30)]
    path = tmp_path / "edu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "corpus", spec("edu", "candidates", path), read=ReadOptions(score_key="edu"))
    found = scored(tmp_path / "corpus", Column("edu"), tmp_path / "scores")
    np.testing.assert_array_equal(found.of["edu"], np.arange(30, dtype=np.float32) / 4)
    built(tmp_path / "corpus", tmp_path / "less", token_budget=300)
    gone = np.load(tmp_path / "less" / "excluded" / "edu.npy")[:, 0]
    assert len(gone)
    found = scored(tmp_path / "less", Column("edu"), tmp_path / "scores_less")
    np.testing.assert_array_equal(found.of["edu"], np.delete(np.arange(30, dtype=np.float32) / 4, gone))
    with pytest.raises(ScoreError, match="expected the column 'quality', found the column 'edu'"):
        scored(tmp_path / "corpus", Column("quality"), tmp_path / "other")


def test_a_corpus_without_columns_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Guards against zeros as scores where the corpus has none."""
    with pytest.raises(ScoreError, match="expected the column 'edu', found none; prepare the corpus with"):
        scored(corpus, Column("edu"), tmp_path / "scores")


def test_empty_documents_have_no_score() -> None:
    """Guards against a score of nothing, by which an empty document may be the best one."""
    scorer = Dsir(["proxy"], columns=COLUMNS)
    scorer.use({"weights": np.ones(COLUMNS)})
    assert np.isnan(scorer.score(block_of([1], [], [2, 3]))).tolist() == [False, True, False]
    scorer.use({"weights": np.ones(COLUMNS)})
    assert scorer.score(block_of([1], [2, 3])).tolist() == [1.0, 3.0]
    classifier = Classifier(["proxy"], columns=COLUMNS)
    classifier.use({"weights": np.ones(COLUMNS, dtype=np.float32), "bias": np.zeros(1)})
    assert np.isnan(classifier.score(block_of([], [1]))).tolist() == [True, False]
