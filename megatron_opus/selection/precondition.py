"""The optimizer-induced preconditioner P of the coming step, as plain tensor code (method.md section 3).

Every P here is P G = kappa * (L G R), or kappa * D * G elementwise:

    AdamW   D_ij = 1 / (sqrt(v_ij / (1 - beta2^t)) + eps), kappa = lr (1 - beta1) / (1 - beta1^(t+1))
            (paper Eq. 8-13; t completed steps). `separable` replaces v by the rank-1 matrix
            rowsum(v) colsum(v)^T / sum(v) (Adafactor's), so that L and R are diagonal; `exact` keeps D.
    Muon    O(q) = S q, the Newton-Schulz polynomial of the momentum q, frozen: L = S on the smaller side of the
            matrix (R = S where the matrix is taller than wide), kappa = lr scale (1 - mu^2) with Nesterov momentum and
            lr scale (1 - mu) without (Eq. 2-6).
    SGD     L = R = I, kappa = lr. Also what AdamW and Muon are before their first step, when they have no state.

A side of P is a `Projection`: None (identity), [d] (a diagonal) or [d, d] (symmetric). A sketch of that side is one
too: [d, m], or its signed buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.types import AdamHyper, Fragment, MuonHyper

Side = Literal["rows", "cols"]
_CACHED = 2**16  # numbers


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Hold a count sketch of one side: every index belongs to one bucket and enters it with a weight.

    Example: a side of 6 columns in 4 buckets. The first block of 4 columns is rotated by 1, so that columns 0 to 3
    belong to buckets 1, 2, 3, 0; the second block begins at bucket 2, so that columns 4 and 5 belong to buckets 2, 3.
    The result is

        [w3 x3,  w0 x0,  w1 x1 + w4 x4,  w2 x2 + w5 x5]

    Neighbouring columns belong to neighbouring buckets within a run. The example has the runs (first index, length,
    first bucket) = (0, 3, 1), (3, 1, 0), (4, 2, 2). A CPU adds up these slices and reads x once. Other devices multiply
    with the matrix that `dense` gives.
    """

    bucket: Tensor  # [d] int64: the bucket of each index
    weight: Tensor  # [d] float32: a sign, times a diagonal preconditioner
    count: int  # the number of buckets
    runs: tuple[tuple[int, int, int], ...]  # (first index, length, first bucket)

    def dense(self) -> Tensor:
        """Return the sketch as a matrix [d, count] float32 with one weight in each row."""
        matrix = torch.zeros(len(self.bucket), self.count, dtype=torch.float32, device=self.weight.device)
        return matrix.scatter_(1, self.bucket[:, None], self.weight[:, None])

    def apply(self, x: Tensor) -> Tensor:
        """Sketch the last dimension of x: [..., d] float32 becomes [..., count]."""
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(flat), self.count, dtype=x.dtype, device=x.device)
        writing = self._runs_that_cover()
        if writing == 0:
            out.zero_()
        for i, (start, length, bucket) in enumerate(self.runs):
            slice_, weight = flat[:, start : start + length], self.weight[start : start + length]
            target = out[:, bucket : bucket + length]
            if i < writing:  # nothing is there yet: write instead of adding
                torch.mul(slice_, weight, out=target)
            else:
                target.addcmul_(slice_, weight)
        return out.view(*x.shape[:-1], self.count)

    def _runs_that_cover(self) -> int:
        """Return the smallest number of leading runs that together fill every bucket exactly once.

        Such runs may be written into an output that was never set to zero. A whole block is one run when it is not
        rotated (the answer is 1) and two when it is (the answer is 2, as in the example of the class). The answer is 0
        where the first block is not whole on this rank.
        """
        for number in (1, 2):
            filled = 0  # buckets 0 ... filled-1 are filled
            for _, length, bucket in sorted(self.runs[:number], key=lambda run: run[2]):
                if bucket != filled:
                    break
                filled += length
            else:
                if filled == self.count:
                    return number
        return 0


Projection = Tensor | Buckets | None


def project(x: Tensor, projection: Projection) -> Tensor:
    """Multiply the last dimension of x [..., d] with a projection. The result has the dtype of x."""
    if projection is None:
        return x
    if isinstance(projection, Buckets):
        # low precision would add up in low precision: a matrix product accumulates in float32
        if x.dtype == torch.float32 and x.device.type == "cpu":
            return projection.apply(x)
        projection = projection.dense()
    projection = projection.to(x.dtype)
    return x * projection if projection.dim() == 1 else x @ projection


def compose(side: Tensor | None, sketch: Projection) -> Projection:
    """Return the projection that first applies one (symmetric) side of P and then `sketch`."""
    if side is None or sketch is None:
        return sketch if side is None else side
    if isinstance(sketch, Buckets):
        if side.dim() == 1:
            return replace(sketch, weight=sketch.weight * side)
        sketch = sketch.dense()
    return side[:, None] * sketch if side.dim() == 1 else side @ sketch


def adam_kappa(hyper: AdamHyper) -> float:
    """Return the weight of a new gradient in the coming AdamW update, bias correction included (Eq. 8)."""
    return hyper.lr * (1 - hyper.beta1) / (1 - hyper.beta1 ** (hyper.step + 1))


def muon_kappa(hyper: MuonHyper) -> float:
    """Return the weight of a new gradient in the coming Muon update, before its orthogonalisation (Eq. 2-6)."""
    mu = hyper.momentum
    return hyper.lr * hyper.scale * (1 - mu**2 if hyper.nesterov else 1 - mu)


def exact_multiplier(v: Tensor, hyper: AdamHyper) -> Tensor:
    """Return D = 1 / (sqrt(v_hat) + eps) in the shape and dtype of `v`. It needs hyper.step >= 1."""
    return 1.0 / ((v / (1 - hyper.beta2**hyper.step)).sqrt() + hyper.eps)


def muon_side(rows: int, cols: int) -> Side:
    """Return the side on which the multiplier of a [rows, cols] momentum stands: the smaller one, rows when equal."""
    return "cols" if rows > cols else "rows"


def muon_multiplier(q: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return the symmetric S [s, s] with O(q) = S q (q wide or square) or O(q) = q S (q taller than wide).

    s is the smaller dimension of q: a momentum [3072, 768] has S [768, 768]. S has the dtype of q.

    Each Newton-Schulz step is X <- (a I + b A + c A^2) X with A = X X^T, so that only the Gram side is iterated:
    Z = a I + b A + c A^2, S <- Z S, A <- Z A Z, started from A = q q^T / ||q||_F^2 and S = I / ||q||_F. A momentum of
    all zeros gives S = 0.
    """
    wide = q.mT if q.shape[-2] > q.shape[-1] else q
    norm = torch.linalg.matrix_norm(q)
    inverse = torch.where(norm > 0, 1.0 / norm, 0.0)
    wide = wide * inverse
    gram = wide @ wide.mT
    s: Tensor | None = None
    for i, (a, b, c) in enumerate(coefficients):
        z = b * gram + c * (gram @ gram)
        z.diagonal().add_(a)
        s = z if s is None else z @ s
        if i + 1 < len(coefficients):
            gram = z @ gram @ z
    assert s is not None
    return (s + s.mT) * (inverse / 2)


def split_multiplier(
    q: Tensor, coefficients: Sequence[tuple[float, float, float]], split: Sequence[tuple[int, float]]
) -> Tensor:
    """Return S [rows, rows] of a momentum whose parts are orthogonalised apart, each times its scale (`MuonHyper`).

    Rows of different parts do not meet in S. Raises UnsupportedOptimizer for a part that is taller than wide: its
    multiplier stands on the columns, where the other parts have none.
    """
    size = sum(rows for rows, _ in split)
    groups, first = len(q) // size, 0
    found = torch.zeros(len(q), len(q), dtype=q.dtype, device=q.device)
    for rows, scale in split:
        if groups * rows > q.shape[1]:
            raise UnsupportedOptimizer(
                f"Muon: expected parts of a query-key-value matrix with at most as many rows as columns, got "
                f"{groups * rows} x {q.shape[1]}; set optimizer.muon_split_qkv=false, or "
                "selection.preconditioner.kind=sgd"
            )
        start = torch.arange(groups, device=q.device)[:, None] * size + first
        index = (start + torch.arange(rows, device=q.device)).flatten()
        found[index[:, None], index] = scale * muon_multiplier(q[index], coefficients)
        first += rows
    return found


def separable_factors(row_sum: Tensor, col_sum: Tensor, hyper: AdamHyper) -> tuple[Tensor, Tensor]:
    """Return (r [d_out], c [d_in]) with r_i c_j about 1 / (sqrt(v_hat_ij) + eps), from the row and column sums of v.

    With x_i y_j = sqrt(rank-1 v_hat), X and Y their means and (1 + s)^2 = 1 + eps / (X Y):
    (x_i + s X) (y_j + s Y) is X Y + eps at the mean whatever the size of eps, and stays positive where a whole row or
    column of v is zero.
    """
    row_sum, col_sum = row_sum.double(), col_sum.double()
    total = row_sum.sum()
    root = (total * (1 - hyper.beta2**hyper.step)).sqrt()
    x = (row_sum / root).sqrt()
    y = (col_sum / root).sqrt()
    z = hyper.eps / (x.mean() * y.mean())
    s = z / ((1 + z).sqrt() + 1)  # sqrt(1 + z) - 1 without cancellation
    r = 1.0 / (x + s * x.mean())
    c = 1.0 / (y + s * y.mean())
    # a layer without any second moment yet has D = 1 / eps everywhere; `where` keeps the device from waiting
    flat = torch.full_like(total, hyper.eps).rsqrt()
    return torch.where(total > 0, r, flat).float(), torch.where(total > 0, c, flat).float()


def fragment_sums(fragment: Fragment, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Sum the part of a [rows, cols] matrix that a fragment holds: row sums [rows] and column sums [cols], float64.

    A fragment may begin and end inside a row: numbers 5 to 13 of a 4 x 4 matrix are the last three of row 1, all of
    row 2 and the first two of row 3. Raises ValueError where the fragment ends behind the matrix.
    """
    values, start = fragment.values, fragment.start
    stop = start + values.numel()
    if stop > rows * cols:
        raise ValueError(
            f"fragment [{start}, {stop}) does not fit a {rows} x {cols} matrix: the optimizer state belongs to another "
            "parameter"
        )
    row_sum = torch.zeros(rows, dtype=torch.float64, device=values.device)
    col_sum = torch.zeros(cols, dtype=torch.float64, device=values.device)

    def add(piece: Tensor, row: int, col: int) -> None:
        """Add the sums of a piece [r, c] whose first number stands at (row, col)."""
        piece = piece.double()
        row_sum[row : row + len(piece)] += piece.sum(1)
        col_sum[col : col + piece.shape[1]] += piece.sum(0)

    first, last = -(-start // cols), stop // cols  # whole rows
    if start % cols:
        add(values[None, : first * cols - start], start // cols, start % cols)
    if last > first:
        whole = values[first * cols - start : last * cols - start].view(-1, cols)
        # float64 copies that stay in a core's cache: those of a whole matrix cost ten times as much
        step = max(1, _CACHED // cols) if values.device.type == "cpu" else len(whole)
        for i in range(0, len(whole), step):
            add(whole[i : i + step], first + i, 0)
    if stop % cols and last >= first:
        add(values[None, last * cols - start :], last, 0)
    return row_sum, col_sum
