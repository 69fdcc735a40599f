"""Scorers that need no model: they compare hashed n-grams of tokens with those of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_opus.corpus_scores.documents import Block, CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.ngrams import check_columns, features, hashed_ngrams
from megatron_opus.corpus_scores.scorer import DocumentScorer, LearningScorer, target_identity
from megatron_opus.data import manifest as manifests
from megatron_opus.data.excluded_documents import read_spans
from megatron_opus.data.manifest import base_directory
from megatron_opus.data.prepare.records import file_sha256
from megatron_opus.data.proxy.encoders import Encoder, LexicalEncoder, Nearest
from megatron_opus.data.proxy.similarity import CandidateDocuments, Scorer, Scoring
from megatron_opus.data.unlearned_spans import SCORE_SUFFIX

Per = Literal["document", "ngram"]
_FLOOR = 1e-8  # probability of an n-gram that was never seen; that of the authors' package `data-selection`


class Dsir(LearningScorer):
    """DSIR (arXiv 2302.03169): the log importance weight of a document's hashed uni- and bigrams.

        score = sum over n-grams of  log(p_target + 1e-8) - log(p_corpus + 1e-8)

    p_target is counted in the whole target, p_corpus in a sample of the corpus. per: the sum over the `document`, as
    published, grows with its length; the mean over its `ngram`s does not.
    """

    name = "dsir"

    def __init__(
        self,
        target: Sequence[str],
        *,
        columns: int = 1 << 14,
        sample_tokens: int = 100_000_000,
        per: Per = "document",
        seed: int = 0,
    ) -> None:
        self._target, self._columns, self._per = tuple(target), check_columns(columns), per
        self._sample, self._seed = sample_tokens, seed
        self._weights = np.zeros(0, dtype=np.float64)

    def identity(self) -> dict[str, Any]:
        return {
            "target": target_identity(self._target),
            "columns": self._columns,
            "sample_tokens": self._sample,
            "per": self._per,
            "seed": self._seed,
        }

    def learn(self, corpus: CorpusDocuments) -> dict[str, np.ndarray]:
        wanted = self._shares(corpus.target(self._target))
        there = self._shares(corpus.sample(self._sample, self._seed))
        return {"weights": np.log(wanted + _FLOOR) - np.log(there + _FLOOR)}

    def use(self, learned: Mapping[str, np.ndarray]) -> None:
        self._weights = learned["weights"]

    def score(self, block: Block) -> np.ndarray:
        hashes, bounds = hashed_ngrams(block, self._columns)
        lengths = np.diff(bounds)
        found = np.full(len(block), np.nan)
        known = lengths > 0
        if known.any():
            found[known] = np.add.reduceat(self._weights[hashes], bounds[:-1][known])
        return found if self._per == "document" else found / np.maximum(lengths, 1)

    def _shares(self, blocks: Iterable[Block]) -> np.ndarray:
        counts = np.zeros(self._columns, dtype=np.int64)
        for block in blocks:
            counts += np.bincount(hashed_ngrams(block, self._columns)[0], minlength=self._columns)
        if not counts.any():
            raise ScoreError("dsir: expected text in the target and in the corpus, found empty documents only")
        return counts / counts.sum()


class Classifier(LearningScorer):
    """A linear classifier of the target against the corpus, on hashed n-grams: the log odds of being target.

    Logistic regression on rows of 1 + log(count) of length 1 (`ngrams.features`). Both classes weigh the same. The
    corpus's sample may contain documents like the target; then the odds are smaller, and their order is the same.
    """

    name = "classifier"

    def __init__(
        self, target: Sequence[str], *, columns: int = 1 << 16, sample_tokens: int = 10_000_000, seed: int = 0
    ) -> None:
        self._target, self._columns = tuple(target), check_columns(columns)
        self._sample, self._seed = sample_tokens, seed
        self._weights, self._bias = np.zeros(0, dtype=np.float32), 0.0

    def identity(self) -> dict[str, Any]:
        return {
            "target": target_identity(self._target),
            "columns": self._columns,
            "sample_tokens": self._sample,
            "seed": self._seed,
        }

    def learn(self, corpus: CorpusDocuments) -> dict[str, np.ndarray]:
        from scipy.sparse import vstack
        from sklearn.linear_model import LogisticRegression

        wanted = [features(b, self._columns) for b in _at_most(corpus.target(self._target), self._sample)]
        there = [features(b, self._columns) for b in corpus.sample(self._sample, self._seed)]
        rows = vstack([*wanted, *there], format="csr")
        labels = np.zeros(rows.shape[0], dtype=np.int64)
        labels[: sum(part.shape[0] for part in wanted)] = 1
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200).fit(rows, labels)
        return {"weights": model.coef_[0].astype(np.float32), "bias": model.intercept_.astype(np.float64)}

    def use(self, learned: Mapping[str, np.ndarray]) -> None:
        self._weights, self._bias = learned["weights"], float(learned["bias"][0])

    def score(self, block: Block) -> np.ndarray:
        return _linear(block, self._columns, self._weights, self._bias)


class FastText(DocumentScorer):
    """The probability that a user's fastText classifier gives to one label; the file is that of `fasttext` (.bin).

    Documents are decoded, and their lines joined by blanks, as fastText reads one line for each document.
    """

    name = "classifier"

    def __init__(self, model: Path, label: str) -> None:
        self._path, self._label = model, label
        self._model: Any = None
        self._decode: Callable[[Sequence[int]], str] | None = None

    def identity(self) -> dict[str, Any]:
        if not self._path.is_file():
            raise ScoreError(f"fastText model {self._path}: expected a file, found none")
        return {"fasttext": file_sha256(self._path), "label": self._label}

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        try:
            import fasttext
        except ImportError as error:
            raise ScoreError(
                f"a fastText model needs fasttext-predict ({error}): pip install fasttext-predict"
            ) from None
        try:
            self._model = fasttext.load_model(str(self._path))
        except (ValueError, RuntimeError) as error:
            raise ScoreError(f"fastText model {self._path}: not readable ({error})") from error
        self._decode = corpus.tokenizer.decode

    def score(self, block: Block) -> np.ndarray:
        assert self._decode is not None
        return np.array([self._one(" ".join(self._decode(ids.tolist()).split())) for ids in block.documents()])

    def _one(self, text: str) -> float:
        if not text:
            return float("nan")
        labels, shares = self._model.predict(text, k=-1)
        for label, share in zip(labels, shares, strict=True):
            if label == self._label:
                return float(share)
        raise ScoreError(f"fastText model {self._path}: expected a label {self._label}, found {', '.join(labels[:8])}")


class Similarity(DocumentScorer):
    """The largest cosine similarity to a benchmark item: the very pass with which `build-proxy` chooses its proxy.

    directory: of similarities that `build-proxy --scores` has made of this corpus; default: inside of the output.
    """

    name = "similarity"

    def __init__(self, scoring: Scoring, directory: Path | None = None) -> None:
        self._scoring, self._directory = scoring, directory
        self._pass: Scorer | None = None
        self._read: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.float32))

    def identity(self) -> dict[str, Any]:
        return self._scoring.choices()

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        from dataclasses import replace

        place = self._directory or directory / "similarity"
        self._pass = Scorer(corpus, replace(self._scoring, directory=place, part=part))
        self._pass.run()

    def score(self, block: Block) -> np.ndarray:
        assert self._pass is not None
        assert block.piece is not None
        if self._read[0] != block.piece.number:
            self._read = block.piece.number, self._pass.read(block.piece)["score"]
        start = block.first - block.piece.first
        found = self._read[1][start : start + len(block)].copy()
        found[np.diff(block.ends, prepend=0) < 2] = np.nan
        return found


class Betr(LearningScorer):
    """BETR (arXiv 2507.12466): similarity to benchmark items, learned from a sample and applied to everything.

    A sample of documents is compared with the items by an encoder; ridge regression on hashed n-grams
    (`ngrams.features`) learns to predict its largest similarity. The published method trains a fastText classifier.
    """

    name = "betr"

    def __init__(
        self, scoring: Scoring, *, columns: int = 1 << 16, sample_tokens: int = 5_000_000, seed: int = 0
    ) -> None:
        if scoring.encoder is None or not scoring.items:
            raise ScoreError("betr: expected benchmark items and an encoder, got none (--benchmarks NAME=FILE)")
        self._scoring, self._encoder = scoring, scoring.encoder
        self._columns, self._sample, self._seed = check_columns(columns), sample_tokens, seed
        self._weights, self._bias = np.zeros(0, dtype=np.float32), 0.0

    def identity(self) -> dict[str, Any]:
        return {
            **self._scoring.choices(),
            "columns": self._columns,
            "sample_tokens": self._sample,
            "sample_seed": self._seed,
        }

    def learn(self, corpus: CorpusDocuments) -> dict[str, np.ndarray]:
        from scipy.sparse import vstack
        from sklearn.linear_model import Ridge

        blocks = list(corpus.sample(self._sample, self._seed))
        values = np.concatenate(self._similarities(corpus, blocks))
        rows = vstack([features(block, self._columns) for block in blocks], format="csr")
        held = np.arange(len(values)) % 5 == 4
        if held.sum() < 2:
            raise ScoreError(
                f"betr: expected a sample of at least 10 documents, got {len(values)}; take a larger sample"
            )
        model = Ridge(alpha=1.0, solver="sparse_cg", tol=1e-6).fit(rows[~held], values[~held])
        return {
            "weights": model.coef_.astype(np.float32),
            "bias": np.array([model.intercept_], dtype=np.float64),
            "held_out_correlation": np.array([np.corrcoef(model.predict(rows[held]), values[held])[0, 1]]),
        }

    def use(self, learned: Mapping[str, np.ndarray]) -> None:
        self._weights, self._bias = learned["weights"], float(learned["bias"][0])

    def score(self, block: Block) -> np.ndarray:
        return _linear(block, self._columns, self._weights, self._bias)

    def _similarities(self, corpus: CandidateDocuments, blocks: Sequence[Block]) -> list[np.ndarray]:
        """Return the similarity of each document, of its first window where it is longer."""
        encoder: Encoder = self._encoder
        items = [item.text() for item in self._scoring.items]
        texts = [
            [corpus.tokenizer.decode(ids[: encoder.window].tolist()) for ids in block.documents()] for block in blocks
        ]
        if isinstance(encoder, LexicalEncoder):
            for some in (items, *texts):
                encoder.count(some)
        nearest = Nearest(encoder.encode_items(items), encoder.device)
        return [nearest.best(encoder.encode_documents(some))[0] for some in texts]


class Column(DocumentScorer):
    """A number that the corpus carries for each document (`prepare-data --score-key`): FineWeb-Edu's, QuRating's."""

    name = "column"

    def __init__(self, key: str) -> None:
        self._key = key
        self._values: list[np.ndarray] = []

    def identity(self) -> dict[str, Any]:
        return {"score_key": self._key}

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        self._values = [self._column(corpus, i) for i in range(len(corpus.entries))]

    def score(self, block: Block) -> np.ndarray:
        assert block.piece is not None
        return self._values[block.piece.domain][block.first : block.first + len(block)]

    def _column(self, corpus: CorpusDocuments, domain: int) -> np.ndarray:
        """Return [documents] float32 of one domain, read from the corpus that has its files."""
        entry = corpus.entries[domain]
        directory = base_directory(corpus.directory, entry)
        about = next(e for e in manifests.read(directory).of_role("candidates") if e.name == entry.name).scores
        if about.get("key") != self._key:
            there = f"the column {about['key']!r}" if about else "none"
            raise ScoreError(
                f"{directory}: domain {entry.name}: expected the column {self._key!r}, found {there}; prepare the "
                f"corpus with `megatron-opus prepare-data --score-key {self._key}`"
            )
        path = directory / f"{entry.prefix}{SCORE_SUFFIX}"
        try:
            values = np.load(path)
        except (OSError, ValueError) as error:
            raise ScoreError(f"{path}: not readable ({error}); prepare the data again") from error
        if entry.excluded:
            values = np.delete(values, read_spans(corpus.directory / entry.excluded, entry.excluded_sha256)[:, 0])
        if len(values) != entry.documents:
            raise ScoreError(f"{path}: expected {entry.documents} numbers, found {len(values)}; prepare the data again")
        return values


def _linear(block: Block, columns: int, weights: np.ndarray, bias: float) -> np.ndarray:
    found = features(block, columns) @ weights + bias
    return np.where(np.diff(block.ends, prepend=0) > 1, found, np.nan)


def _at_most(blocks: Iterable[Block], tokens: int) -> Iterable[Block]:
    for block in blocks:
        if tokens <= 0:
            return
        tokens -= len(block.ids)
        yield block
