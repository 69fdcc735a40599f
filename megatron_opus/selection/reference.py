"""The oracle: utilities from materialised per-sequence gradients, in one process, in float64, without any sketch.

Plain loops, to be read beside method.md line by line. Everything fast in this package is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_opus.selection.precondition import adam_kappa, exact_multiplier
from megatron_opus.types import AdamHyper, Batch, MuonHyper

Gradients = dict[str, Tensor]


def per_sequence_gradients(
    token_losses: Callable[[Batch], Tensor], batch: Batch, weights: Mapping[str, Tensor]
) -> list[Gradients]:
    """G_r(z) for every sequence z of `batch`: the gradient of that sequence's **mean** token loss.

    token_losses(batch) -> [B, T] unreduced losses; the mean runs over tokens with loss_mask = 1 (method.md section 1).
    """
    result = []
    for z in range(len(batch)):
        one = batch.rows(z, z + 1)
        losses = token_losses(one)
        mean = (losses * one.loss_mask).sum() / one.loss_mask.sum()
        gradients = torch.autograd.grad(mean, list(weights.values()))
        result.append({name: g.detach().double() for name, g in zip(weights, gradients, strict=True)})
    return result


def adamw_preconditioner(v: Mapping[str, Tensor], hyper: Mapping[str, AdamHyper]) -> Callable[[Gradients], Gradients]:
    """P of Eq. 8-13 with the whole second moment `v` [d_out, d_in]; P = lr before the first step."""

    def apply(gradients: Gradients) -> Gradients:
        out = {}
        for name, g in gradients.items():
            h = hyper[name]
            if h.step == 0:
                out[name] = h.lr * g
            else:
                out[name] = adam_kappa(h) * exact_multiplier(v[name].double(), h) * g
        return out

    return apply


def muon_preconditioner(q: Mapping[str, Tensor], hyper: Mapping[str, MuonHyper]) -> Callable[[Gradients], Gradients]:
    """The Newton-Schulz polynomial of each momentum `q` [d_out, d_in], frozen, applied to new gradients (Eq. 2-6)."""

    def apply(gradients: Gradients) -> Gradients:
        out = {}
        for name, g in gradients.items():
            h = hyper[name]
            weight = h.lr * h.scale * (1 - h.momentum**2 if h.nesterov else 1 - h.momentum)
            out[name] = torch.zeros_like(g)
            first, size = 0, sum(rows for rows, _ in h.split)
            for rows, scale in h.split or ((len(g), 1.0),):
                # rows first .. first + rows - 1 of every group of `size` rows, or all of them
                index = torch.tensor([i for i in range(len(g)) if not size or first <= i % size < first + rows])
                out[name][index] = weight * scale * _orthogonalised(q[name].double()[index], g[index], h.coefficients)
                first += rows
        return out

    return apply


def _orthogonalised(q: Tensor, g: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    tall = q.shape[0] > q.shape[1]  # the optimizer works on the smaller side
    x = q.T if tall else q
    x = x / torch.linalg.matrix_norm(x)
    s = torch.eye(len(x), dtype=torch.float64) / torch.linalg.matrix_norm(q)
    for a, b, c in coefficients:
        gram = x @ x.T
        z = a * torch.eye(len(x), dtype=torch.float64) + b * gram + c * gram @ gram
        x, s = z @ x, z @ s
    return g @ s if tall else s @ g


def sgd_preconditioner(lr: float) -> Callable[[Gradients], Gradients]:
    return lambda gradients: {name: lr * g for name, g in gradients.items()}


def scores(
    candidates: list[Gradients], proxy: list[Gradients], precondition: Callable[[Gradients], Gradients]
) -> tuple[Tensor, Tensor]:
    """(alignment [N], interaction [N, N]) float64 (Eq. 23 without the draws)."""
    target = {name: sum(g[name] for g in proxy) / len(proxy) for name in proxy[0]}
    updates = [precondition(g) for g in candidates]
    n = len(candidates)
    align = torch.zeros(n, dtype=torch.float64)
    inter = torch.zeros(n, n, dtype=torch.float64)
    for z in range(n):
        for name, g_v in target.items():
            align[z] += (updates[z][name] * g_v).sum()
        for j in range(n):
            for name in target:
                inter[z, j] += (updates[z][name] * updates[j][name]).sum()
    return align, inter


def greedy(align: Tensor, inter: Tensor, k: int, scale: float = 1.0) -> list[int]:
    """Indices drawn by argmax of alignment minus scaled redundancy with those already drawn."""
    drawn: list[int] = []
    for _ in range(k):
        best, best_utility = -1, -float("inf")
        for z in range(len(align)):
            if z in drawn:
                continue
            value = float(align[z]) - scale * sum(float(inter[z, j]) for j in drawn)
            if value > best_utility:
                best, best_utility = z, value
        drawn.append(best)
    return drawn
