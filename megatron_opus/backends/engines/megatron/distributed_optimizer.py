"""The optimizer state of Megatron's own optimizers.

ChainedOptimizer holds one optimizer for each kind of parameter; each of them keeps its state in its own way:

optimizer                          state of parameter p                         key in optimizer.state
FP32Optimizer                      whole on every data-parallel rank            p
Float16OptimizerWithFloat16Params  whole on every data-parallel rank            its float32 copy
DistributedOptimizer               the elements of p in this rank's range of    the shard: flat, float32
                                   the gradient buffer; none on other ranks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_opus.backends.engines.hyper import MOMENTUM, SECOND_MOMENT, Found, MuonRule, find, hypers, kind_of
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.types import Fragment, Geometry, Groups, Hyper, MuonHyper


@dataclass(frozen=True)
class _Place:
    """Where the state of one parameter lies."""

    part: Any  # the optimizer of the chain
    group: int  # of part.optimizer.param_groups
    key: Tensor | None  # in part.optimizer.state; None: other ranks own all of it
    start: int  # of the owned elements in the flattened parameter


class MegatronState:
    """Reads a Megatron optimizer, replicated or distributed, in float32 or bf16 (see `OptimizerState`)."""

    def __init__(self, optimizer: Any, groups: Groups, completed_steps: Callable[[], int]) -> None:
        """Find out where everything lies. Collective over `groups.dp`; reading is not.

        `completed_steps()` is the number of optimizer steps taken so far: a rank that owns nothing has nothing else to
        tell it by. Raises UnsupportedOptimizer for an optimizer whose step is not known.
        """
        self._completed = completed_steps
        chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
        self._where: dict[int, _Place] = {}
        self.sharded_over_dp = False
        for part in chain:
            if getattr(part, "is_stub_optimizer", False):
                continue
            for group in part.optimizer.param_groups:
                kind_of(part.optimizer, group)  # refuses what it does not know
            if isinstance(part, DistributedOptimizer):
                self.sharded_over_dp = True
                self._add_distributed(part, groups)
            else:
                self._add_replicated(part)

    def _add_replicated(self, part: Any) -> None:
        pairs = zip(getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True)
        low = {id(master): p for ps, masters in pairs for p, master in zip(ps, masters, strict=True)}
        for g, group in enumerate(part.optimizer.param_groups):
            for key in group["params"]:
                self._where[id(low.get(id(key), key))] = _Place(part, g, key, 0)

    def _add_distributed(self, part: Any, groups: Groups) -> None:
        every = [p for buffer in part.buffers for p in buffer.params]
        number = {id(p): i for i, p in enumerate(every)}  # the same on every data-parallel rank
        owned = {number[id(p)]: place for p, place in part.model_param_group_index_map.items()}
        # a rank that owns nothing of a parameter has it in no map, but somebody owns some of it and knows its group
        known = [{n: g for n, (g, _) in owned.items()}]
        if (ranks := dist.get_world_size(part.data_parallel_group)) > 1:  # of experts, the expert-data group
            known = known * ranks
            dist.all_gather_object(known, known[0], group=part.data_parallel_group)
        group_of = {n: g for one in known for n, g in one.items()}
        for n, p in enumerate(every):
            if n not in owned:
                self._where[id(p)] = _Place(part, group_of[n], None, 0)
                continue
            g, k = owned[n]
            buffer, dtype, bucket = part.model_param_gbuf_map[p]
            start = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][p]["param"].start
            self._where[id(p)] = _Place(part, g, part.optimizer.param_groups[g]["params"][k], start)

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        steps, found = self._completed(), []
        for weight in weights:
            place: _Place = find(self._where, weight)
            group = {**place.part.optimizer.param_groups[place.group], "step": steps}
            state = {} if place.key is None else place.part.optimizer.state.get(place.key, {})
            kind = kind_of(place.part.optimizer, group)
            found.append(Found(weight=weight, kind=kind, group=group, state=state, steps=steps))
        return hypers(found, geometry, False, muon=_NO_MUON)

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return self._fragment(weight, SECOND_MOMENT)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        place: _Place = find(self._where, weight)
        group = place.part.optimizer.param_groups[place.group]
        return self._fragment(weight, MOMENTUM) if kind_of(place.part.optimizer, group) == "muon" else []

    def _fragment(self, weight: torch.nn.Parameter, name: str) -> Sequence[Fragment]:
        place: _Place = find(self._where, weight)
        values = None if place.key is None else place.part.optimizer.state.get(place.key, {}).get(name)
        return [] if values is None else [Fragment(start=place.start, values=values.flatten())]


def _no_muon(found: Found, lr: float) -> MuonHyper:
    raise UnsupportedOptimizer("optimizer: expected AdamW or SGD under Megatron's engine, found Muon")


_NO_MUON: MuonRule = _no_muon
