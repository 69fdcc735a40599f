"""Plan what a pass does with the factors a and b of each scored matrix.

The gradient of one sequence is G = sum_t b_t a_t^T. Every estimator projects both factors and then reduces them. The
kept factor is a times the projection `kept`, the projected factor is b times the projection `projected`:

    features   an operator's sketch of P G (sketch.py): phi of a candidate, psi of the proxy
    gradient   projected^T kept, summed over all tokens: the (half sketched) proxy gradient
    aligned    the sum of kept * projected over tokens and columns: <P G, g_V> of a candidate, exact in both of

    one_sided  S sketches the side that tensor parallelism leaves whole. Where the rows are cut, the proxy gives
               Z = L g_V S^T [O, s], and sum_t (b_t Z) . (a_t R S^T) estimates <L G R, g_V>. Where the columns are cut,
               the sides change places.
    direction  W = P* g_V [O, I] is whole, and sum_t (b_t W) . a_t is the alignment without any sketch.

Example of `one_sided` with s = 64: a matrix [3072, 768] whose rows are cut over 2 ranks has O = 1536 and I = 768. The
proxy's Z is [1536, 64]. A token's a becomes 64 numbers by the sketch, and its b becomes 64 numbers by Z.

Parts whose projections are matrices are joined, so that one matrix product reads each factor of a layer.
Legend: O / I are the rows / columns that this rank holds, s is the one-sided dimension, F the feature dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_opus.config import SketchConfig
from megatron_opus.scoring.preconditioners import Preconditioners
from megatron_opus.selection.precondition import Projection, Side
from megatron_opus.selection.sketch import Operator, build_sketch, side_sketch
from megatron_opus.types import ScoredLayer


@dataclass(frozen=True, kw_only=True)
class Part:
    """Say how the factors of one matrix are projected, and what becomes of each column of the result.

    The first `widths` columns go to the operator, and the columns after them are multiplied and summed: every column
    has exactly one use.
    """

    kept: Projection  # of a
    projected: Projection  # of b
    operator: Operator | None = None  # features
    widths: tuple[int, int] | None = None  # columns of kept and projected that are the operator's; None: all
    aligned: bool = False  # the columns after those are multiplied and summed
    alignments: int = 1  # so many equal parts of these columns are summed apart: with the proxy, with half of it
    column: int = 0  # the first of these alignments in the sums
    gradient: bool = False
    probe: bool = False  # the gradient of one sequence between two random sides, to be verified
    own: bool = False  # the projections are this tensor-parallel rank's own: tokens scattered over ranks come first


class Plan:
    """Make the parts of every matrix: for the proxy first, and with what it gave for the candidates."""

    def __init__(
        self, matrices: Sequence[ScoredLayer], config: SketchConfig, device: torch.device, *, target: str = "gradient"
    ) -> None:
        """`target`: what the alignment is measured against, the proxy's gradient g_V or its own `update`, P g_V."""
        self.alignment, self._one_sided_dim = config.alignment, config.one_sided_dim
        self._updates = target == "update"
        self.operators = [
            build_sketch(config, name=x.name, d_out=x.d_out, d_in=x.d_in, rows=x.rows, cols=x.cols, device=device)
            for x in matrices
        ]
        self.matrices = matrices
        self._sides: list[Projection] = []
        if config.alignment == "one_sided":
            self._sides = [
                side_sketch(config.seed, x.name, "one-sided", size, config.one_sided_dim, ranges, device)
                for x in matrices
                for size, ranges in [(x.d_in, x.cols) if x.cut == "rows" else (x.d_out, x.rows)]
            ]

    @property
    def direct(self) -> bool:
        """Say whether alignments are read off the candidates' factors instead of their features."""
        return self.alignment != "features"

    def proxy(self) -> list[list[Part]]:
        """Return the proxy's parts, which give raw gradients: P is applied to those later, or to the candidates."""
        if self.alignment == "features":
            return [[Part(kept=x.cols, projected=x.rows, operator=x)] for x in self.operators]
        if self.alignment == "direction":
            return [[Part(kept=None, projected=None, gradient=True)] for _ in self.matrices]
        return [
            [
                Part(kept=side, projected=None, gradient=True)
                if x.cut == "rows"
                else Part(kept=None, projected=side, gradient=True)
            ]
            for x, side in zip(self.matrices, self._sides, strict=True)
        ]

    def gradient_shape(self, index: int) -> tuple[int, int]:
        """Return the shape of what the proxy's `gradient` part gives on this rank."""
        x = self.matrices[index]
        rows, cols = (sum(n for _, n in ranges) for ranges in (x.rows, x.cols))
        if self.alignment == "one_sided":
            sketched = min(self._one_sided_dim, x.d_in if x.cut == "rows" else x.d_out)
            return (rows, sketched) if x.cut == "rows" else (sketched, cols)
        return rows, cols

    def candidates(
        self,
        preconditioners: Preconditioners,
        gradients: Sequence[Tensor] | None,
        features: bool,
        half: Sequence[Tensor] | None = None,
    ) -> list[list[Part]]:
        """Return the candidates' parts, which hold the preconditioner of the coming step except its kappa.

        gradients are what the proxy's `gradient` parts gave, averaged over the proxy; they are needed when `direct`.
        half is the same of half of the proxy, where the alignment with that is wanted too.
        features says whether phi is wanted, for the alignment or for the interaction. The call is collective, as
        `Preconditioners.compose` is.
        """
        requests: list[tuple[int, Side, Projection]] = []
        measured = [x for x in (gradients, half) if x is not None]
        if self._updates:  # <P G, P g_V>: P's sides twice, its factor in what is compared
            measured = [[preconditioners.kappa(i) * x for i, x in enumerate(found)] for found in measured]
        if features:
            for i, operator in enumerate(self.operators):
                requests += [(i, "cols", operator.cols), (i, "rows", operator.rows)]
        ours = len(requests)
        if self.alignment == "one_sided":
            for one in measured:
                for i, (x, side) in enumerate(zip(self.matrices, self._sides, strict=True)):
                    if x.cut == "rows":
                        requests += [(i, "cols", side), (i, "rows", one[i])]
                    else:
                        requests += [(i, "cols", one[i].mT), (i, "rows", side)]
        found_sides = preconditioners.compose(requests)
        if self._updates:
            again = [(i, side, x) for (i, side, _), x in zip(requests[ours:], found_sides[ours:], strict=True)]
            found_sides[ours:] = preconditioners.compose(again)
        composed = iter(found_sides)
        parts: list[list[Part]] = [[] for _ in self.matrices]
        if features:
            for i, operator in enumerate(self.operators):
                own = preconditioners.of_shard(i)
                parts[i].append(Part(kept=next(composed), projected=next(composed), operator=operator, own=own))
        for number, one in enumerate(measured):
            for i, found in enumerate(parts):
                if self.alignment == "direction":
                    aligned = self._direction(i, preconditioners, one[i])
                else:
                    own = preconditioners.of_shard(i)
                    aligned = Part(kept=next(composed), projected=next(composed), aligned=True, own=own)
                joined = _joined(found[-1], aligned) if found else None
                found[-1:] = [*found[-1:], replace(aligned, column=number)] if joined is None else [joined]
        return parts

    def _direction(self, index: int, preconditioners: Preconditioners, gradient: Tensor) -> Part:
        multiplier, w = preconditioners.multiplier(index), gradient
        for _ in range(2 if self._updates else 1):
            if multiplier is not None:
                w = w * multiplier
                continue
            (left,) = preconditioners.compose([(index, "rows", w)])
            assert isinstance(left, Tensor)
            (right,) = preconditioners.compose([(index, "cols", left.mT)])
            assert isinstance(right, Tensor)
            w = right.mT
        return Part(kept=None, projected=w, aligned=True, own=True)


def _joined(first: Part, aligned: Part) -> Part | None:
    """Join features with an alignment, or an alignment to others; None where a projection is not a matrix."""
    found = (first.kept, aligned.kept, first.projected, aligned.projected)
    matrices = [p for p in found if isinstance(p, Tensor) and p.dim() == 2]
    if len(matrices) < len(found):
        return None
    return replace(
        first,
        kept=torch.cat(matrices[:2], 1),
        projected=torch.cat(matrices[2:], 1),
        widths=first.widths if first.aligned else (matrices[0].shape[1], matrices[2].shape[1]),
        aligned=True,
        alignments=first.alignments + 1 if first.aligned else 1,
        own=aligned.own,
    )
