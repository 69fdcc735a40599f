"""The averaged gradients of an engine between the last backward and the optimizer's step, and clipping by their norm.

DeepSpeed clips what it hands to the optimizer. With Muon under ZeRO 1, 2 and 3 that is no gradient any more but the
orthogonalised update, whose norm grows with the number of matrices: it would scale the learning rate down by an
arbitrary factor, and AdamW's gradients with it. So in a Muon run, and at stage 0 where DeepSpeed keeps no norm that
counts shards, the norm is taken here, over the gradients, and they are scaled before Muon sees them.

engine                   gradients at that moment (per group g or sub-group, parameter k)
stage 0                  p.grad, whole on every data-parallel rank
BF16_Optimizer           fp32_groups_gradients[g][k], whole on every data-parallel rank
ZeRO 1 / 2               averaged_gradients[g]: owned pieces in the order of params_in_partition[g]; of Muon's group
                         they would be updates already, made in the backward pass: `_Zero12` puts that off
ZeRO 3                   averaged_gradients[g][k], this rank's part, padded
ZeRO 1, 2, 3, offloaded  <fp32 flat tensor of g>.grad
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_opus.backends.engines.deepspeed.partition import Partition
from megatron_opus.types import Groups

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Gradients:
    """Averaged gradients of one engine. The base class is stage 0."""

    sharded = False  # over data-parallel ranks

    def __init__(self, partition: Partition, model: nn.Module) -> None:
        self._partition, self._model = partition, model

    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        """(parameter, elements of its gradient that are here); if sharded, each element on one data-parallel rank."""
        for p in self._model.parameters():
            if p.grad is not None:
                yield p, p.grad

    def tensors(self) -> Iterator[Tensor]:
        """Everything that has to be scaled to scale the gradient."""
        return (gradient for _, gradient in self.pieces())

    def owned(self, weight: Any) -> Tensor | None:
        """[n] elements of which this rank keeps optimizer state."""
        return None if weight.grad is None else weight.grad.flatten()

    def release(self) -> None:
        """Hand the gradients over to the optimizer's step."""

    def norm(self, groups: Groups) -> Tensor:
        """2-norm of the whole gradient, float32 scalar: all shards, replicated parameters once. Collective."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        squares = torch.zeros(2, dtype=torch.float32, device=device)  # sharded over tp, replicated
        norms: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p, gradient in self.pieces():
            norms[0 if getattr(p, "model_parallel", False) else 1].append(
                torch.linalg.vector_norm(gradient, dtype=torch.float32)
            )
        for kind, found in enumerate(norms):
            if found:
                squares[kind] = torch.stack(found).square().sum()
        if self.sharded and groups.dp is not None:
            dist.all_reduce(squares, group=groups.dp)
        if groups.tp is not None:
            dist.all_reduce(squares[0], group=groups.tp)
        return squares.sum().sqrt()

    @torch.no_grad()
    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale so that the norm is at most `limit`; 0: no limit."""
        if limit > 0 and norm + CLIP_EPS > limit:
            factor = limit / (norm + CLIP_EPS)
            for gradient in self.tensors():
                gradient.mul_(factor.to(gradient.device))

    @torch.no_grad()
    def poison(self) -> None:
        """Make DeepSpeed see on every rank what the norm saw on all of them: this step is to be skipped."""
        for gradient in self.tensors():
            gradient.fill_(torch.nan)


class _Bf16(Gradients):
    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        wrapper = self._partition.wrapper
        for params, gradients in zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True):
            yield from zip(params, gradients, strict=True)

    def owned(self, weight: Any) -> Tensor | None:
        part = self._partition.owned(weight)
        if part is None:
            return None
        g, k = self._partition.where(weight)
        return self._partition.wrapper.fp32_groups_gradients[g][k].flatten().narrow(0, part.start, part.n)


class _Zero12(Gradients):
    """Takes Muon out of DeepSpeed's backward pass: its whole gradients are kept until `release`.

    `get_flat_partition` is called there once per group and step with the averaged gradients in `all_grad_tensors`;
    for Muon's group it orthogonalises them. What it would return is put in place in `release` instead.
    """

    sharded = True

    def __init__(self, partition: Partition, model: nn.Module) -> None:
        super().__init__(partition, model)
        zero = partition.wrapper
        self._pending: dict[int, tuple[list[Tensor], tuple[Any, ...], dict[str, Any]]] = {}
        self._flatten = zero.get_flat_partition
        zero.get_flat_partition = self._put_off

    def _put_off(self, params: list[Tensor], *args: Any, param_group_idx: int, **kwargs: Any) -> list[Tensor]:
        zero = self._partition.wrapper
        kwargs["param_group_idx"] = param_group_idx
        if not params or not zero.optimizer.param_groups[param_group_idx].get("use_muon"):
            pieces: list[Tensor] = self._flatten(params, *args, **kwargs)
            return pieces
        self._pending[param_group_idx] = (zero.all_grad_tensors[param_group_idx], (params, *args), kwargs)
        return []

    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        zero = self._partition.wrapper
        for g, params in enumerate(zero.params_in_partition):
            if g in self._pending:
                for p in params:
                    gradient = self.owned(p)
                    assert gradient is not None  # it is in params_in_partition
                    yield p, gradient
            else:
                real = [t for t in zero.averaged_gradients[g] if not getattr(t, "_zero_padding", False)]
                yield from zip(params, real, strict=False)  # what follows is padding

    def tensors(self) -> Iterator[Tensor]:
        zero = self._partition.wrapper
        for g in range(len(zero.params_in_partition)):
            yield from self._pending[g][0] if g in self._pending else zero.averaged_gradients[g]

    def owned(self, weight: Any) -> Tensor | None:
        """Of Muon's weights only: the others' gradients are in pieces already."""
        part = self._partition.owned(weight)
        if part is None:
            return None
        g, _ = self._partition.where(weight)
        position = next(k for k, p in enumerate(self._partition.wrapper.params_in_partition[g]) if p is weight)
        return self._pending[g][0][position].flatten().narrow(0, part.start, part.n)

    def release(self) -> None:
        zero = self._partition.wrapper
        for g, (gradients, args, kwargs) in self._pending.items():
            zero.all_grad_tensors[g] = gradients
            zero.averaged_gradients[g] = self._flatten(*args, **kwargs)
            zero.all_grad_tensors[g] = None
        self._pending.clear()


class _FlatParts(Gradients):
    """ZeRO 3, and every stage whose optimizer is offloaded: one flat part for each (sub-)group."""

    sharded = True

    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        for params in self._partition.params:
            for p in params:
                gradient = self.owned(p)
                if gradient is not None:
                    yield p, gradient

    def tensors(self) -> Iterator[Tensor]:
        if self._partition.offloaded:
            for flat in self._partition.flat:
                assert flat.grad is not None  # allocated by DeepSpeed once
                yield flat.grad
        else:
            for parts in self._partition.wrapper.averaged_gradients.values():
                yield from parts

    def owned(self, weight: Any) -> Tensor | None:
        part = self._partition.owned(weight)
        if part is None:
            return None
        g, k = self._partition.where(weight)
        if self._partition.offloaded:
            flat = self._partition.flat[g].grad
            assert flat is not None
            return flat.narrow(0, part.offset, part.n)
        return self._partition.wrapper.averaged_gradients[g][k].flatten().narrow(0, 0, part.n)


def gradients_of(partition: Partition, model: nn.Module) -> Gradients:
    """Access to the gradients of this engine; ZeRO 1 and 2 run Muon in `release` from now on."""
    if partition.offloaded or partition.kind == "zero3":
        return _FlatParts(partition, model)
    return {"zero12": _Zero12, "bf16": _Bf16}.get(partition.kind, Gradients)(partition, model)
