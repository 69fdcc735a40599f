"""Stands for Transformer Engine's linear layers on a CPU: their attributes and their arithmetic, none of their kernels.

`swap` puts them into a Megatron GPT of local layers, with the same weights: the query, key and value projection and the
first layer of the MLP take the norm before them in, as Megatron-LM's default layers do. `group_experts` puts Megatron's
own TEGroupedMLP around the weights of experts that were modules, with the stand-in for its linear layers.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe import experts as megatron_experts
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn


class Fp8State:
    """Of the module `transformer_engine.pytorch` that `fp8_modules` makes."""

    enabled = False


def fp8_modules(*, available: bool = True) -> dict[str, types.ModuleType]:
    """Entries of sys.modules that stand for Transformer Engine: its autocast, its recipe and its question for a GPU."""

    @contextlib.contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        assert type(recipe).__name__ == "Float8CurrentScaling"
        Fp8State.enabled = enabled
        try:
            yield
        finally:
            Fp8State.enabled = False

    manager = type(
        "FP8GlobalStateManager", (), {"is_fp8_available": lambda: (available, "" if available else "too old")}
    )
    parts: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"autocast": autocast},
        "transformer_engine.pytorch.fp8": {"FP8GlobalStateManager": manager},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"Float8CurrentScaling": type("Float8CurrentScaling", (), {})},
    }
    found = {}
    for name, values in parts.items():
        found[name] = types.ModuleType(name)
        vars(found[name]).update(values)
    return found


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in fp8, scaled by its largest value, and back."""
    scale = torch.finfo(dtype).max / x.abs().max().clamp(min=1e-30)
    return (x * scale).to(dtype).to(x.dtype) / scale


class Product8(torch.autograd.Function):
    """x W^T of operands in fp8, and the same for both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = rounded(grad, torch.float8_e5m2)
        return grad @ weight, grad.flatten(0, -2).mT @ x.flatten(0, -2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not Fp8State.enabled:
        return nn.functional.linear(x, weight, bias)
    y: Tensor = Product8.apply(x, weight)
    return y if bias is None else y + bias


class Linear(nn.Module):
    """y = x W^T of this rank's part of W, returned with the bias that is left to add."""

    def __init__(self, local: Any, mode: str) -> None:
        super().__init__()
        self.parallel_mode = mode
        self.weight, self.bias = local.weight, local.bias
        self.out_features, self.in_features = self.weight.shape
        self.sequence_parallel = local.sequence_parallel
        self.is_first_microbatch = True
        self.fuse_wgrad_accumulation = False
        self.firsts: list[bool] = []  # of every call
        self.fp8, self.fp8_meta = False, {"fp8_checkpoint": False}
        self.calls_in_fp8 = 0

    def product(self, x: Tensor) -> tuple[Tensor, Any]:
        self.firsts.append(self.is_first_microbatch)
        self.is_first_microbatch = False
        self.fp8 = self.fp8_meta["fp8_checkpoint"] = Fp8State.enabled
        self.calls_in_fp8 += self.fp8
        column = self.parallel_mode == "column"
        if column:
            gather = gather_from_sequence_parallel_region
            x = gather(x) if self.sequence_parallel else copy_to_tensor_model_parallel_region(x)
        y = linear(x, self.weight, self.bias if column else None)
        if not column:
            reduce = reduce_scatter_to_sequence_parallel_region
            y = reduce(y) if self.sequence_parallel else reduce_from_tensor_model_parallel_region(y)
        return y, None if column else self.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.product(x)


class LayerNormLinear(Linear):
    """As `Linear`, of norm(x)."""

    def __init__(self, local: Any, norm: Any, *, zero_centered_gamma: bool) -> None:
        super().__init__(local, "column")
        self.normalization = type(norm).__name__
        self.zero_centered_gamma = zero_centered_gamma
        self.eps = norm.eps
        self.layer_norm_weight = norm.weight
        if zero_centered_gamma:
            with torch.no_grad():
                norm.weight -= 1.0
        self.layer_norm_bias = getattr(norm, "bias", None)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        weight = self.layer_norm_weight + 1.0 if self.zero_centered_gamma else self.layer_norm_weight
        shape = x.shape[-1:]
        if self.normalization == "RMSNorm":
            return self.product(nn.functional.rms_norm(x, shape, weight, self.eps))
        return self.product(nn.functional.layer_norm(x, shape, weight, self.layer_norm_bias, self.eps))


def swap(model: Any, *, zero_centered_gamma: bool = False) -> Any:
    """`model` with its linear layers replaced; the norms before them are gone."""
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        more = {"zero_centered_gamma": zero_centered_gamma}
        attention.linear_qkv = LayerNormLinear(attention.linear_qkv, layer.input_layernorm, **more)
        mlp.linear_fc1 = LayerNormLinear(mlp.linear_fc1, layer.pre_mlp_layernorm, **more)
        attention.linear_proj = Linear(attention.linear_proj, "row")
        mlp.linear_fc2 = Linear(mlp.linear_fc2, "row")
        layer.input_layernorm, layer.pre_mlp_layernorm = nn.Identity(), nn.Identity()
    assert parallel_state.model_parallel_is_initialized()
    return model


class GroupedLinear(nn.Module):
    """y = x W^T of every expert's rows, with a weight of its own for each: weight0, weight1, ..."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__()
        self.num_gemms, self.in_features, self.out_features = num_gemms, input_size, output_size
        self.is_first_microbatch = True
        self.fuse_wgrad_accumulation = False
        self.parallel_mode = None  # as Transformer Engine is told where experts lie on several ranks

    def forward(self, x: Tensor, m_splits: Any) -> tuple[Tensor, None]:
        self.is_first_microbatch = False
        rows = x.split([int(n) for n in m_splits])
        weights = [self.get_parameter(f"weight{i}") for i in range(self.num_gemms)]
        return torch.cat([nn.functional.linear(part, w) for part, w in zip(rows, weights, strict=True)]), None


def group_experts(model: Any) -> Any:
    """`model` with TEGroupedMLP in place of SequentialMLP, around the same parameters."""
    kind = getattr(megatron_experts, "GroupedMLPSubmodules", None) or megatron_experts.MLPSubmodules
    for layer in [m for m in model.modules() if isinstance(m, MoELayer)]:
        apart = layer.experts.local_experts
        groups = ProcessGroupCollection.use_mpu_process_groups()
        parts = kind(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
        grouped = megatron_experts.TEGroupedMLP(len(apart), layer.config, parts, pg_collection=groups)
        for i, expert in enumerate(apart):
            for name in ("linear_fc1", "linear_fc2"):
                getattr(grouped, name).register_parameter(f"weight{i}", getattr(expert, name).weight)
        layer.experts = grouped
    return model
