"""Pipeline stages and Megatron's state by arithmetic, against engines that megatron-core has really built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from gpt_runs import GPT2, QWEN3, K, recipe, start, steps
from megatron_muon import needs_muon

from megatron_opus.config import RunConfig
from megatron_opus.estimates.memory import estimate
from megatron_opus.estimates.schedule import in_flight
from megatron_opus.estimates.states import state_bytes
from megatron_opus.layout.model_layout import recipe_layout
from megatron_opus.layout.parallel_layout import parallel_layout

SIZES: dict[str, Any] = {"num_layers": 8, "hidden_size": 64, "kv_channels": 16}
MODELS = {
    "gpt2": dataclasses.replace(GPT2, **SIZES),  # a tied weight, on the first stage and on the last
    "qwen3": dataclasses.replace(QWEN3, **SIZES, ffn_hidden_size=128),
    "experts": dataclasses.replace(
        QWEN3, **SIZES, num_moe_experts=4, moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=64
    ),
}


def case(model: str, world: int, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    chosen = {key: more.pop(key) for key in ("optimizer", "tp", "sp") if key in more}
    return {"world": world, "model": model, "precision": precision, **chosen, "parallel": more}


PP2 = {"pipeline_model_parallel_size": 2}
CASES = {
    "DP 2, distributed": case("gpt2", 2),
    "PP 2, replicated": case("gpt2", 2, use_distributed_optimizer=False, **PP2),
    "PP 2, replicated, bf16": case("qwen3", 2, "bf16", use_distributed_optimizer=False, **PP2),
    "PP 2, SGD": case("qwen3", 2, optimizer="sgd", use_distributed_optimizer=False, **PP2),
    "PP 2 x DP 2, distributed": case("qwen3", 4, **PP2),
    "PP 2 x DP 2, distributed, bf16": case("gpt2", 4, "bf16", **PP2),
    "TP 2 x PP 2, SP, bf16": case("qwen3", 4, "bf16", tp=2, sp=True, **PP2),
    "PP 2 x EP 2": case("experts", 4, expert_model_parallel_size=2, **PP2),
    "PP 2 x DP 2, experts, bf16": case("experts", 4, "bf16", **PP2),
    "PP 4": case("gpt2", 4, pipeline_model_parallel_size=4),
    "PP 4, interleaved": case(
        "gpt2", 4, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2, overlap_grad_reduce=True
    ),
}


def config_of(found: dict[str, Any]) -> RunConfig:
    more = {key: value for key, value in found.items() if key not in ("world", "model", "parallel")}
    parallel = {"engine": "megatron", **found["parallel"]}
    return recipe(model=MODELS[found["model"]], micro_batch_size=1, parallel=parallel, **more)


def held(found: dict[str, Any]) -> dict[str, Any]:
    """What a rank has after one step: its parameters, the bytes of their state, and its fullest moment in the step."""
    from megatron_opus.backends.engines.megatron.muon import leaves
    from megatron_opus.backends.model import stages

    engine, groups = start(config_of(found))
    now, most = [0], [0]

    def count(module: Any, arguments: Any, output: Any) -> None:
        if output.requires_grad:
            now[0] += 1
            most[0] = max(most[0], now[0])
            output.register_hook(lambda gradient: now.__setitem__(0, now[0] - 1))

    for piece in stages.pieces(engine.module):
        piece.register_forward_hook(count)
    steps(engine, groups, 0, 1, 1)
    named = dict(stages.named_parameters(engine.module))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in named.values()}
    optimizer = 0
    for part, _ in leaves(engine._optimizer):
        for key in (p for group in part.optimizer.param_groups for p in group["params"]):
            kept = [x for x in part.optimizer.state[key].values() if getattr(x, "ndim", 0)]
            masters = [] if key.untyped_storage().data_ptr() in storages else [key]
            optimizer += sum(x.nbytes for x in (*kept, *masters))
    buffers = [b for wrapped in engine._wrapped for b in (*wrapped.buffers, *wrapped.expert_parallel_buffers)]
    return {
        "stage": groups.pp_rank,
        "shapes": {name: tuple(p.shape) for name, p in named.items()},
        "weights": sum(storages.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": optimizer,
        "in flight": most[0],
    }


@pytest.mark.parametrize("name", CASES)
def test_a_stage_holds_what_its_rank_holds(world2: Any, world4: Any, name: str) -> None:
    """Guards against a whole model counted on every stage, a tied embedding forgotten on the last one, masters of
    weights that are float32 already, experts split like other weights, and activations of one micro-batch where a
    schedule keeps several."""
    found = CASES[name]
    config = config_of(found)
    layout = parallel_layout(config, found["world"])
    whole = recipe_layout(config)
    for rank in (world2 if found["world"] == 2 else world4).run(held, found):
        model = whole.stage(rank["stage"], layout.pp, layout.pieces)
        # the names of experts depend on the expert-parallel rank: their number and shapes do not
        if layout.ep == 1:
            assert rank["shapes"] == {p.name: model.local_shape(p.name) for p in model.parameters}
        else:
            assert sorted(rank["shapes"].values()) == sorted(model.local_shape(p.name) for p in model.held_by(0))
        counted = state_bytes(config, model, layout, "cpu")
        # buffers of the distributed optimizer are filled up to shards of equal size: at most 1% of these models
        assert rank["weights"] == pytest.approx(counted.weights, rel=0.01)
        assert rank["gradients"] == pytest.approx(counted.kept, rel=0.01)
        assert rank["optimizer"] == pytest.approx(counted.optimizer, rel=0.03)
        kept = in_flight(layout, rank["stage"], K // layout.dp)
        assert rank["in flight"] == kept * layout.pieces


MUON_CASES = {
    "PP 2, replicated": case("gpt2", 2, optimizer="muon", use_distributed_optimizer=False, **PP2),
    "PP 2 x DP 2, layer-wise": case("qwen3", 4, "bf16", optimizer="muon", **PP2),
    "DP 4, layer-wise": case("gpt2", 4, "bf16", optimizer="muon"),
}


@needs_muon
@pytest.mark.parametrize("name", MUON_CASES)
def test_megatrons_muon_fits_what_is_counted(world2: Any, world4: Any, name: str) -> None:
    """Guards against Muon's one momentum counted as AdamW's two moments, a position embedding taken for AdamW's, and a
    layer-wise optimizer whose whole matrices do not fit a share of all of them."""
    found = MUON_CASES[name]
    config = config_of(found)
    layout = parallel_layout(config, found["world"])
    whole = recipe_layout(config)
    for rank in (world2 if found["world"] == 2 else world4).run(held, found):
        counted = state_bytes(config, whole.stage(rank["stage"], layout.pp, layout.pieces), layout, "cpu")
        assert rank["weights"] == pytest.approx(counted.weights, rel=0.01)
        assert rank["gradients"] == pytest.approx(counted.kept, rel=0.01)
        # the fullest rank is taken to have one matrix more than its share: a seventh of what these small stages have
        least = 1.0 if name.endswith("replicated") else 0.8
        assert least <= rank["optimizer"] / counted.optimizer <= 1.0


def test_whole_matrices_have_larger_multipliers() -> None:
    """Guards against a too small estimate where Muon orthogonalises all tensor-parallel ranks' matrices as one."""
    layouts = []
    for mode in ("blockwise", "duplicated"):
        found = config_of(case("qwen3", 4, "bf16", optimizer="muon", tp=2, **PP2))
        found = dataclasses.replace(found, optimizer=dataclasses.replace(found.optimizer, muon_tp_mode=mode))
        layouts.append(estimate(found, parallel_layout(found, 4), device="cuda").sketches)
    assert layouts[1] > layouts[0]
