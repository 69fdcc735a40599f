"""The optimizer state of Megatron's own optimizers.

ChainedOptimizer holds one optimizer for each kind of parameter; each of them keeps its state in its own way:

optimizer                          state of parameter p                         key in optimizer.state
FP32Optimizer                      whole on every data-parallel rank            p
Float16OptimizerWithFloat16Params  whole on every data-parallel rank            its float32 copy
DistributedOptimizer               the elements of p in this rank's range of    the shard: flat, float32
                                   the gradient buffer; none on other ranks
any, in a LayerWise-               whole on exactly one data-parallel rank,     p, or its float32 copy
DistributedOptimizer               none on others (see muon.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.backends.engines.hyper import MOMENTUM, SECOND_MOMENT, Found, find, full_name, hypers, kind_of
from megatron_opus.backends.engines.megatron import muon
from megatron_opus.backends.model import releases
from megatron_opus.types import Fragment, Geometry, Groups, Hyper, MuonHyper


@dataclass(frozen=True)
class _Place:
    """Where the state of one parameter lies."""

    part: Any  # the optimizer of the chain
    group: int  # of part.optimizer.param_groups
    key: Tensor | None  # in part.optimizer.state; None: other ranks own all of it
    start: int  # of the owned elements in the flattened parameter
    how: muon.Matrix | None = None  # what Muon does with it, where it is Muon's


class MegatronState:
    """Reads a Megatron optimizer, replicated, distributed or layer-wise, in float32 or bf16 (see `OptimizerState`)."""

    def __init__(self, optimizer: Any, groups: Groups, completed_steps: Callable[[], int]) -> None:
        """Find out where everything lies. Collective over `groups.state`; reading is not.

        `completed_steps()` is the number of optimizer steps taken so far: a rank that owns nothing has nothing else to
        tell it by.
        """
        self._completed, self._tp_size = completed_steps, groups.tp_size
        self._where: dict[int, _Place] = {}
        self.sharded_over_dp = False
        self._has_muon = False
        for part, layer_wise in muon.leaves(optimizer):
            self._has_muon = self._has_muon or any(
                kind_of(part.optimizer, group) == "muon" for group in part.optimizer.param_groups
            )
            if isinstance(part, releases.distributed_optimizer()):
                self.sharded_over_dp = True
                everyone = [p for buffer in part.buffers for p in buffer.params]
                self._add(part, _owned_ranges(part), everyone, part.data_parallel_group)
            elif layer_wise is not None and layer_wise.dp_cp_params_list is not None:
                self.sharded_over_dp = True
                owned = _owned_whole(part)
                # experts that lie apart; None: nobody else has those of this rank
                for lists, ranks in (
                    (layer_wise.dp_cp_params_list, groups.state),
                    (layer_wise.expt_dp_params_list or (), groups.expert_state),
                ):
                    self._add(part, owned, [p for params in lists for p in params], ranks)
            else:
                self._add(part, _owned_whole(part), [], None)

    def _add(self, part: Any, owned: Mapping[Tensor, _Place], everyone: Sequence[Tensor], ranks: Any) -> None:
        """Add the parameters that this rank owns anything of, and those of `everyone` that only others own.

        Those are in no map of this rank's optimizer, but one of `ranks` owns some of them and knows their group.
        """
        self._where |= {id(p): place for p, place in owned.items()}
        if not everyone or ranks is None:
            return
        number = {id(p): i for i, p in enumerate(everyone)}  # the same on every rank of the group
        known: list[Any] = [None] * dist.get_world_size(ranks)
        mine = {number[id(p)]: (place.group, place.how) for p, place in owned.items() if id(p) in number}
        dist.all_gather_object(known, mine, group=ranks)
        for n, (group, how) in {n: x for one in known for n, x in one.items()}.items():
            self._where.setdefault(id(everyone[n]), _Place(part, group, None, 0, how))

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        steps, found = self._completed(), []
        for weight in weights:
            place: _Place = find(self._where, weight)
            inner = place.part.optimizer
            group = {**inner.param_groups[place.group], "step": steps}
            state = {} if place.key is None else inner.state.get(place.key, {})
            kind, name = kind_of(inner, group), full_name(inner)
            found.append(Found(weight=weight, kind=kind, optimizer=name, group=group, state=state, steps=steps))
        return hypers(found, geometry, self._has_muon, muon=self._muon)

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return self._fragment(weight, SECOND_MOMENT)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        place: _Place = find(self._where, weight)
        return [] if place.how is None else self._fragment(weight, MOMENTUM)

    def _fragment(self, weight: torch.nn.Parameter, name: str) -> Sequence[Fragment]:
        place: _Place = find(self._where, weight)
        values = None if place.key is None else place.part.optimizer.state.get(place.key, {}).get(name)
        return [] if values is None else [Fragment(start=place.start, values=values.flatten())]

    def _muon(self, f: Found, lr: float) -> MuonHyper:
        place: _Place = find(self._where, f.weight)
        assert place.how is not None
        return muon.hyper(f, lr, place.part, place.how, self._tp_size)


def _owned_whole(part: Any) -> dict[Tensor, _Place]:
    pairs = zip(getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True)
    low = {id(master): p for ps, masters in pairs for p, master in zip(ps, masters, strict=True)}
    owned: dict[Tensor, _Place] = {}
    for g, group in enumerate(part.optimizer.param_groups):
        by_muon = kind_of(part.optimizer, group) == "muon"
        for key in group["params"]:
            how = muon.matrix(part.optimizer, key) if by_muon else None
            owned[low.get(id(key), key)] = _Place(part, g, key, 0, how)
    return owned


def _owned_ranges(part: Any) -> dict[Tensor, _Place]:
    owned = {}
    for p, (g, k) in part.model_param_group_index_map.items():
        buffer, dtype, bucket = part.model_param_gbuf_map[p]
        start = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][p]["param"].start
        owned[p] = _Place(part, g, part.optimizer.param_groups[g]["params"][k], start)
    return owned
