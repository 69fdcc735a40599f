"""ADO: domain shares of the buffer from scaling laws fitted while training (arXiv 2410.11820, Algorithm 2).

Per domain d, with n sequences trained on so far (all domains: one clock, as in the authors' code):

    L_d(n) = eps_d + beta_d n^-alpha_d                 fitted to the training loss of the domain's own sequences
    slope_d = alpha_d (L_d(n) - eps_d) / n             what another sequence is expected to gain
    rho_d   proportional to mu_d slope_d h_d^0.5       preference; mu the configured weights
    pi_t    = 0.1 rho_t + 0.9 rho_bar_{t-1}, clipped   policy: the shares of step t; rho_bar the running mean of rho
    h      <- 0.9 h + 0.1 pi_t                         history

Curves are averages over `block_steps` steps, which both smooths and thins them. The losses are those that training
computes anyway. Until a domain has a fit it keeps its configured weight, and the others share the rest; a fit that
fails keeps the old one and is counted and said.

What is trained on inside the buffer is another strategy's choice: random, OPUS, or any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import AdoConfig, ConfigError
from megatron_opus.selection.scaling_law import FitError, ScalingLaw, fit
from megatron_opus.selection.shares import clipped, share_bounds
from megatron_opus.selection.strategies.base import Around
from megatron_opus.types import Candidates, Selection, SelectionStrategy, Signals


class AdoStrategy(Around):
    """`inner` chooses in the buffer that ADO fills. State is the same on every rank that observes the same losses."""

    def __init__(
        self,
        inner: SelectionStrategy,
        config: AdoConfig,
        domains: Sequence[str],
        prior: np.ndarray,
        ceiling: np.ndarray | None = None,
        owed: np.ndarray | None = None,
    ) -> None:
        """prior [D], sum 1: the configured weights. ceiling [D]: shares that a domain's number of sequences allows;
        owed [D]: shares that the floors of the selection need in the buffer."""
        d = len(domains)
        if prior.shape != (d,):
            raise ConfigError(f"selection.ado: expected a weight for each of {list(domains)}, got shape {prior.shape}")
        super().__init__(inner)
        self.wants_domain_loss = True
        self._config, self._domains = config, tuple(domains)
        self._prior = np.asarray(prior, dtype=np.float64)
        self._floor, self._ceiling = share_bounds(self._prior, config.min_share, ceiling, owed, key="selection.ado")
        self._policy, self._history, self._mean = self._prior.copy(), self._prior.copy(), self._prior.copy()
        self._laws: list[ScalingLaw | None] = [None] * d
        self._curve_n: list[list[float]] = [[] for _ in range(d)]
        self._curve_loss: list[list[float]] = [[] for _ in range(d)]
        self._block = np.zeros((d, 3))  # of the block in progress: sequences, sum of loss, sum of n
        self._trained = 0  # n
        self._steps = 0  # observed
        self._failed = 0
        self._counts = np.zeros(d)  # of the last selection
        self._notices: list[str] = []

    def domain_weights(self, step: int) -> Tensor | None:
        return torch.from_numpy(self._policy.copy())

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        selection = self._inner.select(candidates, signals, k, generator)
        chosen = candidates.domains[selection.indices.numpy()]
        self._counts = np.bincount(chosen, minlength=len(self._domains)).astype(np.float64)
        shares = {f"ado_share/{name}": float(p) for name, p in zip(self._domains, self._policy, strict=True)}
        fits = {"ado_fitted": float(sum(x is not None for x in self._laws)), "ado_failed_fits": float(self._failed)}
        return Selection(
            indices=selection.indices,
            weights=selection.weights,
            utility=selection.utility,
            redundancy=selection.redundancy,
            diagnostics={**selection.diagnostics, **shares, **fits},
            fallback=selection.fallback,
        )

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        """Losses of the step that has just been taken, per domain that was in it; fits and moves the policy."""
        c = self._config
        self._inner.observe(step, domain_loss)
        self._trained += int(self._counts.sum())
        self._steps += 1
        if step >= c.skip_steps:
            for d, name in enumerate(self._domains):
                loss = domain_loss.get(name)
                if loss is not None and np.isfinite(loss) and self._counts[d] > 0:
                    self._block[d] += self._counts[d] * np.array([1.0, loss, self._trained])
            if (step + 1 - c.skip_steps) % c.block_steps == 0:
                self._end_block()
        if step + 1 >= c.first_fit and (step + 1 - c.first_fit) % c.refit_every == 0:
            self._refit(step)
        if any(law is not None for law in self._laws):
            self._move()

    def notices(self) -> list[str]:
        said, self._notices = self._notices, []
        return [*self._inner.notices(), *said]

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self._inner.state_dict(),
            "domains": list(self._domains),
            "policy": self._policy.copy(),
            "history": self._history.copy(),
            "mean": self._mean.copy(),
            "laws": [None if law is None else vars(law).copy() for law in self._laws],
            "curve_n": [list(x) for x in self._curve_n],
            "curve_loss": [list(x) for x in self._curve_loss],
            "block": self._block.copy(),
            "trained": self._trained,
            "steps": self._steps,
            "failed": self._failed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("domains") != list(self._domains):
            raise ValueError(
                f"ado: expected the state of the domains {list(self._domains)}, got {state.get('domains')}; resume "
                "with the data of the checkpoint"
            )
        self._inner.load_state_dict(state["inner"])
        self._policy, self._history, self._mean = (state[x].copy() for x in ("policy", "history", "mean"))
        self._laws = [None if law is None else ScalingLaw(**law) for law in state["laws"]]
        self._curve_n = [list(x) for x in state["curve_n"]]
        self._curve_loss = [list(x) for x in state["curve_loss"]]
        self._block = state["block"].copy()
        self._trained, self._steps, self._failed = state["trained"], state["steps"], state["failed"]

    def _end_block(self) -> None:
        for d, (count, loss, n) in enumerate(self._block.tolist()):
            if count:
                self._curve_n[d].append(n / count)
                self._curve_loss[d].append(loss / count)
        self._block[:] = 0.0

    def _refit(self, step: int) -> None:
        for d, name in enumerate(self._domains):
            if self._prior[d] == 0:
                continue
            try:
                self._laws[d] = fit(
                    np.array(self._curve_n[d]),
                    np.array(self._curve_loss[d]),
                    min_log_epsilon=self._config.min_log_epsilon,
                )
            except FitError as error:
                self._failed += 1
                kept = "the last fit stays" if self._laws[d] is not None else "it keeps its configured weight"
                self._notices.append(
                    f"step {step}: no scaling law for {name} ({error}); {kept}; {self._failed} failed fits so far"
                )

    def _move(self) -> None:
        c, n = self._config, float(max(1, self._trained))
        rho = self._preference(n)
        share = c.preference
        self._policy = clipped(share * rho + (1 - share) * self._mean, self._floor, self._ceiling)
        self._mean = self._mean + (rho - self._mean) / (self._steps + 1)
        self._history = (1 - c.credit) * self._history + c.credit * self._policy

    def _preference(self, n: float) -> np.ndarray:
        """[D], sum 1. Domains without a fit keep mu; the others share the rest by what they are expected to gain."""
        fitted = np.array([law is not None for law in self._laws])
        gain = np.array([0.0 if law is None else law.slope(n) for law in self._laws])
        value = self._prior * gain * self._history**self._config.credit_power
        rest = self._prior[fitted].sum()
        if value.sum() <= 0:  # every curve is flat: nothing to prefer
            return self._prior.copy()
        return np.where(fitted, rest * value / value.sum(), self._prior)
