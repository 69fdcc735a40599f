"""The one value that names the matrices, against a GPT that megatron-core has really built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from gpt_runs import GPT2, LENGTH, QWEN3

from megatron_opus.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SelectionConfig,
    SketchConfig,
)
from megatron_opus.estimates import flops
from megatron_opus.estimates.memory import estimate
from megatron_opus.layout.model_layout import ModelLayout, model_layout, scored_blocks
from megatron_opus.layout.parallel_layout import ParallelLayout
from megatron_opus.types import Groups

BIASES = {"add_bias_linear": True, "add_qkv_bias": True}
MODELS = {
    "gpt2": GPT2,
    "gpt2 untied": dataclasses.replace(GPT2, untie_embeddings_and_output_weights=True),
    "qwen3": QWEN3,
    "qwen3 tied": dataclasses.replace(QWEN3, untie_embeddings_and_output_weights=False),
    "gated with biases": dataclasses.replace(QWEN3, **BIASES),
}
SELECTIONS = {
    "all": SelectionConfig(),
    "last:1": SelectionConfig(scored_layers="last:1"),
    "every:2": SelectionConfig(scored_layers="every:2"),
    "both ends": SelectionConfig(score_embedding=True, score_output_layer=True),
    "the ends alone": SelectionConfig(scored_layers="none", score_embedding=True, score_output_layer=True),
}


def built(model: ModelConfig, tp: int, selections: dict[str, SelectionConfig]) -> dict[str, Any]:
    """What a GPTModel of this rank says of itself: its parameters, their marks, its layers, and what is scored."""
    from megatron_opus.backends.model.gpt import build_gpt
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.backends.model.scored_layers import built_layout, megatron_layers

    groups = init_parallel(ParallelConfig(tensor_model_parallel_size=tp))
    gpt = build_gpt(model, seq_length=LENGTH)
    layout = model_layout(model, tp_size=tp, positions=LENGTH)
    return {
        "rank": groups.tp_rank,
        "groups": (groups.pp_size, groups.cp_size, groups.ep_size, groups.state is groups.dp, groups.state_size),
        "dp": groups.dp_size,
        "shapes": {n: tuple(p.shape) for n, p in gpt.named_parameters()},
        "marked": {n: (p.tensor_model_parallel, p.partition_dim) for n, p in gpt.named_parameters()},
        "layers": built_layout(gpt),
        "scored": {
            name: [(f"{x.name}.weight", (x.d_out, x.d_in), x.rows, x.cols, x.cut) for x in layers]
            for name, selection in selections.items()
            for layers in [megatron_layers(gpt, layout, selection)]
        },
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_value_is_that_of_the_built_model(world4: Any, name: str, tp: int) -> None:
    """Guards against a parameter that is forgotten, called otherwise, or cut otherwise than megatron-core cuts it.

    The layers of the built model know their own whole sizes; the marks are what the gradient norm goes by.
    """
    layout = model_layout(MODELS[name], tp_size=tp, positions=LENGTH)
    ours = {p.name: dataclasses.replace(p, padding=0) for p in layout.parameters}
    for found in world4.run(built, MODELS[name], tp, SELECTIONS)[:tp]:
        assert found["shapes"] == {n: layout.local_shape(n) for n in ours}
        assert (
            sum(p.size for p in layout.parameters if not p.cut) + sum(p.size // tp for p in layout.parameters if p.cut)
            == layout.local_size()
        )
        assert {p.name: p for p in found["layers"].parameters} == ours
        assert found["layers"].tp_size == tp
        for n, (sharded, dim) in found["marked"].items():
            assert sharded == (tp > 1 and layout[n].cut is not None), n
            # -1: with 0, Megatron's Muon would take a whole position embedding for a shard
            assert dim == {"columns": 1, "rows": 0, None: -1}[layout[n].cut], n
        assert found["groups"] == (1, 1, 1, True, found["dp"])
        for key, selection in SELECTIONS.items():
            expected = {
                p.name: (p.shape, *layout.shard(p.name, found["rank"]), "cols" if p.cut == "columns" else "rows")
                for p in layout.scored(selection)
            }
            # two uses of a tied matrix are two layers of one name
            assert {n: tuple(rest) for n, *rest in found["scored"][key]} == expected, key


def of(model: ModelConfig, selection: SelectionConfig) -> RunConfig:
    return RunConfig(name="x", model=model, data=DataConfig(seq_length=LENGTH), selection=selection)


@pytest.mark.parametrize("key", SELECTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_estimate_counts_the_scored_matrices(name: str, key: str) -> None:
    """Guards against an estimate with a list of matrices of its own: each takes what the value adds for a matrix."""
    model = MODELS[name]
    sketch = SketchConfig(alignment="direction")
    chosen = dataclasses.replace(SELECTIONS[key], sketch=sketch)
    wide = dataclasses.replace(chosen, sketch=dataclasses.replace(sketch, alignment="features"))
    layout = model_layout(model, positions=LENGTH)
    scored = layout.scored(chosen)
    one = ParallelLayout(tp=1, dp=1, zero_stage=0, micro_batch_size=1)
    held = [estimate(of(model, x), one, device="cpu").sketches for x in (chosen, wide)]
    # the proxy's gradient of every scored matrix
    assert held[0] - held[1] == pytest.approx(8.0 * sum(p.size for p in scored), rel=1e-9)
    off = dataclasses.replace(chosen, redundancy=dataclasses.replace(chosen.redundancy, scale="off"))
    _, proxy = flops.sketch_flops(layout, off, 1, "products")
    assert proxy == 2.0 * sum(p.size for p in scored)
    read = flops.step_flops(of(model, chosen)).selection["preconditioner"]
    assert read == 2.0 * sum(p.size for p in scored) / chosen.preconditioner.refresh_every


def test_blocks_are_counted_from_the_last() -> None:
    """Guards against scoring the blocks farthest from the loss, and against numbers that start anew in every stage."""
    assert scored_blocks(range(6), "all") == (0, 1, 2, 3, 4, 5)
    assert scored_blocks(range(6), "last:2") == (4, 5)
    assert scored_blocks(range(6), "none") == ()
    assert scored_blocks(range(6), "every:2") == (5, 3, 1)
    assert scored_blocks((6, 7, 8), "last:1") == (8,)


def test_optimizer_state_is_spread_over_its_own_group() -> None:
    """Guards against preconditioners that are summed over data-parallel ranks which hold the same state twice."""
    assert (Groups(dp_rank=1, dp_size=4).state_rank, Groups(dp_rank=1, dp_size=4).state_size) == (1, 4)
    apart = Groups(dp_rank=1, dp_size=4, cp_size=2, state_rank=3, state_size=8)
    assert (apart.state_rank, apart.state_size, apart.dp_size) == (3, 8, 4)
    assert Groups(dp_rank=1, dp_size=4, state_size=1).state_rank == 0


def test_an_unknown_size_is_refused() -> None:
    """Guards against a position table of no rows, and against shards that leave a remainder out."""
    with pytest.raises(ConfigError, match=r"model\.max_position_embeddings"):
        model_layout(GPT2)
    with pytest.raises(ConfigError, match="3 does not divide this model"):
        model_layout(QWEN3, tp_size=3)
    assert isinstance(model_layout(QWEN3), ModelLayout)
