"""Experts of Hugging Face's Mixtral and Qwen3-MoE, whose weights lie in two parameters of three dimensions.

    gate_up_proj [E, 2 f, h], down_proj [E, h, f]    expert e: W2 (act(gate) * up), (gate, up) = W1 x

No module stands for one expert, so that a forward hook sees none of the products. While a pass looks, the layer's
forward is computed here by the same formula, in which every product goes through a module of its own. `score` compares
what is seen with the gradients of the model's own forward, as for every other layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.types import ScoredLayer

KINDS = ("MixtralExperts", "Qwen3MoeExperts")
ROUTERS = ("MixtralTopKRouter", "Qwen3MoeTopKRouter")  # they call nothing, but return (logits, ...)
MATRICES = ("gate_up_proj", "down_proj")


class Product(nn.Module):
    """Stands for y = x W^T of one expert."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class OwnForward:
    """Computes one layer of experts where a pass can see it, and knows which rows each expert got (see `Routing`)."""

    def __init__(self, experts: Any) -> None:
        self._experts = experts
        self.products = {name: [Product() for _ in range(experts.num_experts)] for name in MATRICES}
        self._rows: dict[int, Tensor] = {}
        self._load = torch.zeros(0, 0)

    @contextlib.contextmanager
    def observed(self, sequences: int, share: int) -> Iterator[None]:
        experts = self._experts

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            length = len(hidden_states) // sequences
            out = torch.zeros_like(hidden_states)
            load = torch.zeros(sequences, experts.num_experts, device=out.device)
            for e in range(experts.num_experts):
                place, token = torch.where((top_k_index == e).T)
                self._rows[e] = share * sequences + token // length
                load[:, e] = torch.bincount(token // length, minlength=sequences)
                if not len(token):
                    continue  # as in the model, which calls no expert without tokens
                x = hidden_states[token]
                up = self.products["gate_up_proj"][e](x, nn.functional.linear(x, experts.gate_up_proj[e]))
                gate, up = up.chunk(2, dim=-1)
                inner = experts.act_fn(gate) * up
                y = self.products["down_proj"][e](inner, nn.functional.linear(inner, experts.down_proj[e]))
                out = out.index_add(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
            self._load = load
            return out

        own = vars(experts).get("forward")
        experts.forward = forward
        try:
            yield
        finally:
            del experts.forward
            if own is not None:
                experts.forward = own

    def sequences(self, expert: int) -> Tensor:
        return self._rows[expert]

    def load(self) -> Tensor:
        return self._load


def is_experts(module: nn.Module) -> bool:
    return _is_one_of(module, KINDS)


def is_router(module: nn.Module) -> bool:
    return _is_one_of(module, ROUTERS)


def _is_one_of(module: nn.Module, names: tuple[str, ...]) -> bool:
    """True for a class of transformers of one of these names; it is not imported."""
    return any(c.__name__ in names and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def scored(name: str, module: Any) -> list[ScoredLayer]:
    """List the trainable matrices of every expert of one layer."""
    routing = OwnForward(module)
    layers = []
    for matrix in MATRICES:
        weight = getattr(module, matrix)
        if not weight.requires_grad:
            continue
        count, rows, columns = local_shape(weight)
        layers += [
            ScoredLayer(
                name=f"{name}.{e}.{matrix}",
                module=routing.products[matrix][e],
                weight=weight,
                part=e,
                d_out=rows,
                d_in=columns,
                rows=((0, rows),),
                cols=((0, columns),),
                sequence_first=False,
                routing=routing,
                expert=e,
                slot=name,
            )
            for e in range(count)
        ]
    return layers
