"""Bytes that one rank needs, by arithmetic on the recipe. Nothing is allocated.

P: parameters of this rank, D: data-parallel size, e: bytes of a weight (4, or 2 in bf16).

                       weights  gradients             optimizer (masters and moments)
ZeRO 0, fp32           4 P      4 P                   8 P
ZeRO 0, bf16           2 P      2 P, 4 P in the step  12 P
ZeRO 1                 e P      e P                   12 P / D
ZeRO 1, bf16, accum.   2 P      2 P + 4 P             12 P / D
ZeRO 2                 e P      (e or 4) P / D        12 P / D     plus a bucket of gradients on their way

Activations are what autograd saves, per layer in elements of e bytes (Korthikanti et al. 2022, Table 2, without the
s x s terms): see `_saved_per_layer`. With recomputation: the input of every layer, and all of one layer at a time.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_opus.backends.deepspeed import gradient_bucket
from megatron_opus.backends.sharding import ffn_size, head_channels, padded_vocab_size, query_groups
from megatron_opus.config import RunConfig
from megatron_opus.training.model import count_parameters, parameter_shapes

GIB = 2**30
# What a process holds beside tensors once it runs: CUDA context, NCCL buffers and cuBLAS workspaces; on a CPU little,
# since interpreter and libraries are already counted as used when memory is looked up.
OVERHEAD = {"cuda": 2.0 * GIB, "cpu": 0.15 * GIB}
# Fragmentation and what the arithmetic leaves out. Measured on a CPU, seven recipes of 1 to 4 GiB (GPT-2 shapes and
# SwiGLU/RMSNorm/rotary ones, fp32 and bf16, ZeRO 0 to 2): peak resident memory was 0.86 to 0.98 of the estimate.
SLACK = 1.1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes hold the model, and how."""

    tp: int
    dp: int
    zero_stage: int
    micro_batch_size: int

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks: tensor_model_parallel_size={self.tp} zero_stage={self.zero_stage} "
            f"micro_batch_size={self.micro_batch_size}"
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes per rank. The phases take turns, so the need is what stays plus the largest of them."""

    weights: float
    optimizer: float
    sketches: float  # projection matrices of the scored layers
    gradients_kept: float  # buffers that live between steps
    overhead: float
    training: float  # gradients, activations and logits of one microbatch
    step: float  # gradients and the optimizer's temporaries
    scoring: float  # activations, factors, logits and features

    @property
    def total(self) -> float:
        stays = self.weights + self.optimizer + self.sketches + self.gradients_kept
        return SLACK * (stays + max(self.training, self.step, self.scoring)) + self.overhead

    def lines(self) -> list[str]:
        """One line per part, in GiB."""
        return [f"  {f.name:15} {getattr(self, f.name) / GIB:8.2f} GiB" for f in dataclasses.fields(self)] + [
            f"  {'total':15} {self.total / GIB:8.2f} GiB: what stays, the largest of training, step, scoring, 10% slack"
        ]


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The recipe's own layout on `world_size` processes."""
    tp = config.parallel.tensor_model_parallel_size
    return Layout(
        tp=tp,
        dp=world_size // tp,
        zero_stage=config.parallel.zero_stage,
        micro_batch_size=config.training.micro_batch_size,
    )


def estimate(config: RunConfig, layout: Layout, *, device: str) -> MemoryEstimate:
    """Bytes per rank of this recipe in this layout on "cpu" or "cuda". `config.model.vocab_size` must be known."""
    t, dp = config.training, layout.dp
    bf16 = t.precision == "bf16"
    e = 2 if bf16 else 4
    p = count_parameters(_with_positions(config).model, padded=True, tp_size=layout.tp)
    accumulates = t.global_batch_size > layout.micro_batch_size * dp
    kept = 0.0
    if layout.zero_stage == 0:
        optimizer, gradients = (12.0 if bf16 else 8.0) * p, float(e * p)
        step = gradients + (4.0 * p if bf16 else 0.0) + _adam_temporaries(config, layout, device)
    else:
        optimizer = 12.0 * p / dp
        bucket = float(e * gradient_bucket(p))
        if layout.zero_stage == 1:
            gradients = float(e * p)
            kept = 4.0 * p if bf16 and accumulates else 0.0
        else:
            gradients = (4.0 if bf16 and accumulates else float(e)) * p / dp + 2 * bucket
        # this rank's part of the averaged gradients, and its float32 copy where it is not summed in float32 already
        step = 8.0 * p / dp
        if kept:
            step = gradients
        elif layout.zero_stage == 1:
            step += gradients
        elif bf16 and accumulates:
            step = 4.0 * p / dp
        step += _adam_temporaries(config, layout, device)
    return MemoryEstimate(
        weights=float(e * p),
        optimizer=optimizer,
        gradients_kept=kept,
        sketches=_sketches(config) / layout.tp if config.selection.strategy == "opus" else 0.0,
        overhead=OVERHEAD[device],
        training=gradients + _forward(config, layout, layout.micro_batch_size, config.data.seq_length, frozen=False),
        step=step,
        scoring=_scoring(config, layout) if config.selection.strategy == "opus" else 0.0,
    )


def _with_positions(config: RunConfig) -> RunConfig:
    m = config.model
    rows = m.max_position_embeddings or config.data.seq_length
    return dataclasses.replace(config, model=dataclasses.replace(m, max_position_embeddings=rows))


def _adam_temporaries(config: RunConfig, layout: Layout, device: str) -> float:
    """PyTorch's AdamW on a CPU makes two tensors as large as the one it updates; fused kernels make none.

    That is one parameter at stage 0, and the whole flat partition above.
    """
    if device == "cuda":
        return 0.0
    if layout.zero_stage == 0:
        shapes = parameter_shapes(_with_positions(config).model, padded=True)
        return 8.0 * max(math.prod(s) for s in shapes.values()) / layout.tp
    return 8.0 * count_parameters(_with_positions(config).model, padded=True, tp_size=layout.tp) / layout.dp


def _saved_per_layer(config: RunConfig, layout: Layout, *, frozen: bool) -> float:
    """Elements per token that one layer keeps for its backward pass; `frozen`: no weight gradient is wanted."""
    m, tp = config.model, layout.tp
    h, f, c = m.hidden_size, ffn_size(m), head_channels(m)
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
    if not frozen:
        replicated += 2 * h  # inputs of the two column-parallel matrices
        sharded += f  # input of linear_fc2
    if m.hidden_dropout > 0:
        replicated += 2 * h
    if config.parallel.sequence_parallel and tp > 1:
        replicated = replicated / tp + h  # one gathered input at a time
    return replicated + sharded / tp


def _forward(config: RunConfig, layout: Layout, batch: int, length: int, *, frozen: bool) -> float:
    """Bytes of saved activations and of logits with their gradient for one forward and backward pass."""
    m = config.model
    e = 2 if config.training.precision == "bf16" else 4
    tokens = batch * length
    layers = float(m.num_layers)
    kept = 0.0
    if config.training.recompute == "full" and not frozen:  # each layer's input, and all of one layer at a time
        layers = 1.0
        kept = m.num_layers * m.hidden_size / (layout.tp if config.parallel.sequence_parallel else 1)
    saved = (kept + layers * _saved_per_layer(config, layout, frozen=frozen)) * tokens * e
    vocabulary = padded_vocab_size(m) / layout.tp
    logits = tokens * vocabulary * (8.0 if e == 4 else 10.0)  # as computed, and the float32 softmax that is kept
    head_gradient = 0.0 if frozen else e * vocabulary * m.hidden_size  # of a tied weight, before it is added up
    widest = e * tokens * 4 * max(m.hidden_size, ffn_size(m) / layout.tp)  # in flight inside one layer
    return saved + max(logits + head_gradient, widest)


def _sketches(config: RunConfig) -> float:
    """Projection matrices of a two-sided sketch: about sqrt(m) numbers per row and column of every matrix."""
    if config.selection.sketch.operator != "two_sided":
        return 0.0
    side = math.sqrt(config.selection.sketch.dim)
    shapes = parameter_shapes(_with_positions(config).model, padded=True)
    matrices = [s for n, s in shapes.items() if ".linear_" in n and n.endswith("weight")]
    return sum(4.0 * side * (rows + columns) for rows, columns in matrices)


def _scoring(config: RunConfig, layout: Layout) -> float:
    """Bytes of one scoring micro-batch and of the features of all candidates."""
    s, m = config.selection, config.model
    length = min(s.score_length, config.data.seq_length)
    share = -(-config.buffer_size // layout.dp)
    together = share + -(-s.proxy_batch_size // layout.dp)
    batch = min(s.score_micro_batch_size or together, together)
    scored = 4 * m.num_layers
    features = s.sketch.dim * (scored if s.sketch.scope == "layer" else 1)
    # float32 sums, their packed copy and the float64 copy of the alignment; all ranks' features for the Gram matrix
    held = 16.0 * share * features + (4.0 * config.buffer_size * features if layout.dp > 1 else 0.0)
    if s.sketch.operator == "two_sided":
        factors = 4.0 * batch * length * scored * math.sqrt(s.sketch.dim)
    else:
        e = 2 if config.training.precision == "bf16" else 4
        inputs = 3 * m.hidden_size + ffn_size(m) / layout.tp  # the inputs themselves are kept until their gradient
        factors = e * batch * length * m.num_layers * inputs + 2 * 64 * 2**20
    return held + factors + _forward(config, layout, batch, length, frozen=True)
