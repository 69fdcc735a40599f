"""The driver: fill the buffer, score, select, hand the selection to the patched iterator, take the host's step.

Every rank runs the same lines on the same candidates, signals and generator, so that all draw the same K ids without
being told. With `selection.scope: rank_local` that holds for the tensor-parallel ranks of one data-parallel rank, and
the decisions are gathered (rank_local.py). `selection.debug_checks` compares them over all ranks at every step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.config import ConfigError, RunConfig
from megatron_opus.config.strategies import GHOST
from megatron_opus.data.permutation import key
from megatron_opus.errors import Refusal
from megatron_opus.ranks.agreement import on_rank_0
from megatron_opus.runs.ledger import REASONS, exclusions
from megatron_opus.scoring.loss_pass import LossPass
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.selection.prefilter import Prefilter
from megatron_opus.training import rank_local
from megatron_opus.types import Batch, Candidates, Groups, Selection, SelectionStrategy, Signals

ENTROPY_WARNING = 0.99


class TooManyFallbacks(Refusal, RuntimeError):
    """Selection fell back to random more often than `selection.max_fallbacks` allows."""


@dataclass
class Counters:
    """What the run has done so far. Saved with every checkpoint, the same on every rank."""

    step: int = 0  # completed optimizer steps
    update_tokens: int = 0  # trained on
    candidate_tokens: int = 0  # offered, at full sequence length
    scored_tokens: int = 0  # candidates and proxy, at scoring length
    fallbacks: int = 0
    excluded: int = 0  # candidates with non-finite scores


class CandidateSource(Protocol):
    """Where the candidates of each step come from: `data.buffer.CandidateBuffer`, or another loop's own dataset."""

    notices: list[str]  # for the terminal; the driver clears them

    def draw(self, step: int, weights: Tensor | None) -> Candidates: ...

    def settle(self, candidates: Candidates, selected: np.ndarray) -> None: ...

    def counters(self) -> dict[str, dict[str, int]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Sequences(Protocol):
    """The sequences that the ids of candidates and proxy stand for: `data.corpus.Corpus`, or another loop's dataset."""

    @property
    def domains(self) -> Mapping[Any, Sequence[str]]: ...

    def batch(self, ids: np.ndarray) -> Batch: ...

    def tokens(self, ids: np.ndarray) -> Tensor: ...

    def proxy_ids(self, step: int, count: int, seed: int) -> np.ndarray: ...


class SelectionTaker(Protocol):
    """What hands the selected sequences to the training step, in its own layout."""

    def fill_selection(
        self, corpus: Any, sample_ids: np.ndarray, micro_batch_size: int, weights: Tensor | None = None
    ) -> None: ...


class SelectionDriver:
    """One optimizer step's worth of choosing: buffer -> scoring pass -> strategy -> patched iterator."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        corpus: Sequences,
        buffer: CandidateSource,
        strategy: SelectionStrategy,
        scorer: ScoringPass | None,
        iterator: SelectionTaker,
        loss_pass: LossPass | None = None,
        prefilter: Prefilter | None = None,
    ) -> None:
        if strategy.needs and (scorer if "ghost" in strategy.needs else loss_pass) is None:
            raise ConfigError(f"selection.strategy {config.selection.strategy} needs a scoring pass, got none")
        self.counters = Counters()
        self._local = config.selection.scope == "rank_local"
        self.generator = (
            rank_local.generator(config.seed, groups.dp_rank)
            if self._local
            else torch.Generator().manual_seed(config.seed)
        )
        self._config, self._groups, self._corpus = config, groups, corpus
        self._buffer, self._strategy, self._scorer, self._iterator = buffer, strategy, scorer, iterator
        self._loss_pass, self._trained_domains = loss_pass, np.empty(0, dtype=np.int32)
        self._prefilter, self._prefilter_seconds = prefilter, 0.0
        self._picked = False  # the last step's candidates were picked from the pool
        self._entropy_warned = False
        self._geometry = ""
        self._scored = False  # the last step had a scoring pass
        self.notices: list[str] = []  # for the terminal, in order; the trainer prints and clears them

    def choose(self, k: int | None = None) -> tuple[Candidates, Signals, Selection]:
        """Draw N candidates, select K and fill the iterator with this rank's share of them, in buffer order.

        `k` is K of this step where the batch size changes while the run goes on; None: `training.global_batch_size`.
        Buffer order, not draw order: with rho = 1 the step is then bit-identical to one without selection.
        """
        c, step = self._config, self.counters.step
        k = c.training.global_batch_size if k is None else k
        pool = self._buffer.draw(step, self._strategy.domain_weights(step))
        score = self._score if "ghost" in self._strategy.needs else self._losses
        self._scored = bool(self._strategy.needs) and self._strategy.scores_at(step)
        if not self._scored and self._scorer is not None:
            self._scorer.invalidate()  # what the next pass may use again must be of the step before it
        candidates, kept = self._kept(pool)
        signals = score(candidates) if self._scored else Signals()
        if self._local:
            mine, g = rank_local.own(candidates, self._groups), self._groups
            selection = self._strategy.select(mine, signals, k // g.dp_size, self.generator)
            signals, selection = rank_local.merge(signals, selection, len(mine), g)
        else:
            selection = self._strategy.select(candidates, signals, k, self.generator)
        self._check_excluded(candidates, signals)
        self._check(selection)
        self.notices += [*self._buffer.notices, *self._strategy.notices()]
        self._buffer.notices.clear()
        order = torch.argsort(selection.indices)
        chosen = selection.indices[order]
        self._iterator.fill_selection(
            self._corpus,
            candidates.sample_ids[chosen.numpy()],
            c.training.micro_batch_size,
            weights=None if selection.weights is None else selection.weights[order],
        )
        self._buffer.settle(pool, kept[chosen.numpy()])
        selection = self._learnt(candidates, signals, selection)
        self._trained_domains = candidates.domains[chosen.numpy()]
        self.counters.candidate_tokens += len(candidates) * c.data.seq_length
        self.counters.update_tokens += k * c.data.seq_length
        return candidates, signals, selection

    def _kept(self, pool: Candidates) -> tuple[Candidates, np.ndarray]:
        """The N candidates that are left of the pool, and [N] their positions in it; all of it without a prefilter.

        Where the prefilter rests the first N are taken: the pool is shuffled.
        """
        if self._prefilter is None:
            return pool, np.arange(len(pool))
        settings = self._config.selection.prefilter
        between = settings.every_step and self._prefilter.pays and self._strategy.picks_at(pool.step)
        self._picked = self._scored or between
        if self._picked:
            started = time.perf_counter()
            mine = rank_local.own(pool, self._groups)  # each data-parallel rank reads its part of the pool
            expected = self._prefilter.expected(self._corpus.tokens(mine.sample_ids), mine.domains)
            expected = np.concatenate(rank_local.gathered(expected, self._groups))
            kept = self._prefilter.pick(expected, self._scored)
            unseen = self._prefilter.unseen
            self._prefilter_seconds = time.perf_counter() - started
        else:
            kept, unseen = np.arange(len(pool) // settings.pool_ratio), 0
            self._prefilter_seconds = 0.0
        return replace(pool, sample_ids=pool.sample_ids[kept], domains=pool.domains[kept], unseen=unseen), kept

    def _learnt(self, candidates: Candidates, signals: Signals, selection: Selection) -> Selection:
        """The selection with what the prefilter says, after it has learnt from the step's utilities."""
        if self._prefilter is None or not (self._scored or self._config.selection.prefilter.every_step):
            return selection
        started = time.perf_counter()
        said = {"prefilter_picks": float(self._picked)}
        if signals.alignment is not None:
            tokens = self._corpus.tokens(candidates.sample_ids)
            said |= self._prefilter.learn(tokens, candidates.domains, signals.alignment, signals.finite)
        seconds = self._prefilter_seconds + time.perf_counter() - started
        return replace(selection, diagnostics={**selection.diagnostics, **said, "prefilter_seconds": seconds})

    @property
    def wants_sequence_loss(self) -> bool:
        return self._strategy.wants_domain_loss

    def observe(self, sequence_loss: Tensor) -> None:
        """Losses [K] of the sequences just trained on, in the order in which the iterator was filled."""
        losses = sequence_loss.double().numpy()
        finite = np.isfinite(losses)
        of_domain = {
            name: losses[finite & (self._trained_domains == d)]
            for d, name in enumerate(self._corpus.domains["candidates"])
        }
        means = {name: float(values.mean()) for name, values in of_domain.items() if len(values)}
        self._strategy.observe(self.counters.step, means)
        self.notices += self._strategy.notices()

    def took(self, choosing: float, updating: float) -> None:
        """Seconds that the step's choice and its update took on this rank; those of rank 0 count. Collective."""
        if self._strategy.wants_seconds and self._scored:
            self._strategy.observe_seconds(*on_rank_0(lambda: (choosing, updating)))

    @property
    def seq_length(self) -> int:
        """Tokens of each sequence."""
        return self._config.data.seq_length

    @property
    def domain_counters(self) -> dict[str, dict[str, int]]:
        """Candidate domain -> offered, used, epoch, sequences (CandidateBuffer.counters)."""
        return self._buffer.counters()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what is chosen next. The same on every rank; collective with scope `rank_local`."""
        return {
            "counters": vars(self.counters).copy(),
            "generators": rank_local.gathered(self.generator.get_state(), self._groups)
            if self._local
            else [self.generator.get_state()],
            "buffer": self._buffer.state_dict(),
            "strategy": self._strategy.state_dict(),
            "scorer": None if self._scorer is None else self._scorer.state_dict(),
            "prefilter": None if self._prefilter is None else self._prefilter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ConfigError for another number of data-parallel ranks."""
        expected, saved = self._groups.dp_size if self._local else 1, len(state["generators"])
        if saved != expected:
            raise ConfigError(
                f"selection.scope {self._config.selection.scope}: the checkpoint has the generators of {saved} "
                f"data-parallel ranks, this run needs {expected}; resume with as many ranks as the run was started with"
            )
        self.counters = Counters(**state["counters"])
        self.generator.set_state(state["generators"][self._groups.dp_rank if self._local else 0])
        self._buffer.load_state_dict(state["buffer"])
        self._strategy.load_state_dict(state["strategy"])
        if self._scorer is not None and state["scorer"] is not None:
            self._scorer.load_state_dict(state["scorer"])
        if self._prefilter is not None:
            self._prefilter.load_state_dict(state["prefilter"])

    def after_checkpoint(self) -> None:
        if self._scorer is not None:
            self._scorer.invalidate()

    def _score(self, candidates: Candidates) -> Signals:
        assert self._scorer is not None
        s, g = self._config.selection, self._groups
        n = len(candidates) // g.dp_size
        share = candidates.sample_ids[g.dp_rank * n : (g.dp_rank + 1) * n]
        proxy_ids = self._corpus.proxy_ids(self.counters.step, s.proxy_batch_size, self._config.seed)
        # equal shares, for collectives must be equally many on every rank; what fills up the last ones is not counted
        p = -(-len(proxy_ids) // g.dp_size)
        counted = min(p, max(0, len(proxy_ids) - g.dp_rank * p))
        signals = self._scorer(
            self._corpus.batch(share),
            self._corpus.batch(np.resize(proxy_ids, p * g.dp_size)[g.dp_rank * p : (g.dp_rank + 1) * p]),
            interaction=s.redundancy.scale != "off" and s.strategy in GHOST,
            proxy_padding=p - counted,
            # a function of seed and step: the same windows on every rank, and again in a resumed run
            window_seed=key("scoring-window", self._config.seed, self.counters.step) >> 1,
        )
        read = len(candidates) + signals.proxy_read * len(proxy_ids)
        self.counters.scored_tokens += read * self._config.scored_length
        if signals.geometry != self._geometry:
            self._geometry = signals.geometry
            self.notices.append(f"step {self.counters.step}: scoring in the geometry of {signals.geometry}")
        return signals

    def _losses(self, candidates: Candidates) -> Signals:
        assert self._loss_pass is not None
        n, rank = len(candidates) // self._groups.dp_size, self._groups.dp_rank
        signals = self._loss_pass(self._corpus.batch(candidates.sample_ids[rank * n : (rank + 1) * n]))
        length = min(self._config.selection.score_length, self._config.data.seq_length)
        self.counters.scored_tokens += len(candidates) * length
        return signals

    def _check_excluded(self, candidates: Candidates, signals: Signals) -> None:
        """Count candidates that must not be drawn, and say which and why. The same on every rank."""
        reasons = exclusions(signals, len(candidates))
        self.counters.excluded += len(reasons) - reasons.null_count
        for number, reason in enumerate(REASONS):
            ids = [int(i) for i, r in zip(candidates.sample_ids, reasons.to_pylist(), strict=True) if r == number]
            if ids:
                more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
                self.notices.append(
                    f"step {self.counters.step}: {len(ids)} of {len(candidates)} candidates excluded for a {reason}: "
                    f"sample ids {ids[:8]}{more}"
                )

    def _check(self, selection: Selection) -> None:
        counters, limit = self.counters, self._config.selection.max_fallbacks
        if selection.fallback:
            counters.fallbacks += 1
            self.notices.append(
                f"step {counters.step}: selection fell back to random ({counters.fallbacks} of at most {limit}): "
                f"{selection.fallback}"
            )
            if counters.fallbacks > limit:
                raise TooManyFallbacks(
                    f"selection fell back to random {counters.fallbacks} times, max_fallbacks allows {limit}; "
                    f"the last reason: {selection.fallback}"
                )
        if selection.diagnostics.get("entropy_ratio", 0.0) > ENTROPY_WARNING and not self._entropy_warned:
            self._entropy_warned = True
            better = {"absolute": "std", "std": "mad"}.get(self._config.selection.temperature_unit)
            hint = f", or set selection.temperature_unit={better}" if better else ""
            self.notices.append(
                f"step {counters.step}: WARNING: entropy ratio {selection.diagnostics['entropy_ratio']:.4f} is above "
                f"{ENTROPY_WARNING}: selection is almost uniform. Lower selection.temperature{hint}"
            )
        if self._config.selection.debug_checks and dist.is_initialized() and dist.get_world_size() > 1:
            drawn: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(drawn, selection.indices.tolist())
            if any(other != drawn[0] for other in drawn):
                different = [rank for rank, other in enumerate(drawn) if other != drawn[0]]
                raise RuntimeError(f"step {counters.step}: ranks {different} drew other candidates than rank 0")
