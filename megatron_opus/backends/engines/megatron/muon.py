"""Megatron's own Muon: how it is asked for, how its parameters lie, and the numbers of its coming step.

Muon takes every two-dimensional weight but the embedding and the output layer, position embeddings included; AdamW
takes the rest. Two ways to keep its momentum:

replicated    whole on every data-parallel rank, in float32 or bf16
layer-wise    each matrix whole on exactly one data-parallel rank, bf16 alone (`use_distributed_optimizer`). Either the
              layout of the gradient buffers says which rank, and a DistributedOptimizer has AdamW's parameters in
              pieces; or matrices are dealt out by size, and so are AdamW's parameters, each of them whole. The engine
              makes the first; a reader meets both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_opus.backends.engines.hyper import Found
from megatron_opus.backends.model import releases
from megatron_opus.config import OptimizerConfig
from megatron_opus.types import MuonHyper


def leaves(optimizer: Any, layer_wise: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield each optimizer of a chain that updates parameters, with the layer-wise optimizer around it or None."""
    if not isinstance(optimizer, ChainedOptimizer):
        if not getattr(optimizer, "is_stub_optimizer", False):
            yield optimizer, layer_wise
        return
    kind = releases.layer_wise_optimizer()
    around = optimizer if kind is not None and isinstance(optimizer, kind) else layer_wise
    for child in optimizer.chained_optimizers:
        yield from leaves(child, around)


# --- asking for it --------------------------------------------------------------------------------------------------


def options(o: OptimizerConfig, *, layer_wise: bool) -> dict[str, Any]:
    """Return what Megatron's OptimizerConfig is told about Muon."""
    return {
        "muon_momentum": o.muon_momentum,
        "muon_nesterov": o.muon_nesterov,
        "muon_split_qkv": o.muon_split_qkv,
        "muon_tp_mode": o.muon_tp_mode,
        "muon_coefficient_type": o.muon_coefficient_type,
        "muon_num_ns_steps": o.muon_num_ns_steps,
        "muon_scale_mode": o.muon_scale_mode,
        "muon_extra_scale_factor": o.muon_extra_scale_factor,
        "muon_fp32_matmul_prec": o.muon_fp32_matmul_prec,
        "use_layer_wise_distributed_optimizer": layer_wise,
        "use_distributed_optimizer": False,  # of AdamW's parameters: Megatron sees to it by itself
    }


def buffer_layouts(pieces: Sequence[Any], settings: Any) -> list[dict[str, Any]]:
    """Return DistributedDataParallel's further arguments for each piece: no matrix of Muon's crosses a shard's border.

    Megatron's own training loop does the same before it wraps a model.
    """
    kind: Any = releases.layer_wise_optimizer()
    releases.tag_for_layer_wise(pieces)
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    of_experts = parallel_state.get_expert_data_parallel_world_size()
    return [
        {
            "full_param_layout": kind.compute_full_param_layout(
                [p for p in piece.parameters() if p.requires_grad],
                settings.bucket_size if number == 0 else None,
                size,
                settings,
                expert_data_parallel_world_size=of_experts,
            )
        }
        for number, piece in enumerate(pieces)
    ]


# --- reading it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """Says how Muon takes one matrix."""

    split: tuple[int, ...] = ()  # rows of each part in a query group; empty: not split
    over: int | None = None  # the dimension along which the shards of all tensor-parallel ranks are joined


def matrix(inner: Any, key: Tensor) -> Matrix:
    """Read what Megatron's Muon `inner` will do with the parameter `key` of its groups."""
    split: tuple[int, ...] = ()
    if inner.split_qkv and inner.is_qkv_fn(key):
        split = tuple(getattr(key, "qkv_split_shapes", None) or inner.qkv_split_shapes)
    # an expert is whole on its ranks, whatever Megatron's linear layers say: expert tensor parallelism is refused
    dim = -1 if getattr(key, "expert_tp", False) else getattr(key, "partition_dim", -1)
    return Matrix(split=split, over=None if dim == -1 or inner.tp_mode == "blockwise" else dim)


def hyper(f: Found, lr: float, part: Any, how: Matrix, tp_size: int) -> MuonHyper:
    """Describe the coming Muon step of one weight; `part` is the optimizer of the chain that takes it."""
    config = part.config
    size = [*f.weight.shape]
    if how.over is not None:
        size[how.over] *= tp_size

    def scale(rows: int) -> float:
        factor = releases.megatron_muon().get_muon_scale_factor(rows, size[1], mode=config.muon_scale_mode)
        return float(factor) * config.muon_extra_scale_factor

    groups = size[0] // sum(how.split) if how.split else 0
    return MuonHyper(
        lr=lr,
        momentum=float(f.group["momentum"]),
        nesterov=bool(part.optimizer.nesterov),
        scale=1.0 if how.split else scale(size[0]),
        coefficients=releases.muon_coefficients(config.muon_coefficient_type, config.muon_num_ns_steps),
        step=f.steps or 0,
        whole=how.over is not None and tp_size > 1,
        split=tuple((rows, scale(groups * rows)) for rows in how.split),
    )
