"""Domain weights over the run: piecewise constant or linear in the step (`data.domain_schedule`).

    base(t)    [D], sum 1: the weights at step t. Without a schedule: `data.domain_weights` at every step.
    prior      [D], sum 1: the mean over the points; what a strategy that moves shares starts from
    shares(t)  proportional to base(t) * q / prior, where q [D] are the shares that the strategy asks for

So a strategy that asks for its prior leaves the schedule as it is, and one that asks for twice the prior of a domain
doubles the odds of whatever the schedule gives that domain. Example with two domains: base (0.8, 0.2), prior (0.5, 0.5)
and q (0.25, 0.75) give 0.8 * 0.5 = 0.4 and 0.2 * 1.5 = 0.3, hence (4/7, 3/7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_opus.config import DataConfig
from megatron_opus.data.corpus import Corpus, normalised


@dataclass(frozen=True, kw_only=True)
class DomainSchedule:
    """Weights of the candidate domains at every step; the same on every rank."""

    steps: tuple[int, ...]  # of the points, ascending, the first 0
    weights: np.ndarray  # [points, D] float64, every row of sum 1
    interpolation: Literal["constant", "linear"] = "constant"

    @property
    def prior(self) -> np.ndarray:
        """[D] float64, sum 1: the mean over the points."""
        return normalised(self.weights.mean(0)) if self.changes else self.weights[0].copy()

    @property
    def changes(self) -> bool:
        """Whether there is more than one point."""
        return len(self.steps) > 1

    def at(self, step: int) -> np.ndarray:
        """Return the [D] float64 weights of one step, sum 1. Beyond the last point they are those of the last."""
        place = int(np.searchsorted(self.steps, step, side="right")) - 1
        if self.interpolation == "constant" or place == len(self.steps) - 1:
            return self.weights[place].copy()
        first, last = self.steps[place : place + 2]
        part = (step - first) / (last - first)
        return normalised((1 - part) * self.weights[place] + part * self.weights[place + 1])

    def shares(self, step: int, asked: Sequence[float] | np.ndarray | None) -> np.ndarray:
        """Return the [D] shares of one step, given what a strategy asks for [D] (None: nothing).

        A domain without a prior has no weight at any step. Where everything that is asked for has no weight at this
        step, the schedule's own weights hold.
        """
        base, prior = self.at(step), self.prior
        if asked is None:
            return base
        q = normalised(np.asarray(asked, dtype=np.float64))
        if not self.changes or q.shape != prior.shape:  # the buffer refuses another number of shares
            return q
        moved = base * np.divide(q, prior, out=np.zeros_like(q), where=prior > 0)
        return normalised(moved) if moved.sum() > 0 else base


def domain_schedule(corpus: Corpus, config: DataConfig, train_steps: int) -> DomainSchedule:
    """Return the configured schedule over the corpus's candidate domains. Raises CorpusError, ConfigError."""
    points = config.domain_schedule.resolved(train_steps)
    if not points:
        return DomainSchedule(steps=(0,), weights=corpus.candidate_weights(config.domain_weights)[None])
    return DomainSchedule(
        steps=tuple(step for step, _ in points),
        weights=np.stack([corpus.candidate_weights(weights) for _, weights in points]),
        interpolation=config.domain_schedule.interpolation,
    )
