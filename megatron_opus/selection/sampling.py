"""Drawing K of N candidates one by one, with a redundancy term that grows with every draw (Alg. 1).

Boltzmann draws use the Gumbel-max identity: argmax(U / tau + Gumbel noise) is a draw from softmax(U / tau). Without
redundancy the utilities do not change between draws, and the K largest of U / tau + noise, in falling order, are K
draws without replacement: one noise vector and one sort (Gumbel top-k; Kool et al. 2019, arXiv 1903.06059). With
redundancy every draw needs noise of its own, since the old noise is no longer Gumbel given what it already decided: K
draws of O(N) vector work each, in which the host never waits for a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opus.selection.limits import DomainLimits, in_order

MAD_TO_STD = 1.4826  # a normal distribution's standard deviation / its median absolute deviation


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Hold what one draw decided and what it decided by."""

    indices: Tensor  # [K] int64 in draw order
    utility: Tensor  # [N] float64 before the first draw
    redundancy: Tensor  # [N] float64: scaled term at the draw for drawn ones, after the last draw for the others
    temperature: float  # absolute
    entropy_ratio: float  # entropy of the first draw / log(number of eligible candidates); nan for greedy


def draw(
    align: Tensor,
    inter: Tensor | None,
    k: int,
    *,
    generator: torch.Generator,
    temperature: float,
    temperature_unit: str = "std",
    greedy: bool = False,
    redundancy_scale: float = 0.0,
    eligible: Tensor | None = None,
    limits: DomainLimits | None = None,
) -> Draw:
    """Draw `k` distinct candidates out of N.

    align [N] float64 is the alignment of each candidate, inter [N, N] float64 their interaction (None: no redundancy),
    and eligible [N] bool says which may be drawn. `temperature` is in units of the spread of the eligible utilities, as
    `spread` measures it (`std`, `mad`), or in the utility's own unit (`absolute`): utilities with a standard deviation
    of 2e-4 and a temperature of 0.9 `std` are divided by 1.8e-4. Every mode takes one number from `generator`, so that
    ablations share their other draws. Raises ValueError when fewer than k candidates are eligible.
    """
    n, device = len(align), align.device
    eligible = torch.ones(n, dtype=torch.bool, device=device) if eligible is None else eligible
    count = int(eligible.sum())
    if count < k:
        raise ValueError(f"draw: expected at least {k} eligible candidates, got {count} of {n}")
    utility = torch.where(eligible, align, 0.0)
    tau = temperature if temperature_unit == "absolute" else temperature * spread(utility[eligible], temperature_unit)
    per_unit = 1.0 if greedy or tau == 0 else 1.0 / tau
    logits = (utility * per_unit).masked_fill(~eligible, -math.inf)
    seed = int(torch.randint(2**62, (), generator=generator))
    rows = 1 if inter is None or redundancy_scale == 0 else k
    noise = torch.zeros(rows, n, dtype=torch.float64) if greedy else _gumbel(rows, n, seed)
    noise = noise.to(device)
    if inter is None or redundancy_scale == 0:
        order = in_order(torch.argsort(logits + noise[0], descending=True, stable=True), k, limits)
        redundancy = torch.zeros(n, dtype=torch.float64, device=device)
    else:
        if count < n:
            inter = inter.masked_fill(~eligible[:, None], 0.0)  # -inf + NaN would be NaN, and NaN the largest
        order, redundancy = _one_by_one(logits, noise, inter, redundancy_scale, per_unit, limits)
    return Draw(
        indices=order,
        utility=torch.where(eligible, align, math.nan),
        redundancy=redundancy,
        temperature=tau,
        entropy_ratio=math.nan if greedy else _entropy_ratio(logits[eligible]),
    )


def spread(utility: Tensor, unit: str) -> float:
    """Measure the spread of [n] utilities: their standard deviation (`std`), or 1.4826 x the median absolute deviation.

    The two agree on a normal distribution. One outlier in a buffer inflates the first and flattens the draw among all
    others; it hardly moves the second. Where more than half of the utilities are equal the median deviation is 0 and
    says nothing: then the standard deviation is taken.
    """
    if len(utility) < 2:
        return 0.0
    if unit == "mad":
        middle = utility.quantile(0.5)
        deviation = MAD_TO_STD * (utility - middle).abs().quantile(0.5).item()
        if deviation > 0:
            return deviation
    return utility.std().item()


def _one_by_one(
    logits: Tensor, noise: Tensor, inter: Tensor, scale: float, per_unit: float, limits: DomainLimits | None
) -> tuple[Tensor, Tensor]:
    """Draw one candidate after another; return ([K] order, [N] redundancy).

    logits [N] are -inf where nothing may be drawn, noise [K, N] has a row for each draw.

    Limits per domain are counted on the host: only with them does it wait for each draw.
    """
    k = len(noise)
    base = logits.clone()
    history = torch.zeros_like(base)  # scaled redundancy with what is drawn so far
    at_draw = torch.zeros_like(base)
    score = torch.empty_like(base)
    order = torch.empty(k, dtype=torch.int64, device=base.device)
    for i in range(k):
        torch.add(base, history, alpha=-per_unit, out=score)
        # an index that stays a tensor: item(), a branch on a tensor or x[tensor] would make the host wait
        score.add_(noise[i])
        if limits is not None:
            score.add_(limits.blocked())
        chosen = score.argmax(0, keepdim=True)
        if limits is not None:
            limits.take(int(chosen))
        order[i : i + 1] = chosen
        at_draw.index_copy_(0, chosen, history.index_select(0, chosen))
        base.index_fill_(0, chosen, -math.inf)
        history.add_(inter.index_select(1, chosen).squeeze(1), alpha=scale)
    return order, history.index_copy_(0, order, at_draw.index_select(0, order))


def _gumbel(rows: int, n: int, seed: int) -> Tensor:
    """Return [rows, n] float64 standard Gumbel noise, drawn on the CPU: the same numbers on every kind of device."""
    own = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, n, generator=own, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp_min_(torch.finfo(torch.float64).tiny)))


def _entropy_ratio(logits: Tensor) -> float:
    if len(logits) < 2:
        return math.nan
    log_p = torch.log_softmax(logits, 0)
    return (-(log_p.exp() * log_p).sum() / math.log(len(logits))).item()
