"""Rank-local selection: every data-parallel rank draws K / DP of its own N / DP candidates.

Per data-parallel rank r of DP, n = N / DP, k = K / DP (its tensor-parallel ranks do the same with the same numbers):

    own candidates     positions r n ... (r + 1) n - 1 of the buffer
    signals            alignment [n], interaction [n, n]; the proxy gradient is that of all ranks
    selection          k positions of n, from a generator of its own
    merged             K positions of N, the same on every rank: buffer, ledger and metrics see all decisions

No feature leaves its rank; what is gathered are the decisions, a few numbers for each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.data.permutation import key
from megatron_opus.types import Candidates, Groups, Selection, Signals

SUMMED = frozenset({"excluded"})  # diagnostics that add up over ranks; of the others the mean is reported


@dataclass(frozen=True, kw_only=True)
class _Decision:
    signals: Signals
    selection: Selection


def generator(seed: int, dp_rank: int) -> torch.Generator:
    """The draws of one data-parallel rank: independent of those of the others."""
    return torch.Generator().manual_seed(key("rank-local", seed, dp_rank))


def own(candidates: Candidates, groups: Groups) -> Candidates:
    """This data-parallel rank's N / DP candidates."""
    n = len(candidates) // groups.dp_size
    mine = slice(groups.dp_rank * n, (groups.dp_rank + 1) * n)
    return replace(candidates, sample_ids=candidates.sample_ids[mine], domains=candidates.domains[mine])


def merge(signals: Signals, selection: Selection, n: int, groups: Groups) -> tuple[Signals, Selection]:
    """The decisions of all data-parallel ranks over their n candidates, as decisions over N. Collective over `dp`.

    Draw order runs over the draws, then over the ranks: draw d of rank r is at d DP + r. The interaction is left out:
    it exists only within ranks. A fallback of any rank is one of the step, which says the rank.
    """
    everyone = gathered(_Decision(signals=replace(signals, interaction=None), selection=selection), groups)
    heard, drawn = [d.signals for d in everyone], [d.selection for d in everyone]
    names = dict.fromkeys(name for s in drawn for name in s.diagnostics)
    diagnostics = {}
    for name in names:
        values = [s.diagnostics[name] for s in drawn if name in s.diagnostics]
        diagnostics[name] = sum(values) / (1 if name in SUMMED else len(values))
    merged = Selection(
        indices=_interleaved([s.indices + rank * n for rank, s in enumerate(drawn)]),
        weights=None if any(s.weights is None for s in drawn) else _interleaved([s.weights for s in drawn]),
        utility=_joined([s.utility for s in drawn], n),
        redundancy=_joined([s.redundancy for s in drawn], n),
        diagnostics=diagnostics,
        fallback="; ".join(f"data-parallel rank {r}: {s.fallback}" for r, s in enumerate(drawn) if s.fallback),
    )
    loads = [s.expert_load for s in heard if s.expert_load is not None]
    whole = replace(
        signals,
        halves=None,
        expert_load=torch.cat(loads) if len(loads) == len(heard) else None,
        interaction=None,
        alignment=_joined([s.alignment for s in heard], n),
        loss=_joined([s.loss for s in heard], n),
        finite=_joined([s.finite for s in heard], n),
    )
    return whole, merged


def gathered(mine: Any, groups: Groups) -> list[Any]:
    """What every data-parallel rank has, in rank order. Collective over the dp group."""
    everyone: list[Any] = [mine] * groups.dp_size
    if groups.dp is not None:
        dist.all_gather_object(everyone, mine, group=groups.dp)
    return everyone


def _interleaved(parts: Sequence[Any]) -> Tensor:
    """Draw d of every rank before draw d + 1 of any."""
    return torch.stack(list(parts), dim=1).flatten()


def _joined(parts: Sequence[Tensor | None], n: int) -> Tensor | None:
    """[N] in rank order; None where no rank has values, NaN for the ranks without (their step fell back)."""
    known = [p for p in parts if p is not None]
    if not known:
        return None
    return torch.cat([torch.full((n,), math.nan, dtype=torch.float64) if p is None else p for p in parts])
