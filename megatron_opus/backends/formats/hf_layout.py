"""Published GPT-2, Qwen3, Qwen3-MoE and Llama checkpoints: names, and where each row of ours lies.

Pure functions of the configuration (h hidden, f feed-forward, n heads, g query groups, c channels, V vocabulary):

ours                              GPT-2 (transformer.)                 Qwen3 and Llama (model.)
embedding.word_embeddings [V', h] wte [V, h]                           embed_tokens [V, h]
embedding.position_embeddings     wpe                                  -
linear_qkv, by query group        h.i.attn.c_attn [h, 3h] = q | k | v  q_proj, k_proj, v_proj
linear_proj [h, nc]               h.i.attn.c_proj [nc, h]              o_proj
linear_fc1 [f, h] or [2f, h]      h.i.mlp.c_fc [h, f]                  gate_proj over up_proj
linear_fc2 [h, f]                 h.i.mlp.c_proj [f, h]                down_proj
output_layer [V', h]              lm_head [V, h]                       lm_head [V, h]

Llama is Qwen3 without the norms of queries and keys. Qwen3-MoE is Qwen3 with `mlp.gate` [E, h] for our `mlp.router`,
and with gate_proj, up_proj and down_proj of every expert e under `mlp.experts.e` in place of one MLP's. GPT-2's
`Conv1D` stores [d_in, d_out]: the rows of ours are its columns. V' is V rounded up; no published tensor holds its last
rows, which are zeros.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from megatron_opus.backends.formats.hf_config import Family, family
from megatron_opus.config import ModelConfig
from megatron_opus.config.dimensions import head_channels, query_groups
from megatron_opus.layout.model_layout import ModelLayout, ParameterLayout

PREFIX: dict[Family, str] = {"gpt2": "transformer.", "qwen3": "model.", "qwen3_moe": "model.", "llama": "model."}
HEAD = "lm_head.weight"
# Causal masks (GPT-2) and rotary frequencies (Qwen3) that old files carry as if they were weights.
_BUFFERS = re.compile(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$")

_NAMES: dict[Family, dict[str, str]] = {
    "gpt2": {
        "input_layernorm": "ln_1",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    },
    "qwen3": {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2": "mlp.down_proj",
    },
    "qwen3_moe": {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.router": "mlp.gate",
    },
    "llama": {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2": "mlp.down_proj",
    },
}
_SHARED: dict[Family, dict[str, str]] = {
    "gpt2": {
        "embedding.word_embeddings.weight": "wte.weight",
        "embedding.position_embeddings.weight": "wpe.weight",
        "decoder.final_layernorm.weight": "ln_f.weight",
        "decoder.final_layernorm.bias": "ln_f.bias",
    },
    "qwen3": {
        "embedding.word_embeddings.weight": "embed_tokens.weight",
        "decoder.final_layernorm.weight": "norm.weight",
    },
    "qwen3_moe": {
        "embedding.word_embeddings.weight": "embed_tokens.weight",
        "decoder.final_layernorm.weight": "norm.weight",
    },
    "llama": {
        "embedding.word_embeddings.weight": "embed_tokens.weight",
        "decoder.final_layernorm.weight": "norm.weight",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRows:
    """Names rows start ... start + length - 1 of one published tensor, seen as [d_out, d_in]."""

    tensor: str
    start: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfLayout:
    """Says of which published rows a parameter of ours consists, one piece below the other; zeros are not listed."""

    pieces: tuple[PublishedRows, ...]
    transposed: bool = False


def layouts(model: ModelConfig, layout: ModelLayout) -> dict[str, HfLayout]:
    """Find out where the rows of every parameter of ours are published."""
    kind = family(model)
    return {entry.name: _layout(kind, PREFIX[kind], entry, model) for entry in layout.parameters}


def _layout(kind: Family, prefix: str, entry: ParameterLayout, model: ModelConfig) -> HfLayout:
    name, rows = entry.name, entry.shape[0] - entry.padding
    if entry.block is None:
        tensor = HEAD if entry.kind == "output" else prefix + _SHARED[kind][name]
        return HfLayout(pieces=(PublishedRows(tensor=tensor, start=0, length=rows),))
    module, _, leaf = name.removeprefix(f"decoder.layers.{entry.block}.").rpartition(".")
    layer = f"{prefix}{'h' if kind == 'gpt2' else 'layers'}.{entry.block}"
    transposed = kind == "gpt2" and entry.kind == "linear"
    if module == "self_attention.linear_qkv":
        return HfLayout(pieces=_qkv(kind, layer, leaf, model), transposed=transposed)
    mlp = f"{layer}.mlp" if entry.expert is None else f"{layer}.mlp.experts.{entry.expert}"
    if entry.halves:
        halves = (f"{mlp}.{part}_proj.{leaf}" for part in ("gate", "up"))
        return HfLayout(pieces=tuple(PublishedRows(tensor=half, start=0, length=rows // 2) for half in halves))
    tensor = f"{mlp}.down_proj.{leaf}" if entry.expert is not None else f"{layer}.{_NAMES[kind][module]}.{leaf}"
    return HfLayout(pieces=(PublishedRows(tensor=tensor, start=0, length=rows),), transposed=transposed)


def _qkv(kind: Family, layer: str, leaf: str, model: ModelConfig) -> tuple[PublishedRows, ...]:
    """Lay out Megatron's order, (queries.., key, value) of group 0, of group 1, ...; published: all q, all k, all v."""
    c, n, g = head_channels(model), model.num_attention_heads, query_groups(model)
    if kind == "gpt2":
        tensors, offsets = (f"{layer}.attn.c_attn.{leaf}",) * 3, (0, n * c, (n + g) * c)
    else:
        tensors = tuple(f"{layer}.self_attn.{part}_proj.{leaf}" for part in "qkv")  # type: ignore[assignment]
        offsets = (0, 0, 0)
    widths = (n // g * c, c, c)
    return tuple(
        PublishedRows(tensor=tensor, start=offset + group * width, length=width)
        for group in range(g)
        for tensor, offset, width in zip(tensors, offsets, widths, strict=True)
    )


def published_shapes(placed: Mapping[str, HfLayout], layout: ModelLayout) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Give for every published tensor its shape as stored, and whether it is stored as [d_in, d_out]."""
    rows: dict[str, int] = {}
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, place in placed.items():
        for piece in place.pieces:
            rows[piece.tensor] = rows.get(piece.tensor, 0) + piece.length
            shape = (rows[piece.tensor], *layout[name].shape[1:])
            found[piece.tensor] = (shape[::-1] if place.transposed else shape, place.transposed)
    return found


def is_buffer(tensor: str) -> bool:
    """True for what is stored beside the weights and computed anew by every implementation."""
    return bool(_BUFFERS.search(tensor))
