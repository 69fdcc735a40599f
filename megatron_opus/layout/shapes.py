"""Names and whole shapes of a model's parameters, from the configuration alone."""

from __future__ import annotations

from megatron_opus.config import ConfigError, ModelConfig
from megatron_opus.layout.sharding import (
    ffn_size,
    head_channels,
    is_column_cut,
    is_sharded,
    padded_vocab_size,
    query_groups,
)


def parameter_shapes(config: ModelConfig, *, padded: bool, positions: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter, from the configuration alone.

    padded: the vocabulary as it is stored, else as it is published. positions: rows of the learned position embedding
    where `max_position_embeddings` is not set.
    """
    h, f, c = config.hidden_size, ffn_size(config), head_channels(config)
    heads, groups = config.num_attention_heads, query_groups(config)
    vocabulary = padded_vocab_size(config) if padded or config.vocab_size is None else config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocabulary, h)}
    if config.position_embedding_type == "learned_absolute":
        rows = config.max_position_embeddings or positions
        if rows is None:
            raise ConfigError("model.max_position_embeddings: expected a number, got null")
        shapes["embedding.position_embeddings.weight"] = (rows, h)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = (width,)
        if config.normalization == "LayerNorm":
            shapes[f"{name}.bias"] = (width,)

    def linear(name: str, d_out: int, d_in: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (d_out, d_in)
        if bias:
            shapes[f"{name}.bias"] = (d_out,)

    for i in range(config.num_layers):
        layer = f"decoder.layers.{i}"
        norm(f"{layer}.input_layernorm", h)
        linear(f"{layer}.self_attention.linear_proj", h, heads * c, config.add_bias_linear)
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        linear(f"{layer}.self_attention.linear_qkv", (heads + 2 * groups) * c, h, qkv_bias)
        if config.qk_layernorm:
            norm(f"{layer}.self_attention.q_layernorm", c)
            norm(f"{layer}.self_attention.k_layernorm", c)
        norm(f"{layer}.pre_mlp_layernorm", h)
        linear(f"{layer}.mlp.linear_fc1", (2 if config.swiglu else 1) * f, h, config.add_bias_linear)
        linear(f"{layer}.mlp.linear_fc2", h, f, config.add_bias_linear)
    norm("decoder.final_layernorm", h)
    if config.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocabulary, h)
    return shapes


def count_parameters(config: ModelConfig, *, padded: bool = False, tp_size: int = 1) -> int:
    """Parameters of the model; with `tp_size`, those that one tensor-parallel rank holds."""
    total = 0
    for name, shape in parameter_shapes(config, padded=padded).items():
        size = 1
        for n in shape:
            size *= n
        total += size // tp_size if is_sharded(name) or is_column_cut(name) else size
    return total
