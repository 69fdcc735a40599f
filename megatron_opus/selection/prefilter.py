"""Candidates picked from a larger pool by what a linear model expects of their text (`selection.prefilter`).

A pool of r N sequences is drawn, N of them are scored. Which N is decided by a model of the utility that reads the text
alone, hashed uni- and bigrams of the tokens and the domain, and that learns from every buffer that is scored anyway:

    f(z) = c_domain(z) + mean over the n-grams j of z of w_j                      what is expected of z
    y(z) = (U_z - mean U) / std U                                                 what the scoring pass found, N numbers

    n_j <- (1 - phi) n_j + count of j in the buffer            how often the n-gram was seen, with forgetting phi
    w_j <- (1 - phi) w_j + rate * sum over z of count_j(z) (y(z) - f(z)) / (n_j + PRIOR)

The step of each weight is one over how often it was met: a Newton step on the diagonal. An n-gram seen twice moves by a
fifth of the error it was seen with, one seen in every document hardly. c moves by the same rule, counted in documents.

Where the step is scored, a share of the N is taken from the pool unseen. So the model hears of text that it would not
have picked, and what the filter is worth is measured: the mean y of the picked minus that of the unseen
(`prefilter_gain`).

With `every_step` it also picks where nothing is scored, but only while that pays: a model that has just been trained on
what was picked may gain less from more of it than from any other text. The running mean of the gain decides:

    worth <- MEMORY * worth + (1 - MEMORY) * gain            picks at unscored steps if and only if worth > 0

It starts at 0, so that nothing is picked before a gain was seen. Example: gains of -0.5, 0.3 and 0.4 make it -0.1,
-0.02 and 0.064, and after the third one it picks.

Arithmetic is float64 on the CPU and sums run in one order, so that every rank and every layout picks the same.
Legend: M sequences of the pool, N of the buffer, L tokens, C columns, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import PrefilterConfig
from megatron_opus.selection.ngrams import ngram_hashes

MEMORY = 0.8  # of the running mean of the gain: about the last nine scored steps decide
PRIOR = 8.0  # sightings by which an n-gram's, or a domain's, weight is drawn toward 0


class Prefilter:
    """Picks N of the pool, and learns from their utilities. Equal calls give equal state on every rank."""

    def __init__(self, config: PrefilterConfig, domains: int) -> None:
        """domains: D."""
        self._config = config
        self.unseen = 0  # of the last pick, its first sequences
        self._expected: np.ndarray | None = None  # f of the last pick
        self._worth = 0.0
        self._weights, self._seen = np.zeros(config.columns), np.zeros(config.columns)
        self._domain, self._documents = np.zeros(domains), np.zeros(domains)

    @property
    def pays(self) -> bool:
        """Whether what was picked has lately been better than what was taken unseen."""
        return self._worth > 0

    def expected(self, tokens: Tensor, domains: np.ndarray) -> np.ndarray:
        """Return f, [M] float64, of tokens [M, L] int64 and domains [M]. No row depends on another one."""
        mean: np.ndarray = self._weights[self._columns(tokens)].mean(1)
        return mean + self._domain[domains]

    def pick(self, expected: np.ndarray, scored: bool = True) -> np.ndarray:
        """Return [N] int64 ascending positions in the pool: the first ones unseen, of the others the best by f.

        expected [M] float64 is f of the pool; N = M / pool_ratio. The pool comes shuffled, so that its first sequences
        are a uniform draw. Where the step is not scored nothing could be learnt from unseen text: then none is taken.
        """
        size = len(expected) // self._config.pool_ratio
        self.unseen = max(1, round(self._config.unfiltered * size)) if scored else 0
        rest = np.argsort(-expected[self.unseen :], kind="stable")[: size - self.unseen] + self.unseen
        positions = np.concatenate([np.arange(self.unseen), np.sort(rest)])
        self._expected = expected[positions]
        return positions

    def learn(
        self, tokens: Tensor, domains: np.ndarray, utility: Tensor, finite: Tensor | None = None
    ) -> dict[str, float]:
        """Fit to the utilities [N] float64 of the last pick, of tokens [N, L] and domains [N].

        Returns what is said in the metrics. `prefilter_gain`: mean y of the picked minus mean y of the unseen, in
        standard deviations of the buffer. `prefilter_correlation`: Pearson's, of f with y among the unseen.
        """
        expected = self._expected
        assert expected is not None
        found = utility.numpy()
        usable = np.isfinite(found)
        if finite is not None:
            usable &= finite.numpy()
        if usable.sum() < 2 or (spread := found[usable].std()) == 0:
            return {}
        y = (found - found[usable].mean()) / spread
        said = self._quality(y, expected, usable)
        if "prefilter_gain" in said and self._documents.any():
            self._worth = MEMORY * self._worth + (1 - MEMORY) * said["prefilter_gain"]
        self._fit(self._columns(tokens)[usable], domains[usable], y[usable] - expected[usable])
        return said

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self._weights.copy(),
            "seen": self._seen.copy(),
            "domain": self._domain.copy(),
            "documents": self._documents.copy(),
            "worth": self._worth,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weights, self._seen = state["weights"].copy(), state["seen"].copy()
        self._domain, self._documents = state["domain"].copy(), state["documents"].copy()
        self._worth = float(state.get("worth", 0.0))

    def _columns(self, tokens: Tensor) -> np.ndarray:
        """[M, 2 L - 1] int32: the column of every n-gram."""
        both = torch.cat(ngram_hashes(tokens), dim=1)
        return (both & (self._config.columns - 1)).to(torch.int32).numpy()

    def _quality(self, y: np.ndarray, expected: np.ndarray, usable: np.ndarray) -> dict[str, float]:
        first = np.arange(len(y)) < self.unseen
        unseen, picked = first & usable, ~first & usable
        said = {}
        if unseen.any() and picked.any():
            said["prefilter_gain"] = float(y[picked].mean() - y[unseen].mean())
        if unseen.sum() > 2 and expected[unseen].std() > 0 and y[unseen].std() > 0:
            said["prefilter_correlation"] = float(np.corrcoef(expected[unseen], y[unseen])[0, 1])
        return said

    def _fit(self, columns: np.ndarray, domains: np.ndarray, error: np.ndarray) -> None:
        occurrences = np.repeat(error, columns.shape[1])
        self._move(self._weights, self._seen, columns.ravel(), occurrences)
        self._move(self._domain, self._documents, domains, error)

    def _move(self, weights: np.ndarray, seen: np.ndarray, where: np.ndarray, error: np.ndarray) -> None:
        """Move weights [C] and sightings [C] in place by the errors at the columns `where`."""
        kept = 1 - self._config.forgetting
        seen[:] = kept * seen + np.bincount(where, minlength=len(seen))
        moved = np.bincount(where, weights=error, minlength=len(seen)) / (seen + PRIOR)
        weights[:] = kept * weights + self._config.learning_rate * moved
