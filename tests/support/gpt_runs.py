"""Small Megatron GPTs under DeepSpeed for the distributed tests: a recipe, its batches, an engine, a few steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch

from megatron_opus.config import (
    DataConfig,
    Geometry,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreconditionerConfig,
    RunConfig,
    SelectionConfig,
    TrainingConfig,
)
from megatron_opus.types import Batch, Groups

LENGTH, VOCAB, K = 16, 96, 8
GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=VOCAB - 5, make_vocab_size_divisible_by=32
)
QWEN3 = dataclasses.replace(
    GPT2,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    ffn_hidden_size=48,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=False,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=True,
)


def recipe(
    *,
    tp: int = 1,
    zero: int = 1,
    precision: str = "fp32",
    sp: bool = False,
    model: ModelConfig = GPT2,
    micro_batch_size: int = 2,
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw",
    offload: Literal["none", "cpu"] = "none",
    kind: Geometry = "auto",
    parallel: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    return RunConfig(
        name="test",
        seed=7,
        model=model,
        data=DataConfig(seq_length=LENGTH),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            zero_stage=zero,
            sequence_parallel=sp,
            offload_optimizer=offload,
            **(parallel or {}),
        ),
        optimizer=OptimizerConfig(
            name=optimizer, lr=1e-2, muon_lr=2e-2, min_lr=1e-3, lr_warmup_steps=2, weight_decay=0.1, sgd_momentum=0.9
        ),
        training=TrainingConfig(
            **{
                "global_batch_size": K,
                "micro_batch_size": micro_batch_size,
                "train_steps": 20,
                "precision": precision,
                "gradient_clipping": 0.5,
                **training,
            }
        ),
        selection=SelectionConfig(preconditioner=PreconditionerConfig(kind=kind)),
    )


def newton_schulz(dtype: torch.dtype | None) -> torch.dtype:
    """The precision of DeepSpeed's Newton-Schulz steps in this process from now on; None: its own choice. Returns it.

    DeepSpeed takes float16 where the hardware has it: its rounding, 3e-3 of an update, would hide what is compared.
    """
    from megatron_opus.backends.engines.deepspeed import muon

    kernels = muon.kernels()
    own = getattr(kernels, "_own_ns_compute_dtype", kernels.ns_compute_dtype)
    kernels._own_ns_compute_dtype = own  # type: ignore[attr-defined]
    kernels.ns_compute_dtype = own if dtype is None else lambda ns_method="gram": dtype  # type: ignore[attr-defined]
    return kernels.ns_compute_dtype("gram")


def batch_of_step(step: int, size: int = K, length: int = LENGTH) -> Batch:
    """`size` sequences with masks of different lengths, so that token and sequence means differ."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB - 5, (size, length + 1), generator=generator)
    mask = torch.ones(size, length)
    for row in range(size):
        mask[row, : (3 * row) % (length // 2)] = 0.0
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=mask,
        position_ids=torch.arange(length).expand(size, length),
    )


def share_of_rank(batch: Batch, groups: Groups, micro_batch_size: int) -> Iterator[Batch]:
    share = len(batch) // groups.dp_size
    first = groups.dp_rank * share
    return iter([batch.rows(i, i + micro_batch_size) for i in range(first, first + share, micro_batch_size)])


def start(config: RunConfig) -> tuple[Any, Groups]:
    """Engine and groups on a rank of a test pool."""
    from megatron_opus.backends.engines.build import build_engine
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.parallel import init_parallel

    init_distributed(config.parallel)
    groups = init_parallel(config.parallel, seed=config.seed)
    engine = build_engine(build_model(config), config, groups)
    return engine, groups


def steps(engine: Any, groups: Groups, first: int, last: int, micro_batch_size: int = 2) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps first..last-1."""

    results = []
    for step in range(first, last):
        result = engine.train_step(share_of_rank(batch_of_step(step), groups, micro_batch_size))
        assert not result.skipped
        results.append((result.loss, result.grad_norm))
    return results
