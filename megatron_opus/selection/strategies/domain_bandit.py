"""Domain shares that follow the utilities: multiplicative weights over the domains of the buffer.

The scoring pass gives each candidate its utility, the first-order gain of the target by training on it. The mean over
a domain's candidates therefore estimates what the domain is worth now. At a scored step, with U in units of the step's
standard deviation around its mean:

    g_d    = mean over the buffer's candidates z of domain d of (U_z - mean U) / std U
    l_d   <- memory * l_d + step_size * g_d          a domain without candidates: memory * l_d
    shares  proportional to prior_d * exp(l_d), at least min_share, at most what the domain has sequences for

A gain that stays the same moves l_d to step_size / (1 - memory) times it: with 0.3, 0.95 and a domain that is one
standard deviation above the mean, to 6. All candidates of the buffer count, drawn or not, so what the strategy prefers
does not bias the estimate. The shares move at every `move_every`-th step at most; with strategy `random` the others
are not scored, so that the mixture costs 1 / move_every of a scoring pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import ConfigError, DomainBanditConfig
from megatron_opus.selection.shares import clipped, share_bounds
from megatron_opus.selection.strategies.base import Around
from megatron_opus.types import Candidates, Selection, SelectionStrategy, Signals


class DomainBandit(Around):
    """`inner` chooses in the buffer whose shares the bandit moves. Equal signals give equal state on every rank."""

    def __init__(
        self,
        inner: SelectionStrategy,
        config: DomainBanditConfig,
        domains: Sequence[str],
        prior: np.ndarray,
        ceiling: np.ndarray | None = None,
        owed: np.ndarray | None = None,
    ) -> None:
        """prior [D], sum 1: the configured weights; ceiling, owed [D]: as in `share_bounds`."""
        super().__init__(inner)
        if prior.shape != (len(domains),):
            raise ConfigError(f"selection.domain_bandit: expected a weight for each of {list(domains)}, got {prior}")
        self.needs = inner.needs | {"ghost"}
        self._config, self._domains = config, tuple(domains)
        self._prior = np.asarray(prior, dtype=np.float64)
        self._floor, self._ceiling = share_bounds(
            self._prior, config.min_share, ceiling, owed, key="selection.domain_bandit"
        )
        self._log = np.zeros(len(domains))
        self._moved = -config.move_every  # step of the last move

    def domain_weights(self, step: int) -> Tensor | None:
        return torch.from_numpy(self._shares())

    def scores_at(self, step: int) -> bool:
        return self._due(step) or (bool(self._inner.needs) and self._inner.scores_at(step))

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        selection = self._inner.select(candidates, signals, k, generator)
        shares = self._shares()
        if signals.alignment is not None and self._due(candidates.step):
            self._move(candidates, signals)
        said = {f"bandit_share/{name}": float(p) for name, p in zip(self._domains, shares, strict=True)}
        return dataclasses.replace(selection, diagnostics={**selection.diagnostics, **said})

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self._inner.state_dict(),
            "domains": list(self._domains),
            "log": self._log.copy(),
            "moved": self._moved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("domains") != list(self._domains):
            raise ValueError(
                f"domain bandit: expected the state of the domains {list(self._domains)}, got {state.get('domains')}; "
                "resume with the data of the checkpoint"
            )
        self._inner.load_state_dict(state["inner"])
        self._log, self._moved = state["log"].copy(), int(state["moved"])

    def _due(self, step: int) -> bool:
        return step - self._moved >= self._config.move_every

    def _shares(self) -> np.ndarray:
        used = self._prior > 0
        weights = np.where(used, self._prior * np.exp(self._log - self._log[used].max()), 0.0)
        return clipped(weights / weights.sum(), self._floor, self._ceiling)

    def _move(self, candidates: Candidates, signals: Signals) -> None:
        """Move the weights by the utilities [N] of one buffer; one without any spread moves nothing."""
        assert signals.alignment is not None
        utility = signals.alignment.numpy()
        usable = np.isfinite(utility)
        if signals.finite is not None:
            usable &= signals.finite.numpy()
        if usable.sum() < 2 or (spread := utility[usable].std()) == 0:
            return
        gain = (utility[usable] - utility[usable].mean()) / spread
        domains, d = candidates.domains[usable], len(self._domains)
        count = np.bincount(domains, minlength=d)
        mean = np.bincount(domains, weights=gain, minlength=d) / np.maximum(count, 1)
        self._log = self._config.memory * self._log + self._config.step_size * mean
        self._moved = candidates.step
