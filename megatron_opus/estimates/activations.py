"""Count what autograd saves in a forward pass, what a layer has in flight, and the logits.

Per layer in elements of e bytes (Korthikanti et al. 2022, Table 2, without the s x s terms): see `_saved_per_layer`.
With recomputation: the input of every layer, and all of one layer at a time. A pipeline stage saves as much for each
micro-batch that is in flight (schedule.py). Context-parallel ranks save their share of the tokens. Experts count as
evenly loaded: each token goes through topk of them, on whatever rank.
"""

from __future__ import annotations

from megatron_opus.config import RunConfig
from megatron_opus.config.dimensions import expert_ffn_size, ffn_size, head_channels, query_groups
from megatron_opus.layout.model_layout import ModelLayout
from megatron_opus.layout.parallel_layout import ParallelLayout


def element(config: RunConfig) -> int:
    """Give the bytes of a weight and of an activation."""
    return 2 if config.training.precision == "bf16" else 4


def mlp_width(config: RunConfig) -> int:
    """Give the inner width that a token goes through: that of all experts it is sent to, or of the one MLP."""
    m = config.model
    if m.num_moe_experts is None:
        return ffn_size(m)
    return m.moe_router_topk * expert_ffn_size(m) + (m.moe_shared_expert_intermediate_size or 0)


def saved(config: RunConfig, layers: int, layout: ParallelLayout, tokens: float, *, frozen: bool, kept: float) -> float:
    """Count the bytes that so many layers keep for backward passes over `kept` micro-batches of so many tokens."""
    each = _saved_per_layer(config, layout, frozen=frozen)
    if config.training.recompute == "full" and not frozen and layers:
        inputs = layers * config.model.hidden_size / (layout.tp if config.parallel.sequence_parallel else 1)
        return (kept * inputs + each) * tokens * element(config)
    return kept * layers * each * tokens * element(config)


def passing(config: RunConfig, model: ModelLayout, layout: ParallelLayout, tokens: float, *, frozen: bool) -> float:
    """Count the bytes beside what is saved: logits with their gradient, or what is in flight inside one layer."""
    m, e = config.model, element(config)
    width = max(float(m.hidden_size), mlp_width(config) / layout.tp)
    if layout.ep > 1 and config.parallel.moe_token_dispatcher_type == "allgather":
        width = max(width, float(layout.ep * m.hidden_size))  # the tokens of all ranks that share the experts
    widest = e * tokens * 4 * width
    if not model.gives_logits:
        return widest
    vocabulary, _ = model.local_shape(model.output.name)
    logits = tokens * vocabulary * (8.0 if e == 4 else 10.0)  # as computed, and the float32 softmax that is kept
    head_gradient = 0.0 if frozen else e * vocabulary * m.hidden_size  # of a tied weight, before it is added up
    return max(logits + head_gradient, widest)


def _saved_per_layer(config: RunConfig, layout: ParallelLayout, *, frozen: bool) -> float:
    """Count the elements per token that a layer keeps for its backward pass; `frozen`: without weight gradients."""
    m, tp = config.model, layout.tp
    h, f, c = m.hidden_size, mlp_width(config), head_channels(m)
    heads, groups = m.num_attention_heads, query_groups(m)
    bf16 = config.training.precision == "bf16"
    replicated = 2.0 * h  # inputs of the two norms
    if m.normalization == "RMSNorm" and not frozen:
        replicated += (6.0 if bf16 else 2.0) * h  # normalised inputs, in float32
    sharded = (2 * heads + 2 * groups) * c  # the fused projection, of which q, k, v are views, and the output
    if groups < heads:
        sharded += 2 * (heads - groups) * c  # keys and values repeated for each head
    if m.position_embedding_type == "rope":
        sharded += (heads + groups) * c  # rotated copies
    if m.qk_layernorm:
        sharded += (heads + groups) * c
    sharded += 4 * f if m.swiglu else f  # both halves before and after the activation; without gate, its input
    if m.num_moe_experts is not None:  # tokens in the order of the experts, and what they give, once for each of topk
        sharded += m.moe_router_topk * h * (1 if frozen else 2) + 2 * m.num_moe_experts
    if not frozen:
        replicated += 2 * h  # inputs of the two column-parallel matrices
        sharded += f  # input of linear_fc2
    if m.hidden_dropout > 0:
        replicated += 2 * h
    if config.parallel.sequence_parallel and tp > 1:
        replicated = replicated / tp + h  # one gathered input at a time
    return replicated + sharded / tp
