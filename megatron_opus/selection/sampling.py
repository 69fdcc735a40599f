"""Drawing K of N candidates one by one, with a redundancy term that grows with every draw (Alg. 1).

Boltzmann draws use the Gumbel-max identity: argmax(U / tau + Gumbel noise) is a draw from softmax(U / tau). The noise
of all K draws is taken from the generator at once, so a draw costs O(N) vector work and no host synchronisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opus.selection.limits import DomainLimits


@dataclass(frozen=True, kw_only=True)
class Draw:
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
    """Draw `k` distinct candidates.

    align [N] float64, inter [N, N] float64 (None: no redundancy), eligible [N] bool. `temperature` is in standard
    deviations of the eligible utilities (`std`) or in the utility's own unit (`absolute`). Raises ValueError when
    fewer than k candidates are eligible.
    """
    n = len(align)
    eligible = torch.ones(n, dtype=torch.bool) if eligible is None else eligible
    count = int(eligible.sum())
    if count < k:
        raise ValueError(f"draw: expected at least {k} eligible candidates, got {count} of {n}")
    blocked = torch.zeros(n, dtype=torch.float64).masked_fill(~eligible, -math.inf)
    utility = torch.where(eligible, align, 0.0)
    spread = utility[eligible].std().item() if count > 1 else 0.0
    tau = temperature * spread if temperature_unit == "std" else temperature
    # the generator advances by the same amount whatever the mode, so that ablations share their other draws
    uniform = torch.rand(k, n, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    scores_per_unit = 1.0 if greedy or tau == 0 else 1.0 / tau
    if greedy:
        noise = torch.zeros_like(noise)

    history = torch.zeros(n, dtype=torch.float64)
    at_draw = torch.zeros(n, dtype=torch.float64)
    order = torch.empty(k, dtype=torch.int64)
    for i in range(k):
        penalty = redundancy_scale * history
        closed = blocked if limits is None else blocked + limits.blocked()
        chosen = torch.argmax((utility - penalty) * scores_per_unit + noise[i] + closed)
        order[i] = chosen
        at_draw[chosen] = penalty[chosen]
        blocked[chosen] = -math.inf
        if limits is not None:
            limits.take(int(chosen))
        if inter is not None and redundancy_scale != 0:
            history = history + torch.where(eligible, inter[:, chosen], 0.0)
    final = redundancy_scale * history
    final[order] = at_draw[order]
    return Draw(
        indices=order,
        utility=torch.where(eligible, align, math.nan),
        redundancy=final,
        temperature=tau,
        entropy_ratio=math.nan if greedy else _entropy_ratio(utility[eligible] * scores_per_unit),
    )


def _entropy_ratio(logits: Tensor) -> float:
    if len(logits) < 2:
        return math.nan
    log_p = torch.log_softmax(logits, 0)
    return (-(log_p.exp() * log_p).sum() / math.log(len(logits))).item()
