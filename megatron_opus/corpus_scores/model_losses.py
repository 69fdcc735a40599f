"""Scorers that need the losses of frozen models: mean loss, Min-K%, and the difference of two models.

l_t = -log p(token t | the tokens before it in its window), in nats, of all predicted tokens of a document.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.corpus_scores.documents import Block, CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.reference_model import (
    Precision,
    ReferenceModel,
    Windowing,
    Windows,
    open_models,
    reading_identity,
)
from megatron_opus.corpus_scores.scorer import DocumentScorer

MODEL_PIECE, MODEL_BLOCK = 1 << 18, 1 << 15  # tokens: of a file and of a step of the bar, as models are slow


class ModelScorer(DocumentScorer):
    """A scorer from the token losses of one or several models. What they are made into is the subclass's part."""

    piece_tokens, block_tokens = MODEL_PIECE, MODEL_BLOCK

    def __init__(
        self, models: list[Path], *, windowing: Windowing | None = None, precision: Precision = "fp32"
    ) -> None:
        if not models:
            raise ScoreError(f"{self.name}: expected a model, got none (--model DIR)")
        self._paths, self._windowing, self._precision = models, windowing or Windowing(), precision
        self._models: list[ReferenceModel] = []

    def identity(self) -> dict[str, Any]:
        return reading_identity(self._paths, self._windowing, self._precision)

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        self._models = open_models(self._paths, self._windowing, self._precision, corpus)

    def score(self, block: Block) -> np.ndarray:
        windows = Windows.of(block, self._windowing)
        losses = [model.losses(windows) for model in self._models]
        bounds = np.searchsorted(windows.owners, np.arange(len(block) + 1))
        found = np.full(len(block), np.nan)
        for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
            if first < stop:  # a document of one token predicts nothing
                found[i] = self.of_document([np.concatenate(of_model[first:stop]) for of_model in losses])
        return found

    @abstractmethod
    def of_document(self, losses: list[np.ndarray]) -> float:
        """Return the score of a document from its token losses [tokens] float32 under each model."""


class Loss(ModelScorer):
    """The mean loss of a document in nats per token, averaged over the models: high means surprising.

    Perplexity pruning (arXiv 2309.04564) keeps a band of it: `keep --rule band:A-B`.
    """

    name = "loss"

    def of_document(self, losses: list[np.ndarray]) -> float:
        return float(np.mean([of_model.mean(dtype=np.float64) for of_model in losses]))


class MinK(ModelScorer):
    """Min-K% Prob (arXiv 2310.16789): the mean log-probability of the `share` least likely tokens of a document.

    High means that even those were expected. With a share of 1 it is minus the mean loss. Several models are averaged.
    """

    name = "min-k"

    def __init__(
        self,
        models: list[Path],
        *,
        share: float = 0.2,
        windowing: Windowing | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(models, windowing=windowing, precision=precision)
        if not 0.0 < share <= 1.0:
            raise ScoreError(f"min-k: expected a share of the tokens above 0 and at most 1 (--min-k), got {share}")
        self._share = share

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "share": self._share}

    def of_document(self, losses: list[np.ndarray]) -> float:
        count = max(1, int(self._share * len(losses[0])))
        return float(np.mean([-np.sort(of_model)[-count:].mean(dtype=np.float64) for of_model in losses]))


class Color(ModelScorer):
    """CoLoR-Filter (arXiv 2406.10670): the mean loss under the prior model minus that under the conditional one.

    The conditional model is the prior one, trained further on the target. High means that this training made the
    document likelier.
    """

    name = "color"

    def __init__(
        self, prior: Path, conditional: Path, *, windowing: Windowing | None = None, precision: Precision = "fp32"
    ) -> None:
        super().__init__([prior, conditional], windowing=windowing, precision=precision)

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        super().prepare(corpus, directory, part)
        prior, conditional = (model.shape.vocab_size for model in self._models)
        if prior != conditional:
            raise ScoreError(
                f"color: expected two models of one vocabulary, got {prior} and {conditional} token ids; the "
                "conditional model is the prior one, trained further"
            )

    def of_document(self, losses: list[np.ndarray]) -> float:
        prior, conditional = (of_model.mean(dtype=np.float64) for of_model in losses)
        return float(prior - conditional)
