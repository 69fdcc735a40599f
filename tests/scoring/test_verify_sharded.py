"""The comparison with autograd on sharded Megatron models: every rank compares its own shards."""

from __future__ import annotations

from typing import Any

import pytest
from gpt_runs import GPT2, QWEN3
from small_models import random_batch

import megatron_opus
from megatron_opus.config import ModelConfig, ParallelConfig, SelectionConfig

LENGTH = 16


def of_rank(model_config: ModelConfig, sp: bool, fault: bool, tied: bool) -> str:
    """Score once; what was compared, or the error. `fault`: rank 1's shard of one layer computes something else."""
    import torch

    from megatron_opus.backends.model.gpt import build_gpt
    from megatron_opus.backends.model.parallel import init_parallel

    groups = init_parallel(ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sp))
    model = build_gpt(model_config, seq_length=LENGTH, seed=3, sequence_parallel=sp)
    if fault and groups.tp_rank == 1:
        layer = model.decoder.layers[1].mlp.linear_fc1
        inner = layer.forward
        layer.forward = lambda x, *args, **kwargs: (1.01 * inner(x, *args, **kwargs)[0], None)
    config = SelectionConfig(score_embedding=tied, score_output_layer=tied)
    scorer = megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    try:
        scorer(random_batch(4, LENGTH, seed=1), random_batch(2, LENGTH, seed=2))
    except megatron_opus.scoring.verify.VerificationError as error:
        return f"error: {error}"
    return scorer.verified


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_shards_pass_on_every_rank(world2: Any, name: str, sp: bool) -> None:
    """Guards against sides that ranks do not agree on (tokens scattered by sequence parallelism are gathered after
    the projection), and against the shards of a vocabulary or of SwiGLU taken for whole ones."""
    model = {"gpt2": GPT2, "qwen3": QWEN3}[name]
    for verified in world2.run(of_rank, model, sp, False, True):
        assert "compared with autograd" in verified


@pytest.mark.parametrize("sp", [False, True])
def test_a_fault_on_one_rank_stops_all(world2: Any, sp: bool) -> None:
    """Guards against a rank that raises alone while the others wait for it, and a difference of one per cent that
    nobody sees."""
    first, second = world2.run(of_rank, GPT2, sp, True, False)
    assert first.startswith("error: another rank")
    assert second.startswith("error: layer decoder.layers.1.mlp.linear_fc1")
    assert "0.9901 times" in second
