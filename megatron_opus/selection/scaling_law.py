"""Fit L(n) = epsilon + beta n^-alpha to a loss curve (arXiv 2410.11820, section on online scaling laws).

    min over (log beta, log epsilon, alpha) of  mean_i Huber_delta( log L_i - logaddexp(log beta - alpha log n_i,
    log epsilon) ),   delta = 1e-3

The bounds 0 < alpha < 0.8, log beta < 6.5 and log epsilon > a given number hold by a change of variables. The objective
has many local minima: it is evaluated on a grid of starts and descended by L-BFGS from the best of them, at a wide
delta first, because at 1e-3 it is almost an absolute value and flat far from the optimum. float64, no randomness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

MAX_ALPHA, MAX_LOG_BETA = 0.8, 6.5
DELTA = 1e-3
MIN_POINTS, MAX_POINTS = 8, 1000
STARTS = 3  # descended, of the grid
MAX_RESIDUAL = 0.2  # mean |log residual| of a curve that is not a power law
_MARGIN = 1e-3  # a start on a bound has no gradient in the unbounded variables
_DELTAS = (0.1, DELTA)


class FitError(ValueError):
    """A curve without a scaling law: says why."""


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    alpha: float
    beta: float
    epsilon: float
    residual: float = 0.0  # mean |log residual| of the fit

    def loss(self, n: float) -> float:
        return self.epsilon + self.beta * n**-self.alpha

    def slope(self, n: float) -> float:
        """-dL/dn = alpha (L(n) - epsilon) / n: loss gained per sequence."""
        return self.alpha * (self.loss(n) - self.epsilon) / n


def fit(n: np.ndarray, loss: np.ndarray, *, min_log_epsilon: float = 0.5) -> ScalingLaw:
    """n, loss [points]: sequences seen and mean loss there, in nats. Raises FitError."""
    n, loss = np.asarray(n, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if len(n) < MIN_POINTS:
        raise FitError(f"{len(n)} points of the loss curve, need {MIN_POINTS}")
    if not (np.isfinite(loss).all() and (loss > 0).all() and (n > 0).all()):
        raise FitError("a loss that is not a positive number")
    stride = -(-len(n) // MAX_POINTS)
    log_n, log_loss = torch.from_numpy(np.log(n[::stride])), torch.from_numpy(np.log(loss[::stride]))
    candidates = []
    for start in _starts(log_n, log_loss, min_log_epsilon):
        free = start
        for delta in _DELTAS:
            free = _descend(free, log_n, log_loss, min_log_epsilon, delta)
        value = _objective(free, log_n, log_loss, min_log_epsilon, DELTA).item()
        if math.isfinite(value):
            candidates.append((value, free))
    if not candidates:
        raise FitError("no start of the descent ended at a finite value")
    _, best = min(candidates, key=lambda pair: pair[0])
    log_beta, log_epsilon, alpha = (x.item() for x in _bounded(best, min_log_epsilon))
    residual = (_predict(best, log_n, min_log_epsilon) - log_loss).abs().mean().item()
    if residual > MAX_RESIDUAL:
        raise FitError(f"not a power law: the best one is off by {residual:.0%} on average")
    return ScalingLaw(alpha=alpha, beta=math.exp(log_beta), epsilon=math.exp(log_epsilon), residual=residual)


def _starts(log_n: Tensor, log_loss: Tensor, min_log_epsilon: float) -> list[Tensor]:
    """The best STARTS points of the grid, [3] each, in unbounded variables."""
    alpha = torch.arange(8, dtype=torch.float64) / 10
    log_beta = torch.arange(-2, 6, dtype=torch.float64)
    log_epsilon = torch.arange(-4, 4, dtype=torch.float64) / 2
    grid = torch.cartesian_prod(
        log_beta,
        log_epsilon.clamp(min=min_log_epsilon + _MARGIN).unique(),
        alpha.clamp(min=_MARGIN),
    )
    predicted = torch.logaddexp(grid[:, :1] - grid[:, 2:] * log_n, grid[:, 1:2])
    error = (predicted - log_loss).abs().mean(1)
    best = grid[torch.argsort(error, stable=True)[:STARTS]]
    return [_unbounded(row, min_log_epsilon) for row in best]


def _descend(free: Tensor, log_n: Tensor, log_loss: Tensor, min_log_epsilon: float, delta: float) -> Tensor:
    variable = free.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [variable], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = _objective(variable, log_n, log_loss, min_log_epsilon, delta)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    ended = variable.detach()
    before, after = (_objective(x, log_n, log_loss, min_log_epsilon, delta) for x in (free, ended))
    return ended if torch.isfinite(ended).all() and after <= before else free


def _objective(free: Tensor, log_n: Tensor, log_loss: Tensor, min_log_epsilon: float, delta: float) -> Tensor:
    """Mean Huber loss divided by delta: of the size of a mean absolute residual."""
    error = (_predict(free, log_n, min_log_epsilon) - log_loss).abs()
    return torch.where(error <= delta, error * error / (2 * delta), error - delta / 2).mean()


def _predict(free: Tensor, log_n: Tensor, min_log_epsilon: float) -> Tensor:
    log_beta, log_epsilon, alpha = _bounded(free, min_log_epsilon)
    return torch.logaddexp(log_beta - alpha * log_n, log_epsilon.expand_as(log_n))


def _bounded(free: Tensor, min_log_epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log beta, log epsilon, alpha) from three unbounded numbers."""
    return MAX_LOG_BETA - softplus(free[0]), min_log_epsilon + softplus(free[1]), MAX_ALPHA * torch.sigmoid(free[2])


def _unbounded(row: Tensor, min_log_epsilon: float) -> Tensor:
    room = torch.stack([MAX_LOG_BETA - row[0], row[1] - min_log_epsilon])
    inverse_softplus = room + torch.log(-torch.expm1(-room))
    return torch.cat([inverse_softplus, torch.logit(row[2:] / MAX_ALPHA)])
