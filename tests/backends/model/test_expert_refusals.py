"""What cannot be scored of Megatron's experts is refused by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import te_stand_in
import torch
from distributed import DistributedPool
from gpt_runs import QWEN3, recipe, start

from megatron_opus.config import ConfigError

REFUSED = {
    "moe_expert_capacity_factor": 1.25,
    "moe_token_dispatcher_type": "flex",
    "moe_shared_expert_overlap": True,
    "context_parallel_size": 2,
    "moe_apply_probs_on_input": True,
    "moe_input_jitter_eps": 0.01,
    "moe_latent_size": 16,
    "moe_router_load_balancing_type": "sinkhorn",
    "fp8": "hybrid",
}


@pytest.fixture(scope="module")
def world1() -> Iterator[DistributedPool]:
    pool = DistributedPool(1)
    yield pool
    pool.close()


class GroupedMLP(torch.nn.Module):
    """Of the name of Megatron's legacy layer, whose experts lie in two parameters."""


def model_and_check() -> Any:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    model = dataclasses.replace(QWEN3, num_moe_experts=4, moe_ffn_hidden_size=16)
    engine, _ = start(recipe(model=model, parallel={"engine": "megatron"}))
    layers = [m for m in engine.module.modules() if isinstance(m, MoELayer)]
    assert len(layers) == 2
    return engine.module, layers[1]


def messages() -> dict[str, str]:
    """The refusal of each setting, put on a model's second layer."""
    from megatron_opus.backends.model.scored_layers import megatron_layers

    module, layer = model_and_check()
    assert len(megatron_layers(module)) == 2 * (2 + 1 + 4 * 2)  # attention, router, experts: nothing is refused
    found = {}
    for name, value in REFUSED.items():
        kept = getattr(layer.config, name)
        setattr(layer.config, name, value)
        with pytest.raises(ConfigError) as error:
            megatron_layers(module)
        found[name] = str(error.value)
        setattr(layer.config, name, kept)
    expert = layer.experts.local_experts[1]
    own, expert.linear_fc2 = expert.linear_fc2, torch.nn.Linear(16, 32)
    with pytest.raises(ConfigError) as error:
        megatron_layers(module)
    found["foreign"] = str(error.value)
    expert.linear_fc2 = own
    te_stand_in.group_experts(module)
    grouped = layer.experts
    assert len(megatron_layers(module)) == 2 * (2 + 1 + 4 * 2)
    for name in ("fused", "one weight", "experts"):
        layer.experts = copy.copy(grouped)
        layer.experts._modules = dict(grouped._modules)
        if name == "fused":
            layer.experts._with_fused_impl = True
        elif name == "one weight":  # as moe_single_grouped_weight makes it
            layer.experts.linear_fc2 = te_stand_in.GroupedLinear(4, 16, 32)
        else:
            layer.experts = GroupedMLP()
        with pytest.raises(ConfigError) as error:
            megatron_layers(module)
        found[name] = str(error.value)
    return found


def test_each_is_refused_by_name(world1: DistributedPool) -> None:
    """Guards against scores of tokens that were dropped, padded or sent where nobody can follow them."""
    found = world1.run(messages)[0]
    for name, value in REFUSED.items():
        assert name in found[name]
        assert str(value) in found[name]
    assert "expected SequentialMLP or TEGroupedMLP, got GroupedMLP" in found["experts"]
    assert "Megatron's own linear layers in every expert, got Linear" in found["foreign"]
    assert "use_transformer_engine_op_fuser: expected false" in found["fused"]
    assert "linear_fc2: expected a weight for each of 4 experts, got 0" in found["one weight"]
    assert "moe_single_grouped_weight=False" in found["one weight"]
