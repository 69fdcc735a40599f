"""What the estimate says that a rank of a pipeline stage holds, against ranks that hold it."""

from __future__ import annotations

import dataclasses

import pytest
from gpt_runs import GPT2, QWEN3, recipe

from megatron_opus.config import ConfigError
from megatron_opus.estimates.memory import estimate
from megatron_opus.estimates.schedule import in_flight
from megatron_opus.layout.model_layout import model_layout
from megatron_opus.layout.parallel_layout import ParallelLayout, parallel_layout

MODELS = {
    "tied": dataclasses.replace(GPT2, num_layers=8, hidden_size=64, vocab_size=1000),
    "untied": dataclasses.replace(QWEN3, num_layers=8, hidden_size=64, vocab_size=1000),
}


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
