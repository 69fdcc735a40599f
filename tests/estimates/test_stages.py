"""What the estimate says that a rank of a pipeline stage holds, against ranks that hold it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from gpt_runs import GPT2, QWEN3, recipe, start, steps

from megatron_opus.config import ConfigError
from megatron_opus.estimates.memory import estimate, stage_estimates
from megatron_opus.estimates.schedule import in_flight
from megatron_opus.layout.model_layout import model_layout
from megatron_opus.layout.parallel_layout import ParallelLayout, parallel_layout

MODELS = {
    "tied": dataclasses.replace(GPT2, num_layers=8, hidden_size=64, vocab_size=1000),
    "untied": dataclasses.replace(QWEN3, num_layers=8, hidden_size=64, vocab_size=1000),
}
PIPELINES = {
    "pp 2 x dp 2": {"pipeline_model_parallel_size": 2},
    "pp 4 in 2 pieces": {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
    "tp 2 x pp 2": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
}


def held(arguments: dict[str, Any]) -> tuple[int, float, float, float]:
    """(stage, bytes of weights, of gradient buffers, of optimizer state with its masters) of this rank after a step."""
    config = recipe(**arguments)
    engine, groups = start(config)
    steps(engine, groups, 0, 1, config.training.micro_batch_size)
    weights = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    buffers = [b for d in engine._wrapped for b in [*d.buffers, *d.expert_parallel_buffers]]
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    optimizers = [part.optimizer for part in engine._optimizer.chained_optimizers]
    state = [x for o in optimizers for kept in o.state.values() for x in kept.values() if getattr(x, "dim", int)()]
    if config.training.precision == "bf16":
        state += [p for o in optimizers for group in o.param_groups for p in group["params"]]
    return groups.pp_rank, weights, gradients, sum(x.numel() * x.element_size() for x in state)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_holds_what_its_stage_is_said_to_hold(
    world4: Any, model: str, pipeline: str, distributed: bool, precision: str
) -> None:
    """Guards against the whole model on every rank, tied embeddings on one stage only, masters forgotten in bf16, and a
    distributed optimizer taken for a replicated one. What fills Megatron's buffers up to whole shards is left out."""
    layout = {**PIPELINES[pipeline], "use_distributed_optimizer": distributed, "engine": "megatron"}
    tp = layout.pop("tensor_model_parallel_size", 1)
    arguments = {"model": MODELS[model], "parallel": layout, "precision": precision, "tp": tp}
    config = recipe(**arguments)
    said = stage_estimates(config, parallel_layout(config, 4), device="cpu")
    for stage, weights, gradients, optimizer in world4.run(held, arguments):
        assert weights == said[stage].weights
        assert gradients == pytest.approx(said[stage].gradients_kept, rel=0.02)
        assert optimizer == pytest.approx(said[stage].optimizer, rel=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_stages_hold_the_model(model: str) -> None:
    """Guards against a layer that no stage holds, or two: only a tied embedding stands on the first and the last."""
    whole = model_layout(MODELS[model], positions=64)
    for stages, pieces in ((2, 1), (4, 1), (4, 2)):
        held = [x.name for n in range(stages) for x in whole.stage(n, stages, pieces).parameters]
        twice = {x for x in held if held.count(x) > 1}
        assert set(held) == {x.name for x in whole.parameters}
        assert twice == ({whole.output.name} if model == "tied" else set())
    with pytest.raises(ConfigError, match="multiple of 3 stages"):
        whole.stage(0, 3)


@pytest.mark.parametrize(
    ("pp", "pieces", "micro_batches", "expected"),
    [
        (1, 1, 8, [1.0]),
        (4, 1, 8, [4.0, 3.0, 2.0, 1.0]),
        (4, 1, 2, [2.0, 2.0, 2.0, 1.0]),  # no more than there are
        (4, 2, 8, [5.5, 4.5, 3.5, 2.5]),  # 2 (4 - s - 1) + (2 - 1) 4 + 1 passes through halves
    ],
)
def test_micro_batches_in_flight(pp: int, pieces: int, micro_batches: int, expected: list[float]) -> None:
    """Guards against activations of one micro-batch where the schedule keeps several."""
    layout = ParallelLayout(tp=1, dp=1, micro_batch_size=1, zero_stage=0, engine="megatron", pp=pp, pieces=pieces)
    assert [in_flight(layout, stage, micro_batches) for stage in range(pp)] == expected


def test_stages_need_less_than_the_whole_model() -> None:
    """Guards against a pipeline that changes nothing in what is refused, and names the fullest stage."""
    needs = []
    for stages in (1, 2, 4):
        parallel = {"engine": "megatron", "pipeline_model_parallel_size": stages}
        config = recipe(model=MODELS["untied"], parallel=parallel)
        needs.append(estimate(config, parallel_layout(config, 4), device="cuda"))
    assert needs[0].weights > needs[1].weights > needs[2].weights
    assert needs[0].stage == ""
    assert needs[2].stage.startswith("pipeline stage 3 of 4") or needs[2].stage.startswith("pipeline stage 0 of 4")
