"""The optimizer state of a DeepSpeed engine.

No communication; everything is found by the parameter's identity. Where state lies in an engine: see partition.py.
Muon's momentum is the exception at ZeRO 1 and 2 without offload: one flat tensor of the **whole** matrices of which
this rank owns any part (`params_in_partition`), so that several ranks hold the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_opus.backends.engines.deepspeed import muon
from megatron_opus.backends.engines.deepspeed.partition import Partition
from megatron_opus.backends.engines.deepspeed.second_moment import SecondMoment
from megatron_opus.backends.engines.hyper import MOMENTUM, SECOND_MOMENT, Found, full_name, hypers, kind_of, kinds
from megatron_opus.types import Fragment, Geometry, Hyper


class DeepSpeedState:
    """A DeepSpeed engine at ZeRO stage 0, 1, 2 or 3, with the optimizer's tensors on the device or on the host.

    One built by this package keeps a second moment for Muon's weights where the recipe asks for AdamW's geometry.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._partition = Partition(engine)
        self._optimizer = self._partition.optimizer
        self._has_muon = "muon" in kinds(self._optimizer, self._optimizer.param_groups)
        self._own: SecondMoment | None = getattr(getattr(engine, "step_settings", None), "second_moment", None)
        self.sharded_over_dp = self._partition.sharded_over_dp

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        # bf16 at stage 0 takes a dummy step on zero gradients when it starts: only the engine knows it was none
        steps = self._engine.global_steps - self._engine.skipped_steps
        found = []
        for weight in weights:
            group = self._partition.group(weight)
            state = self._optimizer.state.get(self._partition.key(weight), {})
            kind, name = kind_of(self._optimizer, group), full_name(self._optimizer)
            found.append(Found(weight=weight, kind=kind, optimizer=name, group=group, state=state, steps=steps))
        return hypers(
            found,
            geometry,
            self._has_muon,
            muon=muon.hyper,
            own_adam=None if self._own is None else self._own.hyper,
        )

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        if self._own is not None and self._own.keeps(weight):
            return self._own.fragments(weight)
        return self._fragment(weight, SECOND_MOMENT)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        p = self._partition
        if kind_of(self._optimizer, p.group(weight)) != "muon":
            return []
        if p.kind != "zero12" or p.offloaded:
            return self._fragment(weight, MOMENTUM)
        start = 0
        for other in p.wrapper.params_in_partition[p.where(weight)[0]]:
            if other is weight:
                buffer = self._optimizer.state.get(p.key(weight), {}).get(MOMENTUM)
                return [] if buffer is None else [Fragment(start=0, values=buffer.narrow(0, start, weight.numel()))]
            start += other.numel()
        return []

    def _fragment(self, weight: torch.nn.Parameter, name: str) -> Sequence[Fragment]:
        owned = self._partition.owned(weight)
        values = self._optimizer.state.get(self._partition.key(weight), {}).get(name)
        if owned is None or values is None:
            return []
        return [Fragment(start=owned.start, values=values.flatten().narrow(0, owned.offset, owned.n))]
