"""Combinations of `parallel` keys that an engine cannot run are refused, and say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opus.config import ConfigError, load, validate_world

TINY = Path(__file__).resolve().parents[2] / "configs" / "pretrain_gpt2_tiny.yaml"
M = "parallel.engine=megatron"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.pipeline_model_parallel_size=2"], "expected 1 with parallel.engine deepspeed, got 2"),
        (["parallel.overlap_param_gather=true"], "expected false with parallel.engine deepspeed"),
        ([M, "parallel.pipeline_model_parallel_size=0"], "expected a positive number, got 0"),
        (["optimizer.name=lion"], "optimizer.name: expected one of adamw, muon, sgd, got 'lion'"),
        (["selection.preconditioner.kind=soap"], "expected one of auto, adamw, muon, sgd, got 'soap'"),
        ([M, "optimizer.name=muon"], "layer-wise Muon takes training.precision bf16 alone, got fp32"),
        (
            [M, "optimizer.name=muon", "training.precision=bf16", "selection.preconditioner.kind=adamw"],
            "a second moment that only parallel.engine deepspeed keeps",
        ),
        ([M, "optimizer.muon_tp_mode=whole"], "expected one of blockwise, duplicated, distributed, got 'whole'"),
        ([M, "optimizer.muon_coefficient_type=quadratic"], "did you mean"),
        (
            [M, "optimizer.name=muon", "parallel.use_distributed_optimizer=false", "model.kv_channels=64"],
            "rows of queries in one matrix, got .* set optimizer.muon_split_qkv=false",
        ),
        ([M, "optimizer.muon_num_ns_steps=0"], "muon_num_ns_steps"),
        (["optimizer.muon_tp_mode=duplicated"], "expected blockwise with parallel.engine deepspeed"),
        (["optimizer.muon_nesterov=true"], "expected False with parallel.engine deepspeed"),
        ([M, "optimizer.name=sgd"], "set parallel.use_distributed_optimizer=false"),
        ([M, "parallel.offload_optimizer=cpu"], "expected none with parallel.engine megatron, got cpu"),
        ([M, "parallel.overlap_param_gather=true"], "expected use_distributed_optimizer and overlap_grad_reduce"),
        (
            [M, "parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
            "expected at least 2 pieces on each of at least 3 stages, got 2 on 2",
        ),
        ([M, "parallel.pipeline_model_parallel_size=3"], "expected a multiple of pipeline_model_parallel_size x"),
    ],
)
def test_what_an_engine_cannot_run(overrides: list[str], said: str) -> None:
    """Guards against a key that is silently ignored, or fails deep inside Megatron."""
    with pytest.raises(ConfigError, match=said):
        load(TINY, overrides)


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"],
            6,
            "start a multiple of 4",
        ),
        (
            [
                *("parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"),
                *("model.num_layers=8", "training.micro_batch_size=8"),
            ],
            4,
            "the interleaved schedule takes a multiple of pipeline_model_parallel_size",
        ),
    ],
)
def test_what_does_not_fit_the_processes(overrides: list[str], world: int, said: str) -> None:
    """Guards against ranks without a place, and micro-batches that do not fill the interleaved schedule."""
    with pytest.raises(ConfigError, match=said):
        validate_world(load(TINY, [M, *overrides]), world)


def test_what_fits_is_let_through() -> None:
    """Guards against refusals of layouts that are tested to work."""
    two_by_two = [M, "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"]
    validate_world(load(TINY, two_by_two), 4)
    overlaps = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    validate_world(load(TINY, [M, *overlaps]), 2)
    validate_world(load(TINY, [M, *overlaps, "optimizer.name=muon", "training.precision=bf16"]), 2)
    plain = [M, "optimizer.name=muon", "parallel.use_distributed_optimizer=false", "optimizer.muon_nesterov=true"]
    validate_world(load(TINY, plain), 2)
