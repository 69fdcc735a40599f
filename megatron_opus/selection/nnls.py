"""Non-negative least squares on normal equations, by coordinate descent.

    min over w >= 0 of  w^T K w / 2 - c^T w,   K symmetric positive semidefinite: c_i = <x_i, target>, K_ij = <x_i, x_j>

The optimum is where (Karush-Kuhn-Tucker) w >= 0, K w - c >= 0, and w_i (K w - c)_i = 0 for every i. For a positive
semidefinite K every limit point of coordinate descent is one; w itself is unique where K is definite.
"""

from __future__ import annotations

import numpy as np


def nnls(gram: np.ndarray, target: np.ndarray, *, max_sweeps: int, tolerance: float) -> tuple[np.ndarray, int]:
    """(w [k] float64 >= 0, sweeps taken). gram [k, k], target [k], any float dtype.

    w_i <- max(0, w_i + (c_i - (K w)_i) / K_ii), i = 0..k-1 in turn, until no weight of a sweep changes by more than
    `tolerance` times the largest one. A row with K_ii = 0 gets weight 0.
    """
    gram, residual = np.asarray(gram, dtype=np.float64), np.array(target, dtype=np.float64)
    diagonal = gram.diagonal()
    weights = np.zeros(len(residual))
    active = [int(i) for i in np.flatnonzero(diagonal > 0)]
    for sweep in range(1, max_sweeps + 1):
        largest = 0.0
        for i in active:
            new = max(0.0, weights[i] + residual[i] / diagonal[i])
            change = new - weights[i]
            if change:
                residual -= change * gram[:, i]
                weights[i] = new
                largest = max(largest, abs(change))
        if largest <= tolerance * weights.max(initial=0.0):
            return weights, sweep
    return weights, max_sweeps


def kkt_violation(gram: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    """How far from optimal, relative to max |c|: 0 at an optimum."""
    slack = np.asarray(gram) @ weights - target
    worst = np.where(weights > 0, np.abs(slack), np.maximum(0.0, -slack)).max(initial=0.0)
    scale = np.abs(target).max(initial=0.0)
    return float(worst / scale) if scale > 0 else float(worst)
