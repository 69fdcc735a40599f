"""Transformer Engine's linear layers, recognised by what they are: `parallel_mode` and a weight that is cut.

    TEColumnParallelLinear            parallel_mode column   a: its input
    TERowParallelLinear               parallel_mode row      a: its input
    TELayerNormColumnParallelLinear   parallel_mode column   a: its input, normalised with the layer's own weights
    TEGroupedLinear                   weight0, weight1, ..   a: the rows of its input that are one expert's (experts.py)

The last one normalises inside of itself, so that a hook sees the input before it. The norm is one pass over the input
and is computed once more; under sequence parallelism each rank normalises its own tokens.

Nothing here imports Transformer Engine. Its layers are modules with a weight [out / tp, in] or [out, in / tp].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_opus.config import ConfigError

Mode = Literal["column", "row"]


def parallel_mode(module: nn.Module) -> Mode | None:
    """Tell how a linear layer of Transformer Engine is cut; None for every other module, and for one that is whole."""
    mode = getattr(module, "parallel_mode", None)
    weight = module._parameters.get("weight")
    if mode not in ("column", "row") or weight is None or weight.dim() != 2 or not hasattr(module, "in_features"):
        return None
    found: Mode = mode
    return found


def grouped_weights(module: Any) -> list[nn.Parameter]:
    """Return the weight of each expert [out, in] in a grouped linear layer of Transformer Engine; else nothing."""
    if not hasattr(module, "num_gemms"):
        return []
    found = [module._parameters.get(f"weight{i}") for i in range(int(module.num_gemms))]
    return [weight for weight in found if weight is not None]


def input_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return what makes a layer's a out of what the module is given; None where it is that itself."""
    return functools.partial(_normalised, module) if hasattr(module, "layer_norm_weight") else None


def _normalised(module: Any, x: Tensor) -> Tensor:
    weight = module.layer_norm_weight.detach().float()
    if module.zero_centered_gamma:
        weight = weight + 1.0
    shape = x.shape[-1:]
    with torch.autocast(x.device.type, enabled=False):
        if module.normalization == "RMSNorm":
            y = nn.functional.rms_norm(x.float(), shape, weight, module.eps)
        else:
            bias = getattr(module, "layer_norm_bias", None)
            bias = None if bias is None else bias.detach().float()
            y = nn.functional.layer_norm(x.float(), shape, weight, bias, module.eps)
    return y.to(x.dtype)


def check(config: Any, modules: Iterable[nn.Module]) -> None:
    """Raise ConfigError, by name, for what hides factors from hooks or would be disturbed by a pass."""
    graphs = getattr(config, "cuda_graph_impl", "none") not in ("none", None)
    graphs |= bool(getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False))
    fused = sorted({type(m).__name__ for m in modules if type(m).__name__.startswith("TEFusedMLP")})
    wrong = (
        ("CUDA graphs", graphs, "none: a graph runs no hooks; set cuda_graph_impl=none"),
        (", ".join(fused), bool(fused), "an MLP of separate layers: set use_transformer_engine_op_fuser=False"),
        ("delay_wgrad_compute", bool(getattr(config, "delay_wgrad_compute", False)), "false"),
        (
            "overlap_dispatch_backward_with_experts_wgrad",
            bool(getattr(config, "overlap_dispatch_backward_with_experts_wgrad", False)),
            "false",
        ),
        ("tp_comm_overlap", bool(config.tp_comm_overlap), "false: its buffers have the length of training sequences"),
        (
            "fp8_recipe delayed",
            bool(config.fp8) and str(getattr(config, "fp8_recipe", "delayed")) == "delayed",
            "a recipe without history (tensorwise, blockwise): a pass would enter its activations into it",
        ),
    )
    for name, refused, expected in wrong:
        if refused:
            raise ConfigError(f"Transformer Engine layers: {name}: expected {expected}")
