"""The optimizer-induced preconditioner P of the coming step, as plain tensor code (method.md section 3).

    AdamW   P G = kappa D * G,  D_ij = 1 / (sqrt(v_ij / (1 - beta2^t)) + eps),
            kappa = lr (1 - beta1) / (1 - beta1^(t+1))                        (paper Eq. 8-13; t completed steps)
    SGD     P G = lr G. Also what AdamW is before its first step, when it has no state.

`Separable` replaces v by the rank-1 matrix rowsum(v) colsum(v)^T / sum(v) (Adafactor's), so that D_ij = r_i c_j and P
is applied to the factors of G: b by r and a by c. `Exact` keeps D whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opus.types import AdamHyper, Fragment


@dataclass(frozen=True, kw_only=True)
class Identity:
    """P G = kappa G."""

    kappa: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Separable:
    """P G = kappa diag(row) G diag(col), restricted to this rank's rows and columns."""

    kappa: float
    row: Tensor  # [O] float32
    col: Tensor  # [I] float32


@dataclass(frozen=True, kw_only=True)
class Exact:
    """P G = kappa multiplier * G on this rank's shard."""

    kappa: float
    multiplier: Tensor  # [O, I] float32


LayerPreconditioner = Identity | Separable | Exact


def adam_kappa(hyper: AdamHyper) -> float:
    """Weight of a new gradient in the coming AdamW update, bias correction included (Eq. 8)."""
    return hyper.lr * (1 - hyper.beta1) / (1 - hyper.beta1 ** (hyper.step + 1))


def exact_multiplier(v: Tensor, hyper: AdamHyper) -> Tensor:
    """D = 1 / (sqrt(v_hat) + eps), the shape and dtype of `v`. Needs hyper.step >= 1."""
    return 1.0 / ((v / (1 - hyper.beta2**hyper.step)).sqrt() + hyper.eps)


def separable_factors(row_sum: Tensor, col_sum: Tensor, hyper: AdamHyper) -> tuple[Tensor, Tensor]:
    """(r [d_out], c [d_in]) with r_i c_j about 1 / (sqrt(v_hat_ij) + eps), from the sums of v over rows and columns.

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
    flat = torch.full_like(total, hyper.eps**-0.5)
    return torch.where(total > 0, r, flat).float(), torch.where(total > 0, c, flat).float()


def fragment_sums(fragment: Fragment, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Row sums [rows] and column sums [cols], float64, of the part of a [rows, cols] matrix that a fragment holds.

    A fragment may begin and end inside a row: it is padded with zeros to whole rows.
    """
    first, stop = fragment.start // cols, -(-(fragment.start + fragment.values.numel()) // cols)
    if stop > rows:
        raise ValueError(
            f"fragment [{fragment.start}, {fragment.start + fragment.values.numel()}) does not fit a {rows} x {cols} "
            "matrix: the optimizer state belongs to another parameter"
        )
    padded = torch.zeros((stop - first) * cols, dtype=torch.float64, device=fragment.values.device)
    offset = fragment.start - first * cols
    padded[offset : offset + fragment.values.numel()] = fragment.values.double()
    whole = padded.view(stop - first, cols)
    row_sum = torch.zeros(rows, dtype=torch.float64, device=padded.device)
    row_sum[first:stop] = whole.sum(1)
    return row_sum, whole.sum(0)
