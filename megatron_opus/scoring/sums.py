"""What one micro-batch is read as, and the sums to which what is read is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opus.scoring.projections import Part


class Sums:
    """Add up what a pass reads on this rank. The sums are partial: those of tensor-parallel ranks are added later.

    Of the n candidates, phi [n, F] float32 are the features, and align [n, 1] float64 is the alignment, or [n, 2] with
    that of half of the proxy. Of the proxy, psi [F] float32 is the sum of the features over its sequences, and
    gradients [rows, columns] float32 is such a sum for each matrix. F is the sum of the slots' sketch dimensions (scope
    `layer`) or their maximum (scope `model`: all share one sketch). A slot is one matrix, or all experts of a layer,
    which share a sketch with independent hashes. Three slots of 8192 give F = 24576 or 8192.

    Experts see sequences of `shares` data-parallel ranks: phi is then [shares * n, F], align has as many rows, of which
    n rows are this rank's own.
    """

    def __init__(
        self,
        dims: Sequence[int],
        slots: Sequence[int],
        n: int,
        scope: str,
        device: torch.device,
        *,
        features: bool = True,
        width: int = 0,
        shares: int = 1,
        alignments: int = 1,
    ) -> None:
        """`slots` numbers the slot of each matrix, ascending from 0 at their first use. `width` is at least the F of
        scope `model`: other pipeline stages may have larger matrices."""
        widest = [max(d for d, s in zip(dims, slots, strict=True) if s == slot) for slot in range(len(set(slots)))]
        self.offsets = [sum(widest[:slot]) if scope == "layer" else 0 for slot in slots]
        self.dims, self.slots = list(dims), list(slots)
        self.n, self.shares = n, shares
        total = (sum(widest) if scope == "layer" else max([width, *dims])) if features else 0
        self.phi = torch.zeros(shares * n, total, dtype=torch.float32, device=device)
        self.psi = torch.zeros(total, dtype=torch.float32, device=device)
        self.align = torch.zeros(shares * n, alignments, dtype=torch.float64, device=device)
        self.load: dict[int, Tensor] = {}  # of each layer of experts, [n, experts]: tokens of the candidates
        self.probes: dict[int, Tensor] = {}  # of each matrix, [k, k] float32: see verify.py
        self.epsilon = 0.0  # relative rounding error of the least precise activations that were seen
        self.gradients: list[Tensor | None] = [None] * len(dims)

    def columns(self, matrix: int) -> slice:
        return slice(self.offsets[matrix], self.offsets[matrix] + self.dims[matrix])

    def all_columns(self) -> list[slice]:
        return [self.columns(i) for i in range(len(self.dims))]

    def add_load(self, layer: int, first: int, found: Tensor) -> None:
        """Add the load [sequences, experts] of candidates first, first + 1, ... in one layer of experts."""
        empty = torch.zeros(self.n, found.shape[1], dtype=torch.float32, device=found.device)
        self.load.setdefault(layer, empty)[first : first + len(found)] += found

    def of_share(self, value: Tensor, share: int, count: int) -> Tensor:
        """Return of phi or align the first `count` rows of one share."""
        return value.view(self.shares, self.n, *value.shape[1:])[share, :count]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Say how a micro-batch is read: as the proxy, or as the candidates first, first + 1, ..."""

    parts: Sequence[Sequence[Part]]  # of each matrix
    candidate: bool
    shape: tuple[int, int]  # sequences and tokens of the micro-batch
    first: int = 0
    probed: int = 0  # the sequence of the micro-batch that parts with `probe` read
    share: int = 0  # of this rank, in `Sums`


def by_sequence(x: Tensor, places: Tensor, count: int) -> Tensor:
    """Sort rows [rows, w] into [count, longest, w] by `places` [rows], filled up with zeros, which add nothing.

    Five rows of sequences 0, 1, 0, 0, 1 become [2, 3, w].
    """
    order = torch.argsort(places, stable=True)
    counts = torch.bincount(places, minlength=count)
    starts = counts.cumsum(0) - counts
    sorted_places = places[order]
    within = torch.arange(len(places), device=x.device) - starts[sorted_places]
    out = x.new_zeros(count, int(counts.max()), x.shape[-1])
    out[sorted_places, within] = x[order]
    return out
