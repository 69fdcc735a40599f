"""What a scoring pass adds up over pipeline stages: each stage has read its own layers alone.

    alignment, interaction   sums over layers: one all-reduce of [N] and [N, N] numbers
    scope `model`            the features of all layers share one sketch: phi and psi themselves are added up, since a
                             sum of the stages' scores would lack the products of one stage's layers with another's
    tied embedding           used on the first stage and, as the output layer, on the last: the parts of its gradient
                             are added up and counted once, on the first stage
    losses                   broadcast from the last stage

Preconditioners, gradients and psi of a stage's own layers stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.config import ConfigError
from megatron_opus.scoring.collectives import Traffic, all_reduce, broadcast
from megatron_opus.types import Groups


class StageSums:
    """Sums over the pipeline group. With one stage nothing is sent and every value is returned as it is."""

    def __init__(
        self,
        names: Sequence[str],
        dims: Sequence[int],
        shapes: Sequence[tuple[int, int]],
        scope: str,
        groups: Groups,
        traffic: Traffic,
        device: torch.device,
    ) -> None:
        """Tell all stages which matrices this one scores, their sketch dimensions and gradient shapes. Collective.

        Raises ConfigError when no stage has a layer to score.
        """
        self._scope, self._groups, self._traffic, self._device = scope, groups, traffic, device
        own: dict[str, tuple[int, tuple[int, int]]] = dict(zip(names, zip(dims, shapes, strict=True), strict=True))
        known = [own]
        if groups.pp is not None:
            known = known * groups.pp_size
            dist.all_gather_object(known, own, group=groups.pp)
        if not any(known):
            raise ConfigError(
                "no layer to score: expected tensor-parallel linear layers or nn.Linear with trainable weights in the "
                "model, found none"
            )
        self.width = max(dim for found in known for dim, _ in found.values())  # of one sketch of all layers
        self._speaker = next(stage for stage, found in enumerate(known) if found)
        self._silent = not all(known)
        everywhere = [name for found in known for name in found]
        # name -> (position here or None, dimension, gradient shape, whether it is counted here)
        self._shared = [
            (
                list(own).index(name) if name in own else None,
                *next(found[name] for found in known if name in found),
                next(stage for stage, found in enumerate(known) if name in found) == groups.pp_rank,
            )
            for name in sorted(set(everywhere))
            if everywhere.count(name) > 1
        ]

    def features(self, value: Tensor, columns: Sequence[slice]) -> Tensor:
        """Complete features [..., F] of candidates or proxy; `columns` are those of each matrix of this stage."""
        if self._scope == "model":
            return all_reduce(value, self._groups.pp, self._traffic)
        for position, dim, _, counted in self._shared:
            part = torch.zeros(*value.shape[:-1], dim, dtype=value.dtype, device=self._device)
            if position is not None:
                part += value[..., columns[position]]
            all_reduce(part, self._groups.pp, self._traffic)
            if position is not None:
                value[..., columns[position]] = part if counted else 0.0
        return value

    def gradients(self, found: Sequence[Tensor]) -> None:
        """Complete, in place, the proxy's gradient of a matrix that several stages use."""
        for position, _, shape, _ in self._shared:
            part = torch.zeros(shape, dtype=torch.float32, device=self._device) if position is None else found[position]
            all_reduce(part, self._groups.pp, self._traffic)

    def total(self, value: Tensor) -> Tensor:
        """Add up scores over the stages, in place; identical on all of them."""
        return broadcast(all_reduce(value, self._groups.pp, self._traffic), self._groups.pp, self._traffic)

    def from_features(self, value: Tensor) -> Tensor:
        """Add up scores that were read off features; with scope `model` every stage has the complete ones."""
        return value if self._scope == "model" else self.total(value)

    def of_last(self, value: Tensor) -> Tensor:
        """Take the last stage's value, in place."""
        return broadcast(value, self._groups.pp, self._traffic, source=self._groups.pp_size - 1)

    def all_agree(self, flag: bool) -> bool:
        """Tell whether `flag` holds on every stage."""
        doubts = torch.tensor([0.0 if flag else 1.0], device=self._device)
        return not all_reduce(doubts, self._groups.pp, self._traffic).item()

    def spoken(self, geometry: str) -> str:
        """Return the geometry of the first stage that scores anything."""
        said = [geometry]
        if self._silent and self._groups.pp is not None:
            source = dist.get_global_rank(self._groups.pp, self._speaker)
            dist.broadcast_object_list(said, src=source, group=self._groups.pp)
        return said[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return every stage's value, in the order of the stages."""
        everyone = [value] * self._groups.pp_size
        if self._groups.pp is not None:
            dist.all_gather_object(everyone, value, group=self._groups.pp)
        return everyone
