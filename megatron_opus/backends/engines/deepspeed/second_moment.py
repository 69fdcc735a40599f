"""A second moment for weights whose own optimizer has none: AdamW's geometry in a Muon run.

v <- beta2 v + (1 - beta2) g^2 in float32, of the averaged and clipped gradient: what AdamW would hold had it been
given the same gradients. Each rank keeps only the elements that it owns (partition.py), beside the optimizer's state
and on its device. Updated in `take_step`, before the optimizer turns the gradient into an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opus.backends.engines.deepspeed.partition import Partition
from megatron_opus.types import AdamHyper, Fragment


class SecondMoment:
    def __init__(
        self, partition: Partition, weights: Mapping[str, Tensor], *, beta1: float, beta2: float, eps: float
    ) -> None:
        """`weights` by name, the same name for the same weight in every run."""
        self.steps = 0
        self._partition, self._beta1, self._beta2, self._eps = partition, beta1, beta2, eps
        self._weights = dict(weights)
        self._names = {id(weight): name for name, weight in weights.items()}
        self._v: dict[str, Tensor] = {}  # [n] float32, owned elements; absent where this rank owns none

    def keeps(self, weight: Tensor) -> bool:
        return id(weight) in self._names

    def hyper(self, lr: float) -> AdamHyper:
        return AdamHyper(lr=lr, beta1=self._beta1, beta2=self._beta2, eps=self._eps, step=self.steps)

    @torch.no_grad()
    def update(self, gradient: Callable[[Tensor], Tensor | None]) -> None:
        """`gradient(weight)`: the owned elements [n] of its averaged gradient, None where this rank owns none."""
        for name, weight in self._weights.items():
            g = gradient(weight)
            if g is None:
                continue
            g = g.detach().flatten().float()
            if name not in self._v:
                self._v[name] = torch.zeros_like(g)
            self._v[name].mul_(self._beta2).addcmul_(g, g, value=1 - self._beta2)
        self.steps += 1

    def fragments(self, weight: Tensor) -> Sequence[Fragment]:
        owned, v = self._partition.owned(weight), self._v.get(self._names[id(weight)])
        return [] if owned is None or v is None else [Fragment(start=owned.start, values=v)]

    def state_dict(self) -> dict[str, Any]:
        """Of this rank alone."""
        return {"steps": self.steps, "v": dict(self._v)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave on this rank, in a run of the same layout."""
        self.steps = state["steps"]
        self._v = {name: v.to(self._partition.key(self._weights[name]).device) for name, v in state["v"].items()}
