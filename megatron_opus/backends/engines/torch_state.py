"""The state of a plain torch optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_opus.backends.engines.deepspeed import muon
from megatron_opus.backends.engines.hyper import MOMENTUM, SECOND_MOMENT, Found, find, full_name, hypers, kind_of, kinds
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.types import Fragment, Geometry, Hyper


class TorchState:
    """A torch optimizer in one process, or replicated over data-parallel ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.sharded_over_dp = False
        self._optimizer = optimizer
        self._has_muon = "muon" in kinds(optimizer, optimizer.param_groups)
        self._where = {
            id(p): (g, k) for g, group in enumerate(optimizer.param_groups) for k, p in enumerate(group["params"])
        }

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        found = []
        for weight in weights:
            group = self._optimizer.param_groups[find(self._where, weight)[0]]
            kind, state = kind_of(self._optimizer, group), self._optimizer.state.get(weight, {})
            name, steps = full_name(self._optimizer), None if state else 0
            found.append(Found(weight=weight, kind=kind, optimizer=name, group=group, state=state, steps=steps))
        return hypers(found, geometry, self._has_muon, muon=muon.hyper)

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return self._fragment(weight, SECOND_MOMENT)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        group = self._optimizer.param_groups[find(self._where, weight)[0]]
        return self._fragment(weight, MOMENTUM) if kind_of(self._optimizer, group) == "muon" else []

    def _fragment(self, weight: torch.nn.Parameter, name: str) -> Sequence[Fragment]:
        values = self._optimizer.state.get(weight, {}).get(name)
        if values is None:
            return []
        if hasattr(values, "placements"):
            raise UnsupportedOptimizer(
                f"optimizer state {name}: expected whole tensors, got a DTensor, a part of it; gather it "
                "(torch.distributed.checkpoint.state_dict, full_state_dict=True), or shard with DeepSpeed ZeRO or "
                "Megatron, whose pieces can be read"
            )
        dense = isinstance(values, torch.Tensor) and values.layout == torch.strided and not values.is_meta
        if not dense or not values.is_floating_point():
            whole = isinstance(values, torch.Tensor)
            found = f"{values.dtype} {values.layout} on {values.device}" if whole else type(values).__name__
            raise UnsupportedOptimizer(f"optimizer state {name}: expected a dense tensor of real numbers, got {found}")
        if values.shape != weight.shape:
            raise UnsupportedOptimizer(
                f"optimizer state {name}: expected the shape of its weight, {list(weight.shape)}, got "
                f"{list(values.shape)}"
            )
        return [Fragment(start=0, values=values.flatten())]
