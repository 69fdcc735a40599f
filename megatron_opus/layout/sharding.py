"""Where a tensor-parallel rank's piece of each parameter lies in the whole one. Pure functions of the configuration.

Whole parameters (h hidden, f feed-forward, n heads, g query groups, c channels per head, V padded vocabulary):

parameter                     whole                      piece of rank r of t
linear_qkv.weight             [g * (n/g + 2) * c, h]     rows, contiguous: query groups of (queries.., key, value)
linear_proj.weight            [h, n * c]                 columns, contiguous
linear_fc1.weight             [f, h]                     rows, contiguous
linear_fc1.weight (SwiGLU)    [2f, h] = cat(gate, up)    cat(gate_r, up_r): two ranges of rows
linear_fc2.weight             [h, f]                     columns, contiguous
word_embeddings, output_layer [V, h]                     rows, contiguous
biases of qkv and fc1         as the rows of the weight  as the rows of the weight
everything else               whole on every rank        replicated
"""

from __future__ import annotations

from megatron_opus.config import ConfigError, ModelConfig
from megatron_opus.types import Ranges

_ROWS = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")
_COLUMNS = ("linear_proj", "linear_fc2")


def head_channels(config: ModelConfig) -> int:
    """Channels of one attention head."""
    return config.kv_channels or config.hidden_size // config.num_attention_heads


def query_groups(config: ModelConfig) -> int:
    """Key/value heads; the number of attention heads without grouped-query attention."""
    return config.num_query_groups or config.num_attention_heads


def ffn_size(config: ModelConfig) -> int:
    """Inner width of the feed-forward layers (of each half, with SwiGLU)."""
    return config.ffn_hidden_size or 4 * config.hidden_size


def padded_vocab_size(config: ModelConfig, vocab_size: int | None = None) -> int:
    """Rows of the embedding: `vocab_size` (default `config.vocab_size`) rounded up, the same at every TP degree.

    Raises ConfigError when neither is known.
    """
    size = vocab_size if vocab_size is not None else config.vocab_size
    if size is None:
        raise ConfigError(
            "model.vocab_size: expected a number, got null; fill it in from the tokenizer "
            "(dataclasses.replace(config, vocab_size=...)) before the model is described or built"
        )
    multiple = config.make_vocab_size_divisible_by
    return -(-size // multiple) * multiple


def weight_shard(name: str, config: ModelConfig, tp_rank: int, tp_size: int) -> tuple[tuple[int, int], Ranges, Ranges]:
    """Whole shape (d_out, d_in), rows and columns that `tp_rank` of `tp_size` holds of the matrix called `name`.

    `name` is the parameter's or the module's (`decoder.layers.3.mlp.linear_fc1[.weight]`). Ranges are (global start,
    length) in the order in which the shard stores them. Raises KeyError for a name that is no sharded matrix and
    ConfigError when the matrix cannot be divided by `tp_size`.
    """
    module = _module_name(name)
    c, h, f = head_channels(config), config.hidden_size, ffn_size(config)
    heads, groups = config.num_attention_heads, query_groups(config)
    if module == "linear_qkv":
        whole = (groups * (heads // groups + 2) * c, h)
    elif module == "linear_proj":
        whole = (h, heads * c)
    elif module == "linear_fc1":
        whole = ((2 if config.swiglu else 1) * f, h)
    elif module == "linear_fc2":
        whole = (h, f)
    elif module in ("word_embeddings", "output_layer"):
        whole = (padded_vocab_size(config), h)
    else:
        raise KeyError(f"{name}: expected one of {', '.join((*_ROWS, *_COLUMNS))}")
    check_tensor_parallel(config, tp_size)
    if module in _COLUMNS:
        return whole, ((0, whole[0]),), (_piece(0, whole[1], tp_rank, tp_size),)
    every_column = ((0, h),)
    if module == "linear_fc1" and config.swiglu:
        return whole, (_piece(0, f, tp_rank, tp_size), _piece(f, f, tp_rank, tp_size)), every_column
    return whole, (_piece(0, whole[0], tp_rank, tp_size),), every_column


def is_sharded(name: str) -> bool:
    """True for the parameters that are cut over tensor-parallel ranks; a bias of rows has the rows of its weight."""
    module, leaf = _module_name(name), name.rsplit(".", 1)[-1]
    return module in _ROWS or (module in _COLUMNS and leaf == "weight")


def is_column_cut(name: str) -> bool:
    """True for matrices of which each rank holds columns: the layers that write to the residual stream."""
    return _module_name(name) in _COLUMNS and name.endswith(".weight")


def check_tensor_parallel(config: ModelConfig, tp_size: int) -> None:
    """Raise ConfigError, naming the degrees that are possible, when the model cannot be divided by `tp_size`."""
    if tp_size not in (possible := tensor_parallel_degrees(config)):
        raise ConfigError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide this model "
            f"(num_attention_heads {config.num_attention_heads}, query groups {query_groups(config)}, ffn_hidden_size "
            f"{ffn_size(config)}, make_vocab_size_divisible_by {config.make_vocab_size_divisible_by}); "
            f"possible: {', '.join(map(str, possible))}"
        )


def tensor_parallel_degrees(config: ModelConfig) -> list[int]:
    """Every tensor-parallel degree by which heads, query groups, feed-forward width and vocabulary can be divided."""
    sizes = (
        config.num_attention_heads,
        query_groups(config),
        ffn_size(config),
        config.make_vocab_size_divisible_by,
    )
    return [t for t in range(1, min(sizes) + 1) if all(size % t == 0 for size in sizes)]


def _piece(start: int, length: int, rank: int, size: int) -> tuple[int, int]:
    return start + rank * (length // size), length // size


def _module_name(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
