"""Start a run from weights in files: each rank reads its own part, and all ranks compare what they have read."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_opus.backends.model.stages import named_parameters
from megatron_opus.config import ConfigError, ModelConfig, RunConfig
from megatron_opus.config.dimensions import expert_ffn_size, ffn_size, head_channels, query_groups
from megatron_opus.errors import CheckpointError
from megatron_opus.layout.model_layout import ModelLayout, recipe_layout
from megatron_opus.ranks.agreement import RankMismatch
from megatron_opus.types import Groups
from megatron_opus.weights.sources import (
    WeightsError,
    WeightSource,
    open_weights,
    refuse_unless_equal,
)


def load_initial_weights(model: nn.Module, config: RunConfig, groups: Groups) -> str:
    """Fill this rank's shards of `model` from `config.model.init_from`, and say from what. Collective.

    Call before the engine is made: it copies the weights (masters) or cuts them (ZeRO 3). Raises WeightsError on every
    rank when one rank cannot read its part, when the files are of another model, when a parameter would keep its random
    values, or when a value is NaN or Inf; RankMismatch when ranks that hold the same weights have read different ones.
    """
    said, error, layout = "", "", recipe_layout(config, groups.tp_size)
    digests: dict[str, int] = {}
    try:
        assert config.model.init_from is not None
        source = open_weights(config.model.init_from)
        refuse_other_model(source, config.model)
        digests = _fill(model, source, layout, groups)
        kinds = {str(source.dtype(name)).removeprefix("torch.") for name in digests}
        said = f"initial weights: {source.where} ({', '.join(sorted(kinds))}), {len(digests)} tensors on this rank"
    except (ConfigError, CheckpointError, OSError) as exception:
        error = str(exception)
    _compare(digests, error, layout, groups)
    return said


def refuse_other_model(source: WeightSource, model: ModelConfig) -> None:
    """Raise WeightsError naming every key by which the recipe asks for another function than the weights are of."""

    def shape(m: ModelConfig) -> dict[str, Any]:
        rope = m.position_embedding_type == "rope"
        return {
            "num_layers": m.num_layers,
            "hidden_size": m.hidden_size,
            "num_attention_heads": m.num_attention_heads,
            "num_query_groups": query_groups(m),
            "kv_channels": head_channels(m),
            **({"ffn_hidden_size": ffn_size(m)} if m.num_moe_experts is None else _experts(m)),
            "vocab_size": m.vocab_size,
            "position_embedding_type": m.position_embedding_type,
            "rotary_base": m.rotary_base if rope else None,
            "max_position_embeddings": None if rope else m.max_position_embeddings,
            "normalization": m.normalization,
            "layernorm_epsilon": m.layernorm_epsilon,
            "swiglu": m.swiglu,
            "add_bias_linear": m.add_bias_linear,
            "add_qkv_bias": m.add_qkv_bias or m.add_bias_linear,
            "qk_layernorm": m.qk_layernorm,
            "untie_embeddings_and_output_weights": m.untie_embeddings_and_output_weights,
        }

    theirs, ours = shape(source.model), shape(model)
    faults = [
        f"  model.{key}: expected {theirs.get(key)}, got {ours.get(key)}"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    ]
    if faults:
        raise WeightsError("\n".join([f"model.init_from: {source.where} is another model than the recipe's:", *faults]))


def _experts(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": expert_ffn_size(model),
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
    }


@torch.no_grad()
def _fill(model: nn.Module, source: WeightSource, layout: ModelLayout, groups: Groups) -> dict[str, int]:
    """Copy the weights that this rank and stage hold, and give a checksum of what was read of every parameter."""
    parameters = dict(named_parameters(model))
    whole = groups.pp_size == 1  # a stage has its own layers alone
    held = layout.held_by(groups.ep_rank)
    expected = {p.name: layout.local_shape(p.name) for p in held if whole or p.name in parameters}
    refuse_unless_equal(expected, {n: tuple(p.shape) for n, p in parameters.items()}, "the model as it was built")
    digests = {}
    for name, parameter in parameters.items():
        value = source.read(name, *layout.shard(name, groups.tp_rank)).contiguous()
        if not torch.isfinite(value).all():
            raise WeightsError(f"{source.where}: {name} holds NaN or Inf")
        parameter.copy_(value)
        digests[name] = zlib.crc32(value.flatten().view(torch.uint8).numpy().data)
    return digests


def _compare(digests: dict[str, int], error: str, layout: ModelLayout, groups: Groups) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (groups.tp_rank, error, digests))
    errors = dict.fromkeys(e for _, e, _ in everyone if e)
    if errors:
        raise WeightsError("\n".join(errors))
    first: dict[tuple[str, int], tuple[int, int]] = {}
    for rank, (tp_rank, _, theirs) in enumerate(everyone):
        for name, digest in theirs.items():
            same = first.setdefault((name, tp_rank if layout[name].cut else 0), (rank, digest))
            if same[1] != digest:
                raise RankMismatch(
                    f"initial weights: rank {rank} has read another {name} than rank {same[0]}; every process must see "
                    "the same files"
                )
