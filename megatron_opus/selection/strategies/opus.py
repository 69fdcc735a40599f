"""OPUS: Boltzmann draws by the utility of the coming optimizer update (arXiv 2602.05400, Alg. 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_opus.config import SelectionConfig
from megatron_opus.selection import sampling, utility
from megatron_opus.selection.limits import Floors
from megatron_opus.selection.strategies.base import Stateless, draw_uniformly
from megatron_opus.types import Candidates, Selection, SignalName, Signals


class OpusStrategy(Stateless):
    """Needs alignment [N] and, unless redundancy is off, interaction [N, N].

    A candidate with non-finite factors is never drawn. If fewer than k finite ones remain, or all utilities are equal
    (then they carry no information: usually a capture that saw nothing), the step is drawn at random and
    `Selection.fallback` says why: the driver counts it.
    """

    needs: frozenset[SignalName] = frozenset({"ghost"})

    def __init__(self, config: SelectionConfig, floors: Floors | None = None) -> None:
        super().__init__(floors)
        self._config = config

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        if signals.alignment is None:
            raise ValueError("opus: expected signals with an alignment, got none; run the scoring pass first")
        config, align = self._config, signals.alignment
        n = len(align)
        finite = torch.isfinite(align) if signals.finite is None else signals.finite & torch.isfinite(align)
        inter = signals.interaction
        if inter is not None:
            finite = finite & torch.isfinite(inter.diagonal())
        usable = int(finite.sum())
        if usable < k:
            reason = f"{usable} of {n} candidates have finite scores, need {k}"
            return self._fallback(candidates, k, generator, reason, n - usable)
        good = align[finite]
        if k < n and (good.max() == good.min()):
            reason = f"all {usable} utilities are equal ({good[0]:g})"
            return self._fallback(candidates, k, generator, reason, n - usable)
        scale = 0.0
        if config.redundancy.scale != "off":
            if inter is None:
                raise ValueError("opus: redundancy is on but the scoring pass gave no interaction matrix")
            scale = utility.redundancy_scale(good, inter[finite][:, finite], k, config.redundancy)
        limits = None if self._floors is None else self._floors.limits(candidates, k, finite)
        result = sampling.draw(
            align,
            inter,
            k,
            generator=generator,
            temperature=config.temperature,
            temperature_unit=config.temperature_unit,
            greedy=config.sampling == "greedy",
            redundancy_scale=scale,
            eligible=finite,
            limits=limits,
        )
        return Selection(
            indices=result.indices,
            utility=result.utility,
            redundancy=result.redundancy,
            diagnostics={
                **_diagnostics(result, good, scale, n - usable),
                **({} if limits is None else limits.diagnostics()),
            },
        )

    def _fallback(
        self, candidates: Candidates, k: int, generator: torch.Generator, reason: str, excluded: int
    ) -> Selection:
        return draw_uniformly(candidates, k, generator, self._floors, reason, {"excluded": float(excluded)})


def _diagnostics(result: sampling.Draw, good: Tensor, scale: float, excluded: int) -> dict[str, float]:
    k = len(result.indices)
    best = torch.topk(result.utility.nan_to_num(-math.inf), k).indices
    drawn = result.indices
    deviation = (result.utility[drawn] - good.mean()).abs().sum()
    penalty = result.redundancy[drawn].abs().sum()
    return {
        "entropy_ratio": result.entropy_ratio,
        "temperature": result.temperature,
        # share of the k best by utility among those drawn
        "top_k_share": torch.isin(drawn, best).double().mean().item(),
        # how much of what decided the draws was redundancy: |redundancy| / (|alignment - mean| + |redundancy|)
        "redundancy_share": (penalty / (deviation + penalty)).item() if deviation + penalty > 0 else 0.0,
        "redundancy_scale": scale,
        "utility_std": good.std().item() if len(good) > 1 else 0.0,
        "utility_mean": good.mean().item(),
        "utility_gain": (result.utility[drawn].mean() - good.mean()).item(),
        "excluded": float(excluded),
    }
