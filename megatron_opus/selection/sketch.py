"""Linear sketches of per-sequence weight gradients, taken from their factors without forming the gradient.

G(z) = sum_t b_t a_t^T is the [d_out, d_in] weight gradient of one sequence. Both operators below are linear in G and
hash *global* rows and columns, so the sketches of weight shards add up to the sketch of the whole matrix:

    materialise   every (row, col) has its own bucket of m and sign. The paper's operator. G is formed in row chunks,
                  which costs T d_out d_in and a scatter of d_out d_in per sequence.
                  Var <u, v> about (|u|^2 |v|^2 + <u, v>^2) / m.
    two_sided     bucket (h_row(i), h_col(j)) of m = m1 m2: B1^T A2 with B1 = b S1^T [T, m1], A2 = a S2^T [T, m2].
                  Costs T (d_out m1 + d_in m2 + m1 m2). Larger variance on matrices of low rank.

Shapes: B sequences, T tokens, O / I the rows / columns held by this rank, m the sketch dimension.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from megatron_opus.config import SketchConfig
from megatron_opus.selection import hashing
from megatron_opus.selection.precondition import Exact, Identity, LayerPreconditioner, Separable
from megatron_opus.types import Ranges

CHUNK_BYTES = 64 * 2**20  # of one materialised row chunk over all sequences of a scoring micro-batch


class LayerSketch(Protocol):
    """The sketch of one layer on one rank. `precondition=Identity()` sketches the raw gradient (the proxy's)."""

    dim: int

    def keep(self, a_BTI: Tensor, precondition: LayerPreconditioner) -> Tensor:
        """What must survive from the forward to the backward pass: [B, T, I or m2]."""
        ...

    def project(self, b_BTO: Tensor, precondition: LayerPreconditioner) -> Tensor:
        """What the backward pass needs of b: [B, T, O or m1]."""
        ...

    def features(self, kept: Tensor, projected: Tensor, precondition: LayerPreconditioner) -> Tensor:
        """[B, m] float32: this rank's part of the sketch of P G for each sequence."""
        ...


def indices(ranges: Ranges, device: torch.device | str = "cpu") -> Tensor:
    """Global indices of the pieces in `ranges`, in the order in which the shard stores them. int64."""
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
) -> LayerSketch:
    """The configured operator for one layer. State is O(d_out + d_in)."""
    if config.operator == "materialise":
        return CountSketch(config, name, rows, cols, device)
    return TwoSided(config, name, d_out, d_in, rows, cols, device)


class CountSketch:
    """The paper's CountSketch of the materialised gradient; the hash of (i, j) is mixed from one key per row."""

    def __init__(
        self, config: SketchConfig, name: str, rows: Ranges, cols: Ranges, device: torch.device | str = "cpu"
    ) -> None:
        self.dim = config.dim
        self.row_keys = hashing.mix(hashing.layer_key(config.seed, name, "row"), indices(rows, device))
        self.col_index = indices(cols, device)

    def keep(self, a_BTI: Tensor, precondition: LayerPreconditioner) -> Tensor:
        return a_BTI * precondition.col if isinstance(precondition, Separable) else a_BTI

    def project(self, b_BTO: Tensor, precondition: LayerPreconditioner) -> Tensor:
        return b_BTO * precondition.row if isinstance(precondition, Separable) else b_BTO

    def features(self, kept: Tensor, projected: Tensor, precondition: LayerPreconditioner) -> Tensor:
        a_BTI, b_BOT = kept.float(), projected.float().transpose(1, 2)
        size = a_BTI.shape[0]
        out = torch.zeros(size, self.dim, dtype=torch.float32, device=kept.device)
        chunk = max(1, CHUNK_BYTES // (4 * size * len(self.col_index)))
        for start in range(0, len(self.row_keys), chunk):
            rows = slice(start, start + chunk)
            hashes = hashing.mix(self.row_keys[rows, None], self.col_index[None, :]).flatten()
            gradient = torch.bmm(b_BOT[:, rows], a_BTI)
            if isinstance(precondition, Exact):
                gradient = gradient * precondition.multiplier[rows]
            values = gradient.flatten(1) * hashing.signs(hashes)
            out.index_add_(1, hashing.buckets(hashes, self.dim), values)
        return out * precondition.kappa


class TwoSided:
    """Row and column CountSketches as dense +-1 products; balanced buckets, exact where a side has room for all."""

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
        m_out, m_in = two_sided_shape(config.dim, d_out, d_in)
        self.dim = m_out * m_in
        self.s_out = _side_matrix(config.seed, name, "row", d_out, m_out, rows, device)  # [O, m_out]
        self.s_in = _side_matrix(config.seed, name, "col", d_in, m_in, cols, device)  # [I, m_in]

    def keep(self, a_BTI: Tensor, precondition: LayerPreconditioner) -> Tensor:
        return a_BTI @ _scaled(self.s_in, precondition, "col").to(a_BTI.dtype)

    def project(self, b_BTO: Tensor, precondition: LayerPreconditioner) -> Tensor:
        return b_BTO @ _scaled(self.s_out, precondition, "row").to(b_BTO.dtype)

    def features(self, kept: Tensor, projected: Tensor, precondition: LayerPreconditioner) -> Tensor:
        core = torch.bmm(projected.float().transpose(1, 2), kept.float())  # [B, m_out, m_in]
        return core.flatten(1) * precondition.kappa


def two_sided_shape(dim: int, d_out: int, d_in: int) -> tuple[int, int]:
    """(m_out, m_in) with m_out m_in <= dim; the longer side of the matrix gets the larger factor.

    A side never gets more buckets than it has indices; what it leaves over goes to the other side.
    """
    small = 2 ** (int(math.log2(dim)) // 2) if dim & (dim - 1) == 0 else math.isqrt(dim)
    large = dim // small
    m_out, m_in = (large, small) if d_out >= d_in else (small, large)
    if m_out > d_out:
        return d_out, min(d_in, dim // d_out)
    if m_in > d_in:
        return min(d_out, dim // d_in), d_in
    return m_out, m_in


def _side_matrix(
    seed: int, name: str, side: str, size: int, count: int, ranges: Ranges, device: torch.device | str
) -> Tensor:
    """[local indices, count] float32 with one +-1 per row."""
    key = hashing.layer_key(seed, name, side)
    local = indices(ranges, device)
    bucket = hashing.balanced_buckets(key, size, count, device)[local]
    sign = hashing.signs(hashing.mix(hashing.layer_key(seed, name, side + "-sign"), local))
    matrix = torch.zeros(len(local), count, dtype=torch.float32, device=device)
    matrix[torch.arange(len(local), device=device), bucket] = sign
    return matrix


def _scaled(matrix: Tensor, precondition: LayerPreconditioner, side: str) -> Tensor:
    """Folds a separable preconditioner into the projection, so that activations are never rescaled."""
    if isinstance(precondition, Separable):
        return matrix * (precondition.row if side == "row" else precondition.col)[:, None]
    if isinstance(precondition, Identity):
        return matrix
    raise TypeError("two_sided cannot apply an exact preconditioner; use operator materialise or form separable")
