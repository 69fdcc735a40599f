"""The pass over a corpus: pieces, parts, interruptions, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import die_at_rename, killed
from score_helpers import opened, scored, topic_corpus

from megatron_opus.corpus_scores.documents import Block, ScoreError
from megatron_opus.corpus_scores.lexical import Dsir
from megatron_opus.corpus_scores.score_corpus import score_corpus
from megatron_opus.corpus_scores.score_files import read_scores
from megatron_opus.corpus_scores.scorer import DocumentScorer
from megatron_opus.data.proxy import similarity


class TokenSum(DocumentScorer):
    """The sum of a document's ids: shows which tokens a scorer was given."""

    name = "token_sum"

    def __init__(self, version: int = 1) -> None:
        self._version = version

    def identity(self) -> dict[str, Any]:
        return {"version": self._version}

    def score(self, block: Block) -> np.ndarray:
        return np.array([ids.sum() for ids in block.documents()], dtype=np.float64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topic_corpus(tmp_path_factory.mktemp("scores"))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_PIECE_TOKENS", 900)
    monkeypatch.setattr("megatron_opus.corpus_scores.documents._BLOCK_TOKENS", 400)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and not p.name.startswith(".lock")
    }


def quiet(_: str) -> None:
    pass


def test_every_document_gets_the_score_of_its_own_tokens(corpus: Path, tmp_path: Path) -> None:
    """Guards against a document that is cut, skipped or shifted where a piece or a block of the corpus ends."""
    documents = opened(corpus)
    assert len(documents.pieces()) > 6
    found = scored(corpus, TokenSum(), tmp_path / "scores")
    for number, entry in enumerate(documents.entries):
        expected = [documents.one(number, i).ids.sum() for i in range(entry.documents)]
        np.testing.assert_array_equal(found.of[entry.name], expected)
        assert found.of[entry.name].dtype == np.float32


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 9, 11, 13])
def test_a_killed_scoring_goes_on_to_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Guards against torn files, pieces scored twice or left out, and a model learned anew after a kill -9."""
    scored(corpus, Dsir(["proxy"], sample_tokens=500), tmp_path / "whole")
    output = tmp_path / "killed"

    def attempt() -> None:
        with monkeypatch.context() as patch:
            die_at_rename(patch, at)
            scored(corpus, Dsir(["proxy"], sample_tokens=500), output)

    killed(attempt)
    scored(corpus, Dsir(["proxy"], sample_tokens=500), output)
    assert files(output) == files(tmp_path / "whole")


def test_parts_give_the_bytes_of_one_run(corpus: Path, tmp_path: Path) -> None:
    """Guards against parts that overlap, leave pieces out, or learn something else than one run does."""
    scored(corpus, Dsir(["proxy"]), tmp_path / "whole")
    parts = [
        score_corpus(opened(corpus), Dsir(["proxy"]), tmp_path / "parts", part=(i, 3), progress=False, say=quiet)
        for i in (2, 0, 1)
    ]
    assert parts == [False, False, True]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_missing_part_is_named(corpus: Path, tmp_path: Path) -> None:
    """Guards against scores of a part of the corpus that are used as if they were of all of it."""
    assert not score_corpus(opened(corpus), TokenSum(), tmp_path / "s", part=(0, 2), progress=False, say=quiet)
    with pytest.raises(ScoreError, match="parts are not all there; run the missing ones"):
        read_scores(tmp_path / "s")


def test_other_settings_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Guards against scores of two settings in one directory, before and after it is complete."""
    score_corpus(opened(corpus), TokenSum(), tmp_path / "s", part=(0, 2), progress=False, say=quiet)
    with pytest.raises(ScoreError, match=re.escape("(version: then 1, now 2)")):
        scored(corpus, TokenSum(2), tmp_path / "s")
    scored(corpus, TokenSum(), tmp_path / "s")
    with pytest.raises(ScoreError, match=re.escape("(version: then 1, now 2)")):
        scored(corpus, TokenSum(2), tmp_path / "s")


def test_files_of_others_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    """Guards against scores that are written into a folder of something else, which a clean-up then removes."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ScoreError, match="found other files"):
        scored(corpus, TokenSum(), tmp_path)


def test_scores_of_another_corpus_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Guards against the scores of one corpus that choose among the documents of another one of the same size."""
    scored(corpus, TokenSum(), tmp_path / "s")
    other = topic_corpus(tmp_path / "other", documents=42)
    with pytest.raises(ScoreError, match="the scores are of another corpus"):
        read_scores(tmp_path / "s", opened(other))


def test_damaged_scores_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Guards against a score file that was written by something else since."""
    scored(corpus, TokenSum(), tmp_path / "s")
    path = tmp_path / "s" / "candidates" / "mixed.npy"
    np.save(path, np.load(path)[::-1].copy())
    with pytest.raises(ScoreError, match=r"not the file that scores\.json means"):
        read_scores(tmp_path / "s")
    about = json.loads((tmp_path / "s" / "scores.json").read_text())
    (tmp_path / "s" / "scores.json").write_text(json.dumps({**about, "version": 9}))
    with pytest.raises(ScoreError, match="another kind of file"):
        read_scores(tmp_path / "s")


def test_a_scorer_of_the_wrong_shape_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Guards against a scorer that returns another number of scores than documents, which shifts all others."""

    class One(TokenSum):
        def score(self, block: Block) -> np.ndarray:
            return np.zeros(len(block) + 1)

    with pytest.raises(ScoreError, match=r"scorer token_sum: expected \d+ scores of a block"):
        scored(corpus, One(), tmp_path / "s")


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_is_none_is_refused(corpus: Path, tmp_path: Path, part: tuple[int, int]) -> None:
    """Guards against a part that scores nothing and calls the corpus complete."""
    with pytest.raises(ScoreError, match="expected I/N with 0 <= I < N"):
        score_corpus(opened(corpus), TokenSum(), tmp_path / "s", part=part)


def test_a_sample_is_random_documents_without_replacement(corpus: Path) -> None:
    """Guards against a sample that is the beginning of the corpus, or that counts documents twice."""
    documents = opened(corpus)
    found = [(b.piece.domain, b.first + i) for b in documents.sample(600, 3) if b.piece for i in range(len(b))]
    assert len(set(found)) == len(found)
    assert sum(len(b.ids) for b in documents.sample(600, 3)) >= 600
    assert {b.ids.tobytes() for b in documents.sample(600, 3)} != {b.ids.tobytes() for b in documents.sample(600, 4)}
    everything = sum(len(b) for b in documents.sample(10**9, 0))
    assert everything == sum(entry.documents for entry in documents.entries)
