"""Linear sketches of per-sequence weight gradients, taken from their factors without forming the gradient.

G(z) = sum_t b_t a_t^T is the [d_out, d_in] weight gradient of one sequence. All operators are linear in G and hash
*global* rows and columns, so the sketches of weight shards add up to the sketch of the whole matrix:

    materialise    every (row, col) has its own bucket of m and sign. The paper's operator. G is formed in row chunks,
                   which costs T d_out d_in and a scatter of d_out d_in per sequence.
                   Var <u, v> about (|u|^2 |v|^2 + <u, v>^2) / m.
    two_sided      bucket (h_row(i), h_col(j)) of m = m1 m2: B1^T A2 with B1 = b S1^T [T, m1], A2 = a S2^T [T, m2].
                   Costs T (d_out m1 + d_in m2 + m1 m2). Larger variance on matrices of low rank.
    two_stage      two_sided to a wider w1 w2, of which cell (i', j') then goes to bucket h(i') + h(j') mod m (Pham and
                   Pagh 2013).

An operator asks for both factors projected (`rows` [O, w], `cols` [I, w]; None: as they are) and turns the projected
factors into features. The preconditioner is composed into the projections (precondition.py).

Shapes: B sequences, T tokens, O / I the rows / columns held by this rank, m the sketch dimension.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from megatron_opus.config import SketchConfig
from megatron_opus.selection import hashing
from megatron_opus.selection.precondition import Buckets, Projection
from megatron_opus.types import Ranges

CHUNK_BYTES = 64 * 2**20  # of what an operator forms at a time over all sequences of a scoring micro-batch


class Operator(Protocol):
    """Sketch the gradients of one matrix from the factors that one rank holds."""

    dim: int

    @property
    def rows(self) -> Projection:
        """Return the projection of b, without the preconditioner; None leaves b as it is."""
        ...

    @property
    def cols(self) -> Projection:
        """Return the projection of a, likewise."""
        ...

    def features(self, kept: Tensor, projected: Tensor, multiplier: Tensor | None = None) -> Tensor:
        """Return this rank's part of the sketch of each sequence's gradient, [B, m] float32.

        kept is the projected a, [B, T, w], and projected the projected b, [B, T, w]; without a projection w is I or O.
        multiplier [O, I] is the exact form of P, which `materialise` alone can apply (TypeError from the others).
        """
        ...


def indices(ranges: Ranges, device: torch.device | str = "cpu") -> Tensor:
    """Return the global indices, int64, of the pieces in `ranges`, in the order in which the shard stores them.

    The ranges (first index, length) = (0, 2), (8, 2) give 0, 1, 8, 9.
    """
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in ranges])


def build_sketch(
    config: SketchConfig,
    *,
    name: str,
    d_out: int,
    d_in: int,
    rows: Ranges,
    cols: Ranges,
    device: torch.device | str = "cpu",
) -> Operator:
    """Build the configured operator for one matrix.

    `name` and the global indices in `rows` and `cols` decide the hashes, so that every rank's sketch fits the others'.
    """
    if config.operator == "materialise":
        return Materialise(config, name, rows, cols, device)
    if config.operator == "two_stage":
        return TwoStage(config, name, d_out, d_in, rows, cols, device)
    return TwoSided(config.seed, config.dim, name, d_out, d_in, rows, cols, device)


class Materialise:
    """Form the gradient in row chunks and hash every element, as the paper does.

    The hash of (i, j) is mixed from a key of row i and the index j, so that no hash is stored per element.
    """

    rows: Projection = None
    cols: Projection = None

    def __init__(
        self, config: SketchConfig, name: str, rows: Ranges, cols: Ranges, device: torch.device | str = "cpu"
    ) -> None:
        self.dim = config.dim
        self._row_keys = hashing.mix(hashing.layer_key(config.seed, name, "row"), indices(rows, device))
        self._col_index = indices(cols, device)

    def features(self, kept: Tensor, projected: Tensor, multiplier: Tensor | None = None) -> Tensor:
        a_BTI, b_BOT = kept.float(), projected.float().transpose(1, 2)
        size = a_BTI.shape[0]
        out = torch.zeros(size, self.dim, dtype=torch.float32, device=kept.device)
        chunk = max(1, CHUNK_BYTES // (4 * size * len(self._col_index)))
        for start in range(0, len(self._row_keys), chunk):
            rows = slice(start, start + chunk)
            hashes = hashing.mix(self._row_keys[rows, None], self._col_index[None, :]).flatten()
            gradient = torch.bmm(b_BOT[:, rows], a_BTI)
            if multiplier is not None:
                gradient = gradient * multiplier[rows]
            values = gradient.flatten(1) * hashing.signs(hashes)
            out.index_add_(1, hashing.buckets(hashes, self.dim), values)
        return out


class TwoSided:
    """Sketch rows and columns separately, in balanced buckets. A side with room for all of its indices stays exact."""

    def __init__(
        self,
        seed: int,
        dim: int,
        name: str,
        d_out: int,
        d_in: int,
        rows: Ranges,
        cols: Ranges,
        device: torch.device | str = "cpu",
    ) -> None:
        m_out, m_in = two_sided_shape(dim, d_out, d_in)
        self.dim = m_out * m_in
        self.shape = m_out, m_in
        self.rows: Projection = side_sketch(seed, name, "row", d_out, m_out, rows, device)  # [O, m_out]
        self.cols: Projection = side_sketch(seed, name, "col", d_in, m_in, cols, device)  # [I, m_in]

    def features(self, kept: Tensor, projected: Tensor, multiplier: Tensor | None = None) -> Tensor:
        _no_multiplier(multiplier, "two_sided")
        return torch.bmm(projected.float().transpose(1, 2), kept.float()).flatten(1)


class TwoStage:
    """Make a wide two-sided sketch, then add its cell (i', j') to bucket h(i') + h(j') mod m.

    The second stage needs no signs: those of the first are independent already.
    """

    def __init__(
        self,
        config: SketchConfig,
        name: str,
        d_out: int,
        d_in: int,
        rows: Ranges,
        cols: Ranges,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dim = config.dim
        self._wide = TwoSided(config.seed, config.intermediate_dim, name, d_out, d_in, rows, cols, device)
        self.rows, self.cols = self._wide.rows, self._wide.cols
        self._row_bucket, self._col_bucket = (
            _buckets(config, name, side, torch.arange(size, device=device))
            for side, size in zip(("row-second", "col-second"), self._wide.shape, strict=True)
        )

    def features(self, kept: Tensor, projected: Tensor, multiplier: Tensor | None = None) -> Tensor:
        wide = self._wide.features(kept, projected, multiplier)
        bucket = (self._row_bucket[:, None] + self._col_bucket[None, :]).flatten() % self.dim
        out = torch.zeros(len(wide), self.dim, dtype=torch.float32, device=wide.device)
        return out.index_add_(1, bucket, wide)


def two_sided_shape(dim: int, d_out: int, d_in: int) -> tuple[int, int]:
    """Return (m_out, m_in), the buckets of rows and columns, with m_out m_in <= dim.

    The longer side of the matrix gets the larger factor: dim 8192 gives (128, 64) for a matrix of 1024 x 512. A side
    never gets more buckets than it has indices, and the other side gets what is left: (16, 512) for 16 x 512.
    """
    small = 2 ** (int(math.log2(dim)) // 2) if dim & (dim - 1) == 0 else math.isqrt(dim)
    large = dim // small
    m_out, m_in = (large, small) if d_out >= d_in else (small, large)
    if m_out > d_out:
        return d_out, min(d_in, dim // d_out)
    if m_in > d_in:
        return min(d_out, dim // d_in), d_in
    return m_out, m_in


def side_sketch(
    seed: int, name: str, side: str, size: int, count: int, ranges: Ranges, device: torch.device | str = "cpu"
) -> Projection:
    """Return a sketch of one side, [local indices, min(count, size)], with one +-1 in each row.

    Buckets are balanced and follow from the global index. A CPU gets `Buckets`; other devices get a float32 matrix,
    because a gather is slower than a product there.
    """
    count = min(count, size)
    local = indices(ranges, device)
    sign = hashing.signs(hashing.mix(hashing.layer_key(seed, name, side + "-sign"), local))
    bucket = hashing.balanced_buckets(hashing.layer_key(seed, name, side), local, count)
    found = Buckets(bucket=bucket, weight=sign, count=count, runs=_runs(bucket))
    return found if torch.device(device).type == "cpu" else found.dense()


def _runs(bucket: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Split the indices into the longest runs over which the bucket rises by one from index to index.

    The buckets 1, 2, 3, 0, 2, 3 give the runs (first index, length, first bucket) = (0, 3, 1), (3, 1, 0), (4, 2, 2).
    """
    runs: list[tuple[int, int, int]] = []
    values = bucket.tolist()
    first = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[index - 1] + 1:
            runs.append((first, index - first, values[first]))
            first = index
    return tuple(runs)


def _buckets(config: SketchConfig, name: str, side: str, index: Tensor) -> Tensor:
    return hashing.buckets(hashing.mix(hashing.layer_key(config.seed, name, side), index), config.dim)


def _no_multiplier(multiplier: Tensor | None, operator: str) -> None:
    if multiplier is not None:
        raise TypeError(f"{operator} cannot apply an exact preconditioner; use operator materialise or form separable")
