"""Momentum of the proxy: an exponential average of what the proxy batches gave, in sketch space.

Hashes never change and the preconditioner is applied later, so an average of sketches is the sketch of the averaged raw
proxy gradient: nothing is approximated but the weights that the older batches were read with.

    features    psi, the sketch of all layers or of each: the same on every tensor-parallel rank of a stage
    one_sided   S g_V^T or g_V S^T of each matrix: every tensor-parallel rank averages the side that it holds

With momentum beta, a_t = beta a_(t-1) + (1 - beta) x_t from a_0 = 0, and a_t / (1 - beta^t) is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.scoring.collectives import Traffic, all_reduce
from megatron_opus.scoring.stages import StageSums
from megatron_opus.types import Groups


class ProxyAverage:
    """Averages the proxy's tensors over the passes that read one. With momentum 0 they are returned as they are."""

    def __init__(
        self, momentum: float, groups: Groups, stages: StageSums, traffic: Traffic, device: torch.device
    ) -> None:
        self._momentum, self._groups, self._stages = momentum, groups, stages
        self._traffic, self._device = traffic, device
        self._average: list[Tensor] | None = None
        self._updates = 0

    def __call__(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return the averages after the tensors of one more proxy batch. Collective over stages and tensor parallelism.

        A batch that is not finite on some rank makes this step fall back: it is returned as it is and not averaged.
        """
        beta = self._momentum
        if beta == 0 or not self._all_finite(found):
            return list(found)
        previous = self._average or [torch.zeros_like(x) for x in found]
        self._average = [beta * old + (1 - beta) * new for old, new in zip(previous, found, strict=True)]
        self._updates += 1
        return [x / (1 - beta**self._updates) for x in self._average]

    def state_dict(self) -> dict[str, Any]:
        """Give the averages of every stage and of each of its tensor-parallel ranks, on every rank. Collective."""
        own = None if self._average is None else [x.cpu() for x in self._average]
        of_stage = [own] * self._groups.tp_size
        if self._groups.tp is not None:
            dist.all_gather_object(of_stage, own, group=self._groups.tp)
        return {"proxy_average": self._stages.gathered(of_stage), "proxy_updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "proxy_average" in state:
            saved = state["proxy_average"][self._groups.pp_rank][self._groups.tp_rank]
        else:  # of an earlier release: psi of every stage, or before there were stages just one
            psi = state["psi_average"]
            psi = psi[self._groups.pp_rank] if isinstance(psi, list) else psi
            saved = None if psi is None else [psi]
        self._average = None if saved is None else [x.to(self._device) for x in saved]
        self._updates = state.get("proxy_updates", state.get("psi_updates", 0))

    def _all_finite(self, found: Sequence[Tensor]) -> bool:
        mine = all(bool(torch.isfinite(x).all()) for x in found)
        doubts = torch.tensor([0.0 if mine else 1.0], device=self._device)
        return self._stages.all_agree(not all_reduce(doubts, self._groups.tp, self._traffic).item())
