"""The candidate buffer: N sequences per optimizer step, drawn by domain weights without repeats.

Each domain is offered in the order of a keyed permutation of its sequences, one permutation per epoch of that domain,
so that what a run still has to see is a cursor rather than a list. How many each domain gives to a step is rounded so
that the expectation is exact and the error below one sequence, from (seed, step) alone: weights may change at any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from megatron_opus.data.corpus import Corpus, normalised
from megatron_opus.data.domain_schedule import DomainSchedule
from megatron_opus.data.permutation import key, permute, uniform
from megatron_opus.errors import Refusal
from megatron_opus.types import Candidates

STATE_VERSION = 1


class DrawError(Refusal, ValueError):
    """A draw, a settlement or a state that does not fit this buffer."""


@dataclass(kw_only=True)
class _Pool:
    """What one domain still has to offer in its current epoch: the permutation from `cursor` on, then `queue`.

    queue: [n] int64 indices that come after the permutation: returned ones, and those that a new epoch had to put off
    because the buffer that finished the old epoch held them already.
    """

    name: str
    size: int
    epoch: int = 0
    cursor: int = 0
    queue: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    offered: int = 0
    used: int = 0

    def take(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """[count] int64 indices, no two alike, and [count] int64 the epoch of each. Advances the pool."""
        taken = self._next(count, seed)
        epochs = np.full(len(taken), self.epoch, dtype=np.int64)
        if len(taken) < count:
            # Everything of this epoch has been offered and settled or is in this very buffer: begin the next one.
            self.epoch, self.cursor = self.epoch + 1, 0
            postponed: list[np.ndarray] = []
            while len(taken) < count:
                fresh = self._next(count - len(taken), seed)
                again = np.isin(fresh, taken)
                postponed.append(fresh[again])
                taken = np.concatenate([taken, fresh[~again]])
            self.queue = np.concatenate([*postponed, self.queue])
            epochs = np.concatenate([epochs, np.full(count - len(epochs), self.epoch, dtype=np.int64)])
        self.offered += count
        return taken, epochs

    def _next(self, count: int, seed: int) -> np.ndarray:
        fresh = min(count, self.size - self.cursor)
        positions = np.arange(self.cursor, self.cursor + fresh, dtype=np.int64)
        self.cursor += fresh
        order = permute(positions, self.size, key("candidates", seed, self.name, self.epoch))
        late, self.queue = np.split(self.queue, [min(count - fresh, len(self.queue))])
        return np.concatenate([order, late])


class CandidateBuffer:
    """Draws the candidates of each step; identical on every rank that does the same calls.

    weights: candidate domain -> weight, None for shares by tokens. unselected: what becomes of sequences that were
    offered and not chosen: `discard` (not offered again in this epoch of their domain) or `return` (offered again
    after the rest of the epoch, which ends when fewer are left than a draw asks for). A sequence that was used is not
    offered again within the epoch.
    schedule: weights that change during the run, in the place of domain_weights. max_epochs: candidate domain -> how
    often it is gone through at most; sequences count when they are offered, or with `return` when they are used. What
    such a domain cannot give any more, the others give in proportion to their weights.
    Memory: 8 bytes per returned sequence, else constant.
    """

    def __init__(
        self,
        corpus: Corpus,
        size: int,
        seed: int,
        domain_weights: Mapping[str, float] | None = None,
        unselected: Literal["discard", "return"] = "discard",
        *,
        schedule: DomainSchedule | None = None,
        max_epochs: Mapping[str, float] | None = None,
    ) -> None:
        self.size = size
        self.seed = seed
        self.unselected = unselected
        self.domains = corpus.domains["candidates"]
        self._schedule = schedule or DomainSchedule(
            steps=(0,), weights=corpus.candidate_weights(domain_weights)[np.newaxis]
        )
        self.weights = self._schedule.prior
        self._fingerprint = corpus.fingerprint
        self._first_ids = corpus.first_ids("candidates")
        self._pools = [
            _Pool(name=n, size=int(s)) for n, s in zip(self.domains, corpus.sequences("candidates"), strict=True)
        ]
        self._most = np.array([_most(pool, max_epochs or {}) for pool in self._pools])
        for name in max_epochs or {}:
            if name not in self.domains:
                raise DrawError(
                    f"data.domain_max_epochs: no candidate domain {name!r}; there are {', '.join(self.domains)}"
                )
        self.notices: list[str] = []  # for the terminal; the caller clears them
        self._exhausted: set[str] = set()
        self._step = -1  # of the last draw
        self._drawn: tuple[Candidates, np.ndarray] | None = None  # drawn and not settled yet; epoch of each
        if size < 1:
            raise DrawError(f"buffer size: expected a positive number, got {size}")
        # Rounded up: a run must not stop at the first step whose rounding goes the other way.
        largest = self._schedule.weights.max(0)
        self._check_counts(np.ceil(largest * size - 1e-9).astype(np.int64), "with the configured weights")

    def draw(self, step: int, weights: Sequence[float] | np.ndarray | torch.Tensor | None = None) -> Candidates:
        """N candidates for `step`, no two alike, domains mixed. weights: [D] for this step, None: the configured ones.

        With a schedule, weights are what a strategy asks for in relation to `self.weights` (DomainSchedule.shares).
        Steps must increase, and every draw must be settled before the next one. Raises DrawError.
        """
        if self._drawn is not None:
            raise DrawError(f"step {step}: the candidates of step {self._step} are not settled; call settle first")
        if step <= self._step:
            raise DrawError(f"step {step}: the buffer already drew for step {self._step}; steps must increase")
        shares = self._schedule.shares(step, weights if weights is None else np.asarray(weights))
        if shares.shape != (len(self._pools),):
            raise DrawError(f"weights: expected {len(self._pools)} ({', '.join(self.domains)}), got {shares.shape}")
        counts = systematic_counts(shares, self.size, uniform("counts", self.seed, step))
        counts = self._within_epochs(step, counts, shares)
        self._check_counts(counts, f"at step {step}")
        ids, domains, epochs = [], [], []
        for d, (pool, count) in enumerate(zip(self._pools, counts.tolist(), strict=True)):
            indices, epoch = pool.take(count, self.seed)
            ids.append(indices + self._first_ids[d])
            domains.append(np.full(count, d, dtype=np.int32))
            epochs.append(epoch)
        # Mixed, so that each data-parallel rank scores a similar share of every domain.
        mixed = permute(np.arange(self.size), self.size, key("mix", self.seed, step))
        drawn = Candidates(
            step=step, sample_ids=np.concatenate(ids)[mixed], domains=np.concatenate(domains)[mixed].astype(np.int32)
        )
        self._step, self._drawn = step, (drawn, np.concatenate(epochs)[mixed])
        return drawn

    def settle(self, candidates: Candidates, selected: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Tell which positions of the last draw were used for the update; the others are discarded or returned.

        Raises DrawError for other candidates than the last draw's, or positions that are repeated or out of range.
        """
        if self._drawn is None or candidates.step != self._drawn[0].step:
            raise DrawError(f"settle: no open draw for step {candidates.step}; the last one was step {self._step}")
        drawn, epochs = self._drawn
        if not np.array_equal(candidates.sample_ids, drawn.sample_ids):
            raise DrawError(f"settle: these are not the candidates that were drawn for step {drawn.step}")
        positions = np.asarray(selected, dtype=np.int64).reshape(-1)
        used = np.zeros(len(drawn), dtype=bool)
        if positions.size and (positions.min() < 0 or positions.max() >= len(drawn)):
            raise DrawError(f"settle: expected positions 0..{len(drawn) - 1}, got {positions.tolist()}")
        used[positions] = True
        if used.sum() != len(positions):
            raise DrawError(f"settle: a position is given twice: {positions.tolist()}")
        for d, pool in enumerate(self._pools):
            mine = drawn.domains == d
            pool.used += int((mine & used).sum())
            if self.unselected == "return":
                # An epoch that has ended in this draw takes nothing back: its sequences are in the new one anyway.
                back = mine & ~used & (epochs == pool.epoch)
                pool.queue = np.concatenate([pool.queue, drawn.sample_ids[back] - self._first_ids[d]])
        self._drawn = None

    def counters(self) -> dict[str, dict[str, int]]:
        """Domain -> offered, used (sequences since the start), epoch (times it has been gone through), sequences."""
        return {
            p.name: {"offered": p.offered, "used": p.used, "epoch": p.epoch, "sequences": p.size} for p in self._pools
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain data and int64 tensors; taken between `settle` and the next `draw`."""
        if self._drawn is not None:
            raise DrawError(f"state_dict: the candidates of step {self._step} are not settled; call settle first")
        pools = {
            p.name: {
                "epoch": p.epoch,
                "cursor": p.cursor,
                "queue": torch.from_numpy(p.queue.copy()),
                "offered": p.offered,
                "used": p.used,
            }
            for p in self._pools
        }
        return {**self._identity(), "step": self._step, "domains": pools}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises DrawError where data, seed, N or `unselected` differ."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DrawError(
                    f"cannot resume the candidate buffer: {name} was {state.get(name)!r}, now {mine!r}; resume with "
                    "the data and settings of the checkpoint, or start a new run"
                )
        for pool in self._pools:
            saved = state["domains"][pool.name]
            pool.epoch, pool.cursor = int(saved["epoch"]), int(saved["cursor"])
            pool.offered, pool.used = int(saved["offered"]), int(saved["used"])
            pool.queue = np.asarray(saved["queue"], dtype=np.int64).copy()
        self._step, self._drawn = int(state["step"]), None

    def _within_epochs(self, step: int, counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """[D] counts of the same sum that keep to `max_epochs`. Raises DrawError where nothing is left to give."""
        done = np.array([p.used if self.unselected == "return" else p.offered for p in self._pools])
        room = np.maximum(self._most - done, 0)
        for pool, asked, left in zip(self._pools, counts.tolist(), room.tolist(), strict=True):
            if asked > left and pool.name not in self._exhausted:
                self._exhausted.add(pool.name)
                self.notices.append(
                    f"step {step}: domain {pool.name} has been gone through as often as data.domain_max_epochs allows "
                    f"({pool.size} sequences, {pool.offered} offered, {pool.used} used); the others fill its share"
                )
        given, turn = np.minimum(counts, room), 0
        while (missing := self.size - int(given.sum())) > 0:
            open_ = np.where(room > given, shares, 0.0)
            if open_.sum() <= 0:
                raise DrawError(
                    f"step {step}: {missing} of {self.size} candidates are missing, for every domain with a weight has "
                    "been gone through as often as data.domain_max_epochs allows; raise it, add text or train for "
                    "fewer steps"
                )
            more = systematic_counts(normalised(open_), missing, uniform("epochs", self.seed, step, turn))
            given, turn = np.minimum(given + more, room), turn + 1
        return given

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint,
            "seed": self.seed,
            "size": self.size,
            "unselected": self.unselected,
        }

    def _check_counts(self, counts: np.ndarray, when: str) -> None:
        for pool, count in zip(self._pools, counts.tolist(), strict=True):
            if count > pool.size:
                raise DrawError(
                    f"domain {pool.name}: {when}, {count} of the N = {self.size} candidates are to come from its "
                    f"{pool.size} sequences; lower its weight in data.domain_weights, N, or give it more text"
                )


def _most(pool: _Pool, max_epochs: Mapping[str, float]) -> int:
    """Sequences that a domain may give to the whole run."""
    epochs = max_epochs.get(pool.name)
    return 2**62 if epochs is None else int(epochs * pool.size)


def systematic_counts(weights: np.ndarray, total: int, offset: float) -> np.ndarray:
    """[D] int64, sum `total`: how many of `total` draws fall to each domain.

    weights: [D] float64, sum 1; offset: uniform in [0, 1). Systematic sampling: expectation total * weights exactly,
    each count within one of it; a domain of weight 0 gets none.
    """
    edges = np.floor(np.cumsum(weights) * total + offset).astype(np.int64)
    # From the last domain with a weight on: all of it, whatever the sum was rounded to.
    edges[np.flatnonzero(weights)[-1] :] = total
    return np.diff(np.minimum(edges, total), prepend=0)
