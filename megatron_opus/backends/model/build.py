"""The model of a recipe: built, counted, and checked against the recipe's other sections."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from megatron_opus.backends.model.gpt import build_gpt
from megatron_opus.config import ConfigError, RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(config: RunConfig, vocab_size: int) -> RunConfig:
    """`config` with the model's open fields filled in from the tokenizer and the data section.

    Raises ConfigError when the recipe names a smaller vocabulary than the tokenizer has, or asks for positions that
    the model cannot give.
    """
    m, d = config.model, config.data
    if m.vocab_size is not None and m.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: expected at least the tokenizer's {vocab_size} tokens, got {m.vocab_size}; "
            "leave it out to take the tokenizer's"
        )
    if m.position_embedding_type == "rope" and d.reset_position_ids and not d.reset_attention_mask:
        # Rotary angles enter as differences: within a document they are the same whether positions restart or not.
        # Only attention across documents could tell, and Megatron's rotary embedding takes no position ids.
        raise ConfigError(
            "data.reset_position_ids: rotary positions can restart only where documents do not attend to each other; "
            "set data.reset_attention_mask=true as well, or data.reset_position_ids=false"
        )
    model = dataclasses.replace(
        m,
        vocab_size=m.vocab_size or vocab_size,
        max_position_embeddings=m.max_position_embeddings or d.seq_length,
    )
    return dataclasses.replace(config, model=model)


def build_model(config: RunConfig) -> nn.Module:
    """The GPTModel of this rank with the recipe's initial weights. Call `init_parallel` first; see `build_gpt`."""
    return build_gpt(
        config.model,
        seq_length=config.data.seq_length,
        params_dtype=DTYPES[config.training.precision],
        seed=config.seed,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.training.recompute,
        dispatcher=config.parallel.moe_token_dispatcher_type,
        sums_gradients=config.parallel.engine == "deepspeed",
    )
