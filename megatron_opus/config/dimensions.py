"""Sizes that a ModelConfig leaves to its defaults, and the tensor-parallel degrees that they allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_opus.config.schema import ConfigError

if TYPE_CHECKING:
    from megatron_opus.config.recipe import ModelConfig


def head_channels(config: ModelConfig) -> int:
    """Give the channels of one attention head."""
    return config.kv_channels or config.hidden_size // config.num_attention_heads


def query_groups(config: ModelConfig) -> int:
    """Give the number of key/value heads: that of the attention heads without grouped-query attention."""
    return config.num_query_groups or config.num_attention_heads


def ffn_size(config: ModelConfig) -> int:
    """Give the inner width of the feed-forward layers (of each half, with SwiGLU)."""
    return config.ffn_hidden_size or 4 * config.hidden_size


def expert_ffn_size(config: ModelConfig) -> int:
    """Give the inner width of each expert (of each half, with SwiGLU)."""
    return config.moe_ffn_hidden_size or ffn_size(config)


def padded_vocab_size(config: ModelConfig) -> int:
    """Round `vocab_size` up to the rows of the embedding, the same at every tensor-parallel degree (50257 -> 50304).

    Raises ConfigError when the size is not known yet.
    """
    if config.vocab_size is None:
        raise ConfigError(
            "model.vocab_size: expected a number, got null; fill it in from the tokenizer "
            "(dataclasses.replace(config, vocab_size=...)) before the model is described or built"
        )
    multiple = config.make_vocab_size_divisible_by
    return -(-config.vocab_size // multiple) * multiple


def sizes_to_divide(config: ModelConfig) -> dict[str, int]:
    """List the sizes, by their keys, that a tensor-parallel degree must divide."""
    mlp = {"model.ffn_hidden_size": ffn_size(config)}
    if config.num_moe_experts is not None:  # experts stay whole
        shared = config.moe_shared_expert_intermediate_size
        mlp = {} if shared is None else {"model.moe_shared_expert_intermediate_size": shared}
    return {
        "model.num_attention_heads": config.num_attention_heads,
        "model.num_query_groups": query_groups(config),
        **mlp,
        "model.make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
    }


def tensor_parallel_degrees(config: ModelConfig) -> list[int]:
    """List every tensor-parallel degree by which the model can be divided."""
    sizes = sizes_to_divide(config).values()
    return [t for t in range(1, min(sizes) + 1) if all(size % t == 0 for size in sizes)]


def check_tensor_parallel(config: ModelConfig, tp_size: int) -> None:
    """Raise ConfigError, naming the degrees that are possible, when the model cannot be divided by `tp_size`."""
    if tp_size not in (possible := tensor_parallel_degrees(config)):
        sizes = ", ".join(f"{key.removeprefix('model.')} {size}" for key, size in sizes_to_divide(config).items())
        raise ConfigError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide this model ({sizes}); "
            f"possible: {', '.join(map(str, possible))}"
        )
